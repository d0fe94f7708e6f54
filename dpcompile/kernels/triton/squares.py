"""Sums of squares as Triton kernels, in float64: of one tensor's last axis, and of many tensors' rows in one launch.

Importing this module imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpcompile.kernels.triton.table import NUMBERS, numbers_table, place_of, pointer, programs_of

__all__ = ["DTYPES", "norms_of_vectors", "squares_kernel", "squares_of", "vectors_kernel"]

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_TILE = 2048  # elements of a tile
_EXAMPLES = 8  # of a tile of vectors
_BUSY = 512  # programs that keep a GPU busy, about


@triton.jit
def _added(total, values):
    wide = values.to(tl.float64)
    return tl.fma(wide, wide, total)


@triton.jit
def squares_kernel(
    values, sums, second, rows, length, splits, piece, s0, s1, s2, s3, TILE_R: tl.constexpr, TILE_L: tl.constexpr
):
    """One program: ``piece`` numbers of each of some rows of one plane, to a number for each in ``sums``."""
    program, split = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(rows, TILE_R)
    plane, tile = (program // tiles).to(tl.int64), program % tiles
    r = tile.to(tl.int64) * TILE_R + tl.arange(0, TILE_R)
    lanes = tl.arange(0, TILE_L).to(tl.int64)
    begin = split.to(tl.int64) * piece
    end = tl.minimum(begin + piece, length)
    values += plane // second * s0 + plane % second * s1
    total = tl.zeros((TILE_R, TILE_L), tl.float64)
    for start in range(begin, end, TILE_L):
        at = start + lanes
        inside = (r < rows)[:, None] & (at < end)[None, :]
        total = _added(total, tl.load(values + r[:, None] * s2 + at[None, :] * s3, mask=inside, other=0.0))
    tl.store(sums + (plane * rows + r) * splits + split, tl.sum(total, 1), mask=r < rows)


@triton.jit
def vectors_kernel(table, count, sums, examples, DTYPE: tl.constexpr, TILE_B: tl.constexpr, TILE_L: tl.constexpr):
    """One program: some examples' vectors of one parameter.

    Rows of the table: programs, lengths, strides of examples, of elements, addresses.
    """
    program = tl.program_id(0)
    i, before = place_of(table, count, program)  # type: ignore
    own = table + NUMBERS + i
    length, stride_b, stride = tl.load(own + count), tl.load(own + 2 * count), tl.load(own + 3 * count)
    values = pointer(table, count, 4, i, DTYPE)
    b = (program - before).to(tl.int64) * TILE_B + tl.arange(0, TILE_B)
    lanes = tl.arange(0, TILE_L).to(tl.int64)
    total = tl.zeros((TILE_B, TILE_L), tl.float64)
    for start in range(0, length, TILE_L):
        at = start + lanes
        inside = (b < examples)[:, None] & (at < length)[None, :]
        total = _added(total, tl.load(values + b[:, None] * stride_b + at[None, :] * stride, mask=inside, other=0.0))
    tl.store(sums + i.to(tl.int64) * examples + b, tl.sum(total, 1), mask=b < examples)


def squares_of(values: Tensor) -> Tensor:
    """See :func:`dpcompile.kernels.squares.squares_of`; up to four axes. No atomics: the same result every time."""
    whole = values.reshape(*[1] * (4 - values.ndim), *values.shape)
    first, second, rows, length = whole.shape
    if not values.numel():
        return values.new_zeros(values.shape[:-1], dtype=torch.float64)
    tile_r = min(32, 1 << (rows - 1).bit_length())
    tile_l = _TILE // tile_r
    programs = first * second * -(-rows // tile_r)
    splits = max(1, min(-(-length // (4 * tile_l)), -(-_BUSY // programs)))
    piece = -(-length // splits)
    sums = torch.empty(*values.shape[:-1], splits, dtype=torch.float64, device=values.device)
    with torch.cuda.device_of(values):
        cast(Any, squares_kernel)[(programs, splits)](
            whole, sums, second, rows, length, splits, piece, *whole.stride(), TILE_R=tile_r, TILE_L=tile_l, num_warps=4
        )
    return sums[..., 0] if splits == 1 else sums.sum(-1)


def norms_of_vectors(each: Sequence[Tensor]) -> Tensor:
    """See :func:`dpcompile.kernels.kept.norms_of_vectors`: one launch."""
    batch = each[0].shape[0]
    sums = torch.empty(len(each), batch, dtype=torch.float64, device=each[0].device)
    if not batch:
        return sums
    strides = [[vectors.stride(axis) for vectors in each] for axis in (0, 1)]
    rows = [programs_of([batch] * len(each), _EXAMPLES), [v.shape[1] for v in each], *strides]
    table = numbers_table((), (), [*rows, [v.data_ptr() for v in each]], sums.device)
    with torch.cuda.device_of(sums):
        cast(Any, vectors_kernel)[(rows[0][-1],)](
            table,
            len(each),
            sums,
            batch,
            DTYPE=DTYPES[each[0].dtype],
            TILE_B=_EXAMPLES,
            TILE_L=_TILE // _EXAMPLES,
            num_warps=4,
        )
    return sums
