"""Products, norms by index and norms that are done again by the Triton kernels: checks of triton_worker.py."""

from __future__ import annotations

import itertools

import torch
from kernel_cases import make
from torch import Tensor
from triton_noise import on_cpu
from triton_steps import Waits

from dpcompile.kernels import by_index, product_op
from dpcompile.kernels.triton import by_index as index_kernels
from dpcompile.kernels.triton import direct, ghost, products

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _sides(b: int, k: int, t: int, p: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(b, k, t, p).to(dtype), torch.randn(b, k, t, d).to(dtype).mT.contiguous().mT


def check_products_and_their_norms() -> None:
    """Sizes that fill no tile, and more than one; operands that torch multiplies; both orders in memory."""
    shapes = ((1, 1, 1, 1, 1), (2, 2, 5, 17, 70), (2, 1, 33, 65, 9), (1, 1, 300, 3, 4))
    for dtype, sizes in itertools.product(DTYPES, shapes):
        rows, cols = _sides(*sizes, dtype)
        each, norms = product_op.product_with_norms(rows, cols, False)
        truth = rows.double().mT @ cols.double()
        assert each.dtype == torch.float32 and each.is_contiguous()
        torch.testing.assert_close(each.double(), truth, rtol=1e-5, atol=1e-4)
        own = each.double().square().sum((1, 2, 3))
        small = 1e-4 if dtype == torch.float16 else 1e-15  # squares are then none of float32
        for scale in (1.0, small) if sizes == shapes[1] else ():
            alone = products.product_with_squares(rows * scale, cols * scale, again := torch.empty_like(each))
            torch.testing.assert_close(alone, again.double().square().sum((1, 2, 3)), rtol=1e-13, atol=0)
        assert (norms >= own * (1 - 1e-14)).all() and (norms <= own * 1.001).all(), "not the norm of what is kept"


def check_products_that_cancel_are_made_again() -> None:
    """In float32 the sum of three products is 0 or far off; in float64 it is right, and rounded once."""
    for dtype in DTYPES:
        big = 2.0**12 if dtype == torch.float16 else 2.0**30
        rows = torch.tensor([[[[big], [1.0], [-big]]], [[[1.0], [2.0], [3.0]]]]).to(dtype)
        cols = torch.tensor([[[[big, 1.0]], [[1.5, 2.0]], [[big, 1.0]]], [[[1.0, 1.0]], [[1.0, 1.0]], [[1.0, 1.0]]]])
        cols = cols.to(dtype).permute(0, 2, 1, 3)
        for reverse in (False, True):
            left, right = (rows.flip(2), cols.flip(2)) if reverse else (rows, cols)
            each, norms = product_op.product_with_norms(left, right, False)
            truth = left.double().mT @ right.double()
            assert torch.equal(each.double(), truth), (dtype, each)
            assert (norms >= truth.square().sum((1, 2, 3))).all()
            found = direct.direct_norm(left, right), ghost.ghost_norm(left, right)
            assert all((n >= truth.square().sum((1, 2, 3)) * (1 - 1e-12)).all() for n in found)


def check_values_that_are_not_finite_stay_in_their_example() -> None:
    for value, side, positions in itertools.product((torch.nan, torch.inf), (0, 1), (5, 40)):
        sides = [torch.randn(3, 2, positions, 4), torch.randn(3, 2, positions, 6)]
        sides[side][1, 1, 3, 2] = value
        each, norms = product_op.product_with_norms(sides[0], sides[1], False)
        assert norms.isfinite().tolist() == [True, False, True] and each[[0, 2]].isfinite().all()


def check_what_overflows_in_float32_has_a_norm() -> None:
    rows, cols = torch.full((1, 1, 2, 3), 1e30), torch.full((1, 1, 2, 3), 1e30)
    truth = (rows.double().mT @ cols.double()).square().sum((1, 2, 3))
    for norm in (direct.direct_norm(rows, cols), ghost.ghost_norm(rows, cols)):
        assert (norm >= truth).all() and (norm <= truth * 1.002).all()


def check_norms_by_index() -> None:
    """Equal positions first, apart, all, none; widths that fill no tile; all dtypes and orders in memory."""
    sizes, kinds = ((1, 1, 1), (2, 4, 130), (3, 9, 5)), (*DTYPES, torch.float64)
    for (batch, positions, width), dtype in zip((*sizes, sizes[1]), kinds, strict=True):
        values = torch.randn(batch, positions, width).to(dtype)
        for high in (1, 3, 1000):
            index = torch.randint(-1, high, (batch, positions)).to(torch.int32 if high == 3 else torch.int64)
            for value in (values, values.mT.contiguous().mT, values[:, :1].expand_as(values)):
                got = by_index.norms_by_index(index, value)
                with on_cpu():
                    wanted = by_index.norms_by_index(index, value.double())
                torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    values = torch.randn(3, 4, 5)
    values[1, 2, 3] = torch.nan
    assert by_index.norms_by_index(torch.zeros(3, 4).long(), values).isfinite().tolist() == [True, False, True]
    assert by_index.norms_by_index(torch.zeros(3, 0).long(), torch.zeros(3, 0, 5)).tolist() == [0.0] * 3


def check_only_the_examples_that_are_asked_for() -> None:
    index, values, which = torch.randint(0, 3, (4, 6)), torch.randn(4, 6, 5), torch.tensor([True, False, False, True])
    some, every = index_kernels.sums_and_sizes(index, values, which), index_kernels.sums_and_sizes(index, values)
    assert all(torch.equal(a, torch.where(which, b, 0.0)) for a, b in zip(some, every, strict=True))


def check_one_hot_norms_that_cancel() -> None:
    index = torch.tensor([[3, 3], [3, 4]])
    cols = torch.tensor([[[[1e8, 1.0], [-1e8, 1.0]]], [[[1e8, 1.0], [-1e8, 1.0]]]])
    found, truth = ghost.ghost_norm_one_hot(index, cols), torch.tensor([4.0, 2e16 + 2], dtype=torch.float64)
    assert (found >= truth).all() and (found <= truth * 1.002 + 2.0**-46 * 4e16).all(), found


def check_nothing_waits_for_the_device() -> None:
    index = torch.randint(0, 3, (3, 40))
    for dtype, positions in ((torch.float32, 40), (torch.bfloat16, 5)):
        rows, cols = _sides(3, 1, positions, 6, 7, dtype)
        by_index.norms_by_index(index[:, :positions], cols[:, 0].contiguous())  # the self-tests wait, once
        product_op.product_with_norms(rows, cols, False)
        with Waits() as waits:
            product_op.product_with_norms(rows, cols, False)
            direct.direct_norm(rows, cols)
            ghost.ghost_norm(rows, cols)
            ghost.ghost_norm_one_hot(index[:, :positions], cols)
            by_index.norms_by_index(index[:, :positions], cols[:, 0])
        assert not waits.seen, waits.seen


def check_offsets_beyond_two_to_the_31() -> None:
    case = make("far offsets")
    rows, cols = case.rows, case.cols
    out = torch.zeros(1, 1, rows.shape[-1], cols.shape[-1])
    norms = products.product_with_squares(rows, cols, out)
    torch.testing.assert_close(norms, case.truth(), rtol=1e-5, atol=0)
    torch.testing.assert_close(products.made_again(rows, cols, torch.tensor([True])), case.truth(), rtol=1e-12, atol=0)
