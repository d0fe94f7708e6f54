"""The symmetric ghost norm as a Triton kernel: a tile of each Gram matrix in registers, multiplied, summed, forgotten.

Importing this module imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpcompile.kernels.exact import settled_at_once
from dpcompile.kernels.rounding import TINY, gram_unit
from dpcompile.kernels.squares import squares_of
from dpcompile.kernels.triton.by_index import sums_and_sizes
from dpcompile.kernels.triton.common import WARPS, adding, index_type, power, precision, rounding_of, widened
from dpcompile.kernels.triton.products import made_again

__all__ = ["ghost_norm", "ghost_norm_one_hot"]


@triton.jit
def _pair(number, tiles):
    """The ``number``-th pair ``i <= j < tiles``: a rectangle where short rows of the triangle fill up the long ones."""
    even = 1 - tiles % 2
    width = tiles + even
    row, column = number // width, number % width
    in_long = column < tiles - row
    i = tl.where(in_long, row, tiles - even - row)
    j = tl.where(in_long, row + column, column - even)
    return i, j


@triton.jit
def _gram(
    side,
    first,
    second,
    positions,
    size,
    stride_t,
    stride_f,
    TILE_T: tl.constexpr,
    TILE_F: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """``[TILE_T, TILE_T]``: inner products of positions ``first`` with ``second``; zero beyond the last one."""
    features = tl.arange(0, TILE_F).to(INDEX)
    in_first, in_second = first < positions, second < positions
    gram = tl.zeros((TILE_T, TILE_T), tl.float32)
    for start in range(0, size, TILE_F):
        f = features + start
        in_f = f < size
        left = tl.load(
            side + first[:, None] * stride_t + f[None, :] * stride_f, mask=in_first[:, None] & in_f[None, :], other=0.0
        )
        right = tl.load(
            side + f[:, None] * stride_f + second[None, :] * stride_t,
            mask=in_f[:, None] & in_second[None, :],
            other=0.0,
        )
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        gram = tl.dot(left, right, gram, input_precision=PRECISION)
    return gram


@triton.jit
def _bound(gram, lengths, first, second, positions, unit):
    """``|gram| |a_t| |a_t'| unit``, for the lengths of the other side."""
    left = tl.load(lengths + first, mask=first < positions, other=0.0)
    right = tl.load(lengths + second, mask=second < positions, other=0.0)
    return tl.abs(gram) * (left[:, None] * unit) * right[None, :]


@triton.jit
def _write(sums, program, i, j, product, slack):
    weight = tl.where(i == j, 1.0, 2.0)
    tl.store(sums + 2 * program.to(tl.int64), weight * tl.sum(tl.sum(product, 1), 0))
    tl.store(sums + 2 * program.to(tl.int64) + 1, weight * tl.sum(tl.sum(slack, 1), 0))


@triton.jit
def _kernel(
    rows,
    cols,
    rows_lengths,
    cols_lengths,
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
    rows_unit,
    cols_unit,
    TILE_T: tl.constexpr,
    TILE_F: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One program: one pair of tiles of positions of one block of one example, to a sum and its slack in ``sums``."""
    program = tl.program_id(0)
    tiles = tl.cdiv(positions, TILE_T)
    pairs = tiles * (tiles + 1) // 2
    block, number = program // pairs, program % pairs
    b, k = (block // blocks).to(tl.int64), (block % blocks).to(tl.int64)
    i, j = _pair(number, tiles)
    first = (i * TILE_T + tl.arange(0, TILE_T)).to(INDEX)
    second = (j * TILE_T + tl.arange(0, TILE_T)).to(INDEX)
    rows += b * rows_b + k * rows_k
    cols += b * cols_b + k * cols_k
    r = _gram(rows, first, second, positions, p_size, rows_t, rows_p, TILE_T, TILE_F, INDEX, PRECISION, WIDEN)
    c = _gram(cols, first, second, positions, d_size, cols_t, cols_d, TILE_T, TILE_F, INDEX, PRECISION, WIDEN)
    offset = block.to(tl.int64) * positions
    slack = _bound(r, cols_lengths + offset, first, second, positions, cols_unit)
    slack += _bound(c, rows_lengths + offset, first, second, positions, rows_unit)
    _write(sums, program, i, j, r * c, slack)


@triton.jit
def _one_hot_kernel(
    index,
    cols,
    cols_lengths,
    sums,
    blocks,
    positions,
    d_size,
    index_b,
    index_t,
    cols_b,
    cols_k,
    cols_t,
    cols_d,
    cols_unit,
    TILE_T: tl.constexpr,
    TILE_F: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The same for one-hot rows: their Gram matrix says whether indices are equal, and where none are there is no work.

    Every position equals itself, so that values that are not finite are always seen.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(positions, TILE_T)
    pairs = tiles * (tiles + 1) // 2
    block, number = program // pairs, program % pairs
    b, k = (block // blocks).to(tl.int64), (block % blocks).to(tl.int64)
    i, j = _pair(number, tiles)
    first = (i * TILE_T + tl.arange(0, TILE_T)).to(INDEX)
    second = (j * TILE_T + tl.arange(0, TILE_T)).to(INDEX)
    index += b * index_b
    left = tl.load(index + first * index_t, mask=first < positions, other=0)
    right = tl.load(index + second * index_t, mask=second < positions, other=0)
    inside = (first < positions)[:, None] & (second < positions)[None, :]
    equal = ((left[:, None] == right[None, :]) & inside).to(tl.float32)
    product = tl.zeros((TILE_T, TILE_T), tl.float32)
    slack = tl.zeros((TILE_T, TILE_T), tl.float32)
    if tl.max(tl.max(equal, 1), 0) > 0:
        cols += b * cols_b + k * cols_k
        c = _gram(cols, first, second, positions, d_size, cols_t, cols_d, TILE_T, TILE_F, INDEX, PRECISION, WIDEN)
        product = equal * c
        slack = _bound(equal, cols_lengths + block.to(tl.int64) * positions, first, second, positions, cols_unit)
    _write(sums, program, i, j, product, slack)


def ghost_norm(rows: Tensor, cols: Tensor) -> Tensor:
    """See :func:`dpcompile.kernels.norms.ghost_norm`. No size is zero, no operand wider than float32.

    **Guarantee.** ``|R| slack_C + slack_R |C|`` bounds what rounding moves, for the products that the kernel takes and
    for its way to add: a thread adds its elements of a tile one after the other, and programs are added by torch in
    float64, without atomics. What vanishes in float32 is in the bound too. Where it is not little, the example is done
    again in float64. Nothing waits for the device.
    """
    tile, warps = _tile(rows, cols)
    batch, blocks, positions, _ = rows.shape
    products = precision(rows)
    sums = _sums(rows, blocks, positions, tile)
    lengths = [squares_of(side).sqrt() for side in (rows, cols)]
    with torch.cuda.device_of(rows):
        cast(Any, _kernel)[(sums.shape[0] * sums.shape[1],)](
            rows,
            cols,
            *(n.float().contiguous() for n in lengths),
            sums,
            blocks,
            positions,
            rows.shape[-1],
            cols.shape[-1],
            *rows.stride(),
            *cols.stride(),
            gram_unit(rows.shape[-1], torch.float32, rounding_of(rows, products)),
            gram_unit(cols.shape[-1], torch.float32, rounding_of(cols, products)) + adding(tile, warps),
            TILE_T=tile,
            TILE_F=_features(rows, cols),
            INDEX=index_type(rows, cols),
            PRECISION=products,
            WIDEN=widened(rows) or widened(cols),
            num_warps=warps,
            num_stages=3,
        )
    r, c = (n.sum(2).square().sum(1) for n in lengths)
    lost = 2 * TINY * (cols.shape[-1] * r + rows.shape[-1] * c + blocks * positions**2)
    sizes = (lengths[0] * lengths[1]).sum(2).square().sum(1)
    return _settled(sums, lost, sizes, positions, lambda which: made_again(rows, cols, which))


def ghost_norm_one_hot(index: Tensor, cols: Tensor) -> Tensor:
    """See :func:`dpcompile.kernels.norms.ghost_norm_one_hot`, and :func:`ghost_norm` for the guarantee."""
    tile, warps = _tile(cols, most=64)
    _, blocks, positions, d_size = cols.shape
    products = precision(cols)
    sums = _sums(cols, blocks, positions, tile)
    lengths = squares_of(cols).sqrt()
    with torch.cuda.device_of(cols):
        cast(Any, _one_hot_kernel)[(sums.shape[0] * sums.shape[1],)](
            index,
            cols,
            lengths.float().contiguous(),
            sums,
            blocks,
            positions,
            d_size,
            *index.stride(),
            *cols.stride(),
            gram_unit(d_size, torch.float32, rounding_of(cols, products)) + adding(tile, warps),
            TILE_T=tile,
            TILE_F=_features(cols),
            INDEX=index_type(index, cols),
            PRECISION=products,
            WIDEN=widened(cols),
            num_warps=warps,
            num_stages=3,
        )
    sizes = lengths.sum(2).square().sum(1)
    lost = torch.full_like(sizes, 2 * TINY * (d_size + 1) * blocks * positions**2)
    return _settled(sums, lost, sizes, positions, lambda which: _by_index(index, cols, which))


def _by_index(index: Tensor, cols: Tensor, which: Tensor) -> Tensor:
    return torch.stack([sums_and_sizes(index, cols[:, k], which)[0] for k in range(cols.shape[1])]).sum(0)


def _tile(*sides: Tensor, most: int = 128) -> tuple[int, int]:
    """Positions per tile, and warps, from the sizes and dtypes alone: so many that no register is spilled."""
    positions = sides[0].shape[2]
    if positions >= 512 and most >= 128 and all(s.element_size() == 2 for s in sides):
        return 128, 4 * WARPS
    tile = power(positions, 64)
    return tile, 2 * WARPS if tile == 64 else WARPS


def _features(*sides: Tensor) -> int:
    narrow = all(s.element_size() == 2 for s in sides)
    return power(max(s.shape[-1] for s in sides), 64 if narrow else 32)


def _sums(side: Tensor, blocks: int, positions: int, tile: int) -> Tensor:
    """``[B, programs of an example, 2]``: a sum and its slack for every program."""
    tiles = -(-positions // tile)
    return torch.empty(side.shape[0], blocks * (tiles * (tiles + 1) // 2), 2, dtype=torch.float32, device=side.device)


def _settled(sums: Tensor, lost: Tensor, sizes: Tensor, positions: int, exact: Callable[[Tensor], Tensor]) -> Tensor:
    totals, slack = sums.double().sum(1).unbind(1)
    # An example of zeros has nothing to lose.
    slack = torch.where(sizes == 0, 0.0, 1.001 * slack + lost)
    return settled_at_once(totals, slack, sizes, positions, exact)
