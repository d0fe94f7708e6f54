"""The direct norm as a Triton kernel: a tile of the product in registers, squared, summed, forgotten.

Importing this module imports Triton.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpcompile.kernels.exact import settled_at_once, sizes_of
from dpcompile.kernels.rounding import TINY, gram_unit, linear_slack
from dpcompile.kernels.triton.common import WARPS, adding, index_type, power, precision, rounding_of, widened
from dpcompile.kernels.triton.products import made_again

__all__ = ["direct_norm"]


@triton.jit
def _kernel(
    rows,
    cols,
    sums,
    blocks,
    positions,
    p_size,
    d_size,
    rows_b,
    rows_k,
    rows_t,
    rows_p,
    cols_b,
    cols_k,
    cols_t,
    cols_d,
    TILE_P: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_T: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One program: one tile of one product, over all positions, to one number in ``sums``."""
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
    accumulator = tl.zeros((TILE_P, TILE_D), tl.float32)
    for start in range(0, positions, TILE_T):
        at = t + start
        in_t = at < positions
        left = tl.load(rows + p[:, None] * rows_p + at[None, :] * rows_t, mask=in_p[:, None] & in_t[None, :], other=0.0)
        right = tl.load(
            cols + at[:, None] * cols_t + d[None, :] * cols_d, mask=in_t[:, None] & in_d[None, :], other=0.0
        )
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
    tl.store(sums + program, tl.sum(tl.sum(accumulator * accumulator, 1), 0))


def direct_norm(rows: Tensor, cols: Tensor) -> Tensor:
    """See :func:`dpcompile.kernels.norms.direct_norm`. No size is zero, no operand wider than float32.

    Every program writes a number of its own and torch adds them, in float64: no atomics, the same result every time.
    Tiles are chosen from the sizes, and the positions are never divided between programs.

    **Guarantee.** What rounding may have moved, and what may have vanished in float32, is added; where that is not
    little the norm is taken in float64. Nothing waits for the device.
    """
    batch, blocks, positions, p_size = rows.shape
    d_size = cols.shape[-1]
    tile_p, tile_d = power(p_size, 64), power(d_size, 64)
    narrow = rows.element_size() == cols.element_size() == 2
    tile_t = power(positions, 64 if narrow else 32)
    if narrow and p_size >= 128 and d_size >= 128:
        tile_p = tile_d = 128
    products, warps = precision(rows), 8 if tile_p == tile_d == 128 else WARPS
    tiles = -(-p_size // tile_p) * -(-d_size // tile_d)
    sums = torch.empty(batch, blocks * tiles, dtype=torch.float32, device=rows.device)
    with torch.cuda.device_of(rows):
        cast(Any, _kernel)[(batch * blocks * tiles,)](
            rows,
            cols,
            sums,
            blocks,
            positions,
            p_size,
            d_size,
            *rows.stride(),
            *cols.stride(),
            TILE_P=tile_p,
            TILE_D=tile_d,
            TILE_T=tile_t,
            INDEX=index_type(rows, cols),
            PRECISION=products,
            WIDEN=widened(rows, cols),
            num_warps=warps,
            num_stages=3,
        )
    totals, sizes = sums.sum(1, dtype=torch.float64), sizes_of(rows, cols)
    elements = blocks * p_size * d_size
    unit = gram_unit(positions, torch.float32, rounding_of(rows, products))
    slack = linear_slack(totals, unit, sizes) + adding(max(tile_p, tile_d), warps) * totals
    slack += TINY * elements + linear_slack(totals, TINY * positions, torch.full_like(sizes, elements))
    slack = torch.where(sizes == 0, 0.0, slack)  # an example of zeros has nothing to lose
    return settled_at_once(totals, slack, sizes, positions, lambda which: made_again(rows, cols, which))
