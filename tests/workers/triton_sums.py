"""Weighted sums and squares by the Triton kernels: checks of triton_worker.py."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, cast

import torch
import triton.language as tl
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn
from triton_noise import CPU, on_cpu
from triton_steps import Waits

import dpcompile
from dpcompile.kernels import kept, squares
from dpcompile.kernels.triton import kept as kept_kernels
from dpcompile.kernels.triton import squares as square_kernels
from dpcompile.kernels.triton import table

dp_compile: Any = dpcompile.dp_compile


def _each(dtype: torch.dtype, batch: int = 11) -> list[Tensor]:
    """Vectors and matrices, of all orders in memory; lengths that fill no tile, that fill one, and more."""
    found = [torch.randn(batch, n, dtype=dtype) for n in (1, 3, 255, 256, 257)]
    found += [torch.randn(9, batch, dtype=dtype).T, torch.randn(batch, 12, dtype=dtype)[:, ::2]]
    found += [torch.randn(batch, 7, 3, 50, dtype=dtype), torch.randn(5, batch, 2, dtype=dtype).permute(1, 2, 0)]
    return [*found, torch.randn(batch, 0, dtype=dtype), torch.randn(batch, 1, 6, dtype=dtype).expand(batch, 4, 6)]


def check_weighted_sums_never_read_an_example_of_weight_0() -> None:
    for dtype, batch in itertools.product((torch.float32, torch.float64), (1, 8, 11)):
        weights = torch.rand(2, batch, dtype=dtype)
        weights[0, ::2] = 0.0
        each = _each(dtype, batch)
        rows = [i % 2 for i in range(len(each))]
        wanted = [torch.einsum("b,b...->...", weights[row], e) for row, e in zip(rows, each, strict=True)]
        dirty = [e.clone() for e in each]
        for row, gradients in zip(rows, dirty, strict=True):
            if row == 0:
                gradients[::4], gradients[2::4] = torch.nan, torch.inf
        found = kept.weighted_sums(weights, rows, dirty)
        for got, right in zip(found, wanted, strict=True):
            assert got.is_contiguous() and got.shape == right.shape
            torch.testing.assert_close(got, right)


def check_weighted_sums_of_nothing_are_zeros() -> None:
    found = kept.weighted_sums(torch.zeros(1, 4), [0, 0], [torch.full((4, 3), torch.nan), torch.full((4, 2, 3), 1e38)])
    assert all(torch.equal(got, torch.zeros_like(got)) for got in found)


def check_norms_of_vectors() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        each = [e for e in _each(torch.float64) if e.ndim == 2]
        each = [e.to(dtype) for e in each]
        wanted = torch.stack([e.double().square().sum(1) for e in each])
        torch.testing.assert_close(kept.norms_of_vectors(each), wanted, rtol=1e-14, atol=0)
    each = [torch.full((3, 5), 1e30), torch.full((3, 4), 1e-30)]
    found = kept.norms_of_vectors(each)
    wanted = torch.tensor([[5e60] * 3, [4e-60] * 3], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    each[0][1, 2], each[1][2, 3] = torch.nan, torch.inf
    found = kept.norms_of_vectors(each)
    assert torch.equal(found.isfinite(), torch.tensor([[True, False, True], [True, True, False]]))


def check_squares_of_all_shapes_and_strides() -> None:
    shapes = [(1,), (0,), (5, 0), (3, 1), (1, 3000), (2, 40_001), (33, 70), (2, 3, 4, 5), (1, 2, 65, 66), (0, 4)]
    for shape, dtype in itertools.product(shapes, square_kernels.DTYPES):
        values = torch.randn(shape).to(dtype)
        for value in (values, values.mT.contiguous().mT if values.ndim > 1 else values, values[..., ::2]):
            wanted = value.double().square().sum(-1)
            torch.testing.assert_close(squares.squares_of(value), wanted, rtol=1e-13, atol=0)
    with on_cpu():
        wanted = squares.squares_of(values)
    assert wanted.shape == squares.squares_of(values).shape
    assert squares.squares_of(torch.tensor([[1.0, torch.nan], [1.0, 2.0]])).isnan().tolist() == [True, False]


def check_memory_beyond_two_to_the_31() -> None:
    """Addresses so far before the memory that the last example lies 2**31 elements behind them."""
    far, n = 2**31, 6
    memory = torch.randn(n)
    weights = torch.tensor([[0.0, 2.0]])
    address = memory.data_ptr() - 4 * far  # of example 0, which has weight 0: it is not there, and is not read
    result = torch.zeros(n)
    described = [[1], [n], [far], [1], [0], [address], [result.data_ptr()]]
    whole = table.numbers_table((), (), described, CPU)
    sizes: Any = {"DTYPE": tl.float32, "TILE_B": 8, "TILE_L": 256}
    cast(Any, kept_kernels.sums_kernel)[(1,)](whole, 1, weights, 2, 2, 1, **sizes)
    torch.testing.assert_close(result, 2 * memory)
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # of which nothing else is touched
    values = memory.as_strided((2, 20), (2**31, 1)).copy_(torch.randn(2, 20))
    torch.testing.assert_close(squares.squares_of(values), values.double().square().sum(1), rtol=1e-13, atol=0)
    found = kept.norms_of_vectors([values])
    torch.testing.assert_close(found[0], values.double().square().sum(1), rtol=1e-13, atol=0)


def check_in_a_captured_graph_the_table_needs_no_host_memory() -> None:
    """The same numbers, integers and bits of float64, as arguments of kernels."""
    arguments: Any = ((3, 2**32 - 1, 7), (0.1, -1e300), [[1, 2], [2**62, 0], [5, -1]], CPU, (1.3, -0.0))
    plain, own = table.numbers_table(*arguments), table.captured
    table.captured = lambda: True
    try:
        assert torch.equal(table.numbers_table(*arguments), plain)
        assert torch.equal(kept.weighted_sums(torch.ones(1, 3), [0], [torch.ones(3, 4)])[0], torch.full((4,), 3.0))
    finally:
        table.captured = own


class Many(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.randn(3)) for _ in range(depth))
        self.last = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = torch.tanh(x * scale) + x
        return self.last(x)


def check_a_model_of_many_vectors() -> None:
    """From the plan to the clipped sums, through the kernels; an example that is not finite leaves no trace."""
    for bad in (False, True):
        model, inputs, loss = Many(kept.FEW + 1), torch.randn(4, 3), PseudoLoss(4)
        if bad:
            inputs[2] = torch.inf
        used, own = [], kept_kernels.weighted_sums
        kept_kernels.weighted_sums = lambda *a, own=own, used=used: used.append(1) or own(*a)
        try:
            private = dp_compile(model, max_grad_norm=1.0, backend="eager", norm="instantiate")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                train_step(private, (inputs,), {}, loss)
        finally:
            kept_kernels.weighted_sums = own
        assert used and "weighted_sums" in private.graph.code and "norms_of_vectors" in private.graph.code
        if bad:
            assert all(p.grad.isfinite().all() for p in private.parameters())
        else:
            assert_right(private, clip(per_example_gradients(model, (inputs,), {}, loss), 1.0), 1e-5)


def check_nothing_waits_for_the_device() -> None:
    each, weights = _each(torch.float32), torch.rand(1, 11)
    vectors = [e for e in each if e.ndim == 2]
    with Waits() as waits:
        kept.weighted_sums(weights, [0] * len(each), each)
        kept.norms_of_vectors(vectors)
        squares.squares_of(each[0])
    assert not waits.seen, waits.seen


def check_without_the_kernels_torch_does_it_and_waits_for_nothing() -> None:
    each, weights = _each(torch.float32), torch.rand(1, 11)
    weights[0, 3] = 0.0
    vectors = [e for e in each if e.ndim == 2]
    kinds = (kept._sums_run_on, kept.squares_run_on, squares.squares_run_on)
    wanted = kept.weighted_sums(weights, [0] * len(each), each), kept.norms_of_vectors(vectors)
    kept._sums_run_on = kept.squares_run_on = squares.squares_run_on = lambda _: False
    try:
        with Waits() as waits:
            found = kept.weighted_sums(weights, [0] * len(each), each), kept.norms_of_vectors(vectors)
        assert not waits.seen, waits.seen
    finally:
        kept._sums_run_on, kept.squares_run_on, squares.squares_run_on = kinds
    for a, b in zip((*found[0], found[1]), (*wanted[0], wanted[1]), strict=True):
        torch.testing.assert_close(a, b)
