"""Every example's product and its squared norm as one operation.

Inductor's own code for the norm, a reduction over one long row, is slower than torch's kernel for short ones, and a
fresh result waits for the operating system (see :mod:`dpcompile.kernels.workspace`): `python -m benchmarks.products`
prints it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpcompile.graph.slices import accumulation_dtype
from dpcompile.kernels.exact import kept_norms_of, norms_of, rounded_again_at_once, sizes_of
from dpcompile.kernels.narrow import NARROW, narrow_products
from dpcompile.kernels.norms_torch import direct_norm
from dpcompile.kernels.on_gpu import proven
from dpcompile.kernels.operators import operator
from dpcompile.kernels.products import product_
from dpcompile.kernels.rates import rates_for
from dpcompile.kernels.workspace import kept_gradients

__all__ = ["product_norms", "product_with_norms"]


_FEW_NARROW, _FEW = 256, 32  # positions; by published rates of an A100, not measured
_ANY_STRIDES = (torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe)  # examples are counted that are done again


@operator("product_with_norms", tags=[torch.Tag.cudagraph_unsafe])
def product_with_norms(rows: Tensor, cols: Tensor, reuse: bool) -> tuple[Tensor, Tensor]:
    """``rows^T cols`` of every example and block, to be kept, and every example's squared norm.

    Products of bfloat16 or float16 numbers are exact in float32, in which they are added up: so it is the product of
    the widened operands, at the speed of narrow ones where the processor has it (:mod:`dpcompile.kernels.narrow`).

    **Guarantee.** The norm is that of the result, which is what the clipped sum is made of, or a little larger: see
    :func:`dpcompile.kernels.exact.rounded_again`. Where rounding is likely to have moved the squared norm by more than
    :data:`dpcompile.kernels.rounding.CLOSE` of itself, the result is made in float64 and rounded once.

    Args:
        rows: ``[B, K, T, P]``, any real floating dtype, any strides.
        cols: ``[B, K, T, D]``, of the same dtype.
        reuse: whether the result's memory stays mapped for the next step.

    Returns:
        ``[B, K, P, D]``, float32, or float64 of float64; and ``[B]``, float64.
    """
    batch, blocks, positions, p = rows.shape
    shape = (batch * blocks, p, cols.shape[-1])
    dtype = accumulation_dtype(rows.dtype)
    on_cpu = rows.device.type == "cpu"
    products = kept_gradients.take(shape, rows, dtype) if reuse and on_cpu else rows.new_empty(shape, dtype=dtype)
    result = products.view(batch, blocks, *shape[1:])
    if products_run_on(rows.device) and dtype == torch.float32 and rows.numel() and cols.numel():
        return result, _on_gpu(rows, cols, result)
    left, right = rows.flatten(0, 1), cols.flatten(0, 1)
    narrow = dtype != rows.dtype and rates_for(rows.device).narrow_products
    norms = narrow_products(left, right, products) if narrow else None
    if norms is not None:
        norms = norms.view(batch, blocks).sum(1)
    else:
        if narrow and not on_cpu:
            torch.bmm(left.mT, right, out_dtype=dtype, out=products)
        else:
            product_(left.mT.to(dtype), right.to(dtype), products)

    def redo(i: int) -> Tensor:
        return torch.matmul(rows[i].double().mT, cols[i].double())

    return result, kept_norms_of(result, rows, cols, norms, redo)


def _on_gpu(rows: Tensor, cols: Tensor, result: Tensor) -> Tensor:
    """Where few terms are added up, memory is what takes long: norms are then taken before products are written."""
    from dpcompile.kernels.triton import products

    positions, narrow = rows.shape[2], rows.dtype in NARROW
    if positions <= (_FEW_NARROW if narrow else _FEW):
        norms = products.product_with_squares(rows, cols, result)
    else:
        left, right, out = rows.flatten(0, 1), cols.flatten(0, 1), result.flatten(0, 1)
        if narrow and rows.is_cuda and rates_for(rows.device).narrow_products:
            torch.bmm(left.mT, right, out_dtype=torch.float32, out=out)
        else:
            product_(left.mT.float(), right.float(), out)
        norms = norms_of(result)

    def redo(which: Tensor) -> Tensor:
        return products.made_again(rows, cols, which, result)

    return rounded_again_at_once(norms, sizes_of(rows, cols), positions, torch.float32, redo)


@proven("products", else_told="they are made by torch operations")
def products_run_on(device: torch.device) -> bool:
    """Whether products of small integers, which are exact, and their norms come out, again too; of three dtypes."""
    from dpcompile.kernels.triton import products

    rows = torch.arange(2.0 * 33 * 70, device=device).remainder(7).sub(3).reshape(2, 1, 33, 70)
    cols = torch.arange(2.0 * 33 * 19, device=device).remainder(5).sub(2).reshape(2, 1, 33, 19)
    wanted = rows.double().mT @ cols.double()
    norms, second = wanted.square().sum((1, 2, 3)), torch.tensor([False, True], device=device)
    for dtype in (torch.float32, *NARROW):
        left, right, out = rows.to(dtype), cols.to(dtype).mT.contiguous().mT, torch.full_like(wanted, torch.nan).float()
        found = products.product_with_squares(left, right, out)
        if not (torch.equal(found, norms) and torch.equal(out.double(), wanted)):
            return False
        again = products.made_again(left, right, second, out.zero_())
        if not torch.equal(again, norms * second) or not torch.equal(out[1].double(), wanted[1]) or out[0].any():
            return False
    return True


@torch.library.register_fake("dpcompile::product_with_norms")
def _(rows: Tensor, cols: Tensor, reuse: bool) -> tuple[Tensor, Tensor]:
    """Shapes only."""
    batch, blocks, _, p = rows.shape
    each = rows.new_empty(batch, blocks, p, cols.shape[-1], dtype=accumulation_dtype(rows.dtype))
    return each, rows.new_empty(batch, dtype=torch.float64)


@operator("product_norms", tags=_ANY_STRIDES)
def product_norms(rows: Tensor, cols: Tensor) -> Tensor:
    """The squared norms of :func:`product_with_norms` where the products are dropped: right or too large.

    Arguments and result as for :func:`dpcompile.kernels.norms_torch.direct_norm`, which it is, on all devices.
    """
    return direct_norm(rows, cols)


@torch.library.register_fake("dpcompile::product_norms")
def _(rows: Tensor, cols: Tensor) -> Tensor:
    """Shapes only."""
    return rows.new_empty(rows.shape[0], dtype=torch.float64)
