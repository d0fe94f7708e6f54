"""Every example's product as Triton kernels: kept with its norm, and in float64 where that is asked for.

Importing this module imports Triton.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpcompile.kernels.rounding import FMA
from dpcompile.kernels.triton.common import WARPS, index_type, power, widened

__all__ = ["again_kernel", "made_again", "product_kernel", "product_with_squares"]

_TILE = 32  # of a product in float64


@triton.jit
def _squares(values):
    """The sum of squares of a tile, in float64."""
    wide = values.to(tl.float64)
    return tl.sum(tl.sum(wide * wide, 1), 0)


@triton.jit
def product_kernel(
    rows, cols, products, sums, blocks, positions, p_size, d_size, rows_b, rows_k, rows_t, rows_p, cols_b, cols_k,
    cols_t, cols_d, TILE_P: tl.constexpr, TILE_D: tl.constexpr, TILE_T: tl.constexpr, INDEX: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program: one tile of one product, written, and the sum of its squares."""
    program = tl.program_id(0)
    tiles_d = tl.cdiv(d_size, TILE_D)
    tiles = tl.cdiv(p_size, TILE_P) * tiles_d
    product, tile = program // tiles, program % tiles
    b, k = (product // blocks).to(tl.int64), (product % blocks).to(tl.int64)
    p = ((tile // tiles_d) * TILE_P + tl.arange(0, TILE_P)).to(INDEX)
    d = ((tile % tiles_d) * TILE_D + tl.arange(0, TILE_D)).to(INDEX)
    t = tl.arange(0, TILE_T).to(INDEX)
    rows += b * rows_b + k * rows_k
    cols += b * cols_b + k * cols_k
    in_p, in_d = p < p_size, d < d_size
    total = tl.zeros((TILE_P, TILE_D), tl.float32)
    for start in range(0, positions, TILE_T):
        at = t + start
        in_t = at < positions
        left = tl.load(rows + p[:, None] * rows_p + at[None, :] * rows_t, mask=in_p[:, None] & in_t[None, :], other=0.0)
        right = tl.load(
            cols + at[:, None] * cols_t + d[None, :] * cols_d, mask=in_t[:, None] & in_d[None, :], other=0.0
        )
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    products += product.to(tl.int64) * p_size * d_size
    place = p.to(tl.int64)[:, None] * d_size + d[None, :]
    tl.store(products + place, total, mask=in_p[:, None] & in_d[None, :])
    tl.store(sums + program, _squares(total))


@triton.jit
def again_kernel(
    rows, cols, which, products, sums, blocks, positions, p_size, d_size, rows_b, rows_k, rows_t, rows_p, cols_b,
    cols_k, cols_t, cols_d, KEEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: one tile of one product in float64, if ``which`` has its example; rounded once where it is kept."""
    program = tl.program_id(0)
    tiles_d = tl.cdiv(d_size, TILE)
    tiles = tl.cdiv(p_size, TILE) * tiles_d
    product, tile = program // tiles, program % tiles
    b, k = (product // blocks).to(tl.int64), (product % blocks).to(tl.int64)
    if tl.load(which + b) != 0:
        p = (tile // tiles_d).to(tl.int64) * TILE + tl.arange(0, TILE)
        d = (tile % tiles_d).to(tl.int64) * TILE + tl.arange(0, TILE)
        rows += b * rows_b + k * rows_k
        cols += b * cols_b + k * cols_k
        total = tl.zeros((TILE, TILE), tl.float64)
        for _ in range(0, positions):
            left = tl.load(rows + p * rows_p, mask=p < p_size, other=0.0)
            right = tl.load(cols + d * cols_d, mask=d < d_size, other=0.0)
            total += left.to(tl.float32).to(tl.float64)[:, None] * right.to(tl.float32).to(tl.float64)[None, :]
            rows += rows_t
            cols += cols_t
        if KEEP:
            rounded = total.to(tl.float32)
            products += product.to(tl.int64) * p_size * d_size
            inside = (p < p_size)[:, None] & (d < d_size)[None, :]
            tl.store(products + p[:, None] * d_size + d[None, :], rounded, mask=inside)
            total = rounded.to(tl.float64)
        tl.store(sums + program, _squares(total))


def product_with_squares(rows: Tensor, cols: Tensor, products: Tensor) -> Tensor:
    """Write ``rows^T cols`` of every example and block, and give the squared norms of what was written.

    **Guarantee.** Products of bfloat16 and float16 numbers are exact, those of float32 numbers rounded as IEEE says;
    they are added up in float32, and squares in float64. No atomics: the same result every time.

    Args:
        rows: ``[B, K, T, P]``, none wider than float32; no size is zero.
        cols: ``[B, K, T, D]``.
        products: ``[B, K, P, D]``, float32, contiguous; memory of its own.

    Returns:
        ``[B]``, float64.
    """
    batch, blocks, positions, p_size = rows.shape
    d_size = cols.shape[-1]
    tile_p, tile_d = power(p_size, 64), power(d_size, 64)
    tiles = -(-p_size // tile_p) * -(-d_size // tile_d)
    sums = torch.empty(batch, blocks * tiles, dtype=torch.float64, device=rows.device)
    with torch.cuda.device_of(rows):
        cast(Any, product_kernel)[(batch * blocks * tiles,)](
            rows, cols, products, sums, blocks, positions, p_size, d_size, *rows.stride(), *cols.stride(),
            TILE_P=tile_p, TILE_D=tile_d, TILE_T=power(positions, 32), INDEX=index_type(rows, cols), PRECISION=FMA,
            WIDEN=widened(rows, cols), num_warps=WARPS, num_stages=3,
        )  # fmt: skip
    return sums.sum(1)


def made_again(rows: Tensor, cols: Tensor, which: Tensor, products: Tensor | None = None) -> Tensor:
    """Squared norms of some examples' products in float64; others cost a look at the mask.

    Args:
        rows: see :func:`product_with_squares`.
        cols: see there.
        which: ``[B]``, bool.
        products: where these examples' products are to be written, rounded; the norms are then of that.

    Returns:
        ``[B]``, float64; 0 for others.
    """
    batch, blocks, positions, p_size = rows.shape
    d_size = cols.shape[-1]
    tiles = -(-p_size // _TILE) * -(-d_size // _TILE)
    sums = torch.zeros(batch, blocks * tiles, dtype=torch.float64, device=rows.device)
    with torch.cuda.device_of(rows):
        cast(Any, again_kernel)[(batch * blocks * tiles,)](
            rows, cols, which.to(torch.int8), sums if products is None else products, sums, blocks, positions, p_size,
            d_size, *rows.stride(), *cols.stride(), KEEP=products is not None, TILE=_TILE, num_warps=WARPS,
        )  # fmt: skip
    return sums.sum(1)
