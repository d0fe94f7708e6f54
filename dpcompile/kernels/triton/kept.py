"""Weighted sums over the examples of many tensors as one Triton kernel: the work of `kernels/cpp/kept.cpp`.

Importing this module imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpcompile.kernels.triton.squares import DTYPES
from dpcompile.kernels.triton.table import NUMBERS, numbers_table, place_of, pointer, programs_of

__all__ = ["sums_kernel", "weighted_sums"]

_COLUMNS, _EXAMPLES = 256, 8  # of a tile


@triton.jit
def sums_kernel(
    table, count, weights, examples, stride_g, stride_w, DTYPE: tl.constexpr, TILE_B: tl.constexpr, TILE_L: tl.constexpr
):
    """One program: some columns of one parameter, over all examples.

    Examples of weight 0 are not read. Rows of the table: programs, columns, strides of examples, of columns, rows of
    the weights, addresses, addresses of the results.
    """
    program = tl.program_id(0)
    i, before = place_of(table, count, program)  # type: ignore
    own = table + NUMBERS + i
    columns, stride_b, stride = tl.load(own + count), tl.load(own + 2 * count), tl.load(own + 3 * count)
    weights += tl.load(own + 4 * count) * stride_g
    values, results = pointer(table, count, 5, i, DTYPE), pointer(table, count, 6, i, DTYPE)
    at = (program - before).to(tl.int64) * TILE_L + tl.arange(0, TILE_L)
    lanes = tl.arange(0, TILE_B).to(tl.int64)
    total = tl.zeros((TILE_B, TILE_L), DTYPE)
    for start in range(0, examples, TILE_B):
        b = start + lanes
        weight = tl.load(weights + b * stride_w, mask=b < examples, other=0.0)
        inside = (weight != 0)[:, None] & (at < columns)[None, :]
        value = tl.load(values + b[:, None] * stride_b + at[None, :] * stride, mask=inside, other=0.0)
        total += weight[:, None] * value
    tl.store(results + at, tl.sum(total, 0), mask=at < columns)


def weighted_sums(weights: Tensor, rows: Sequence[int], flat: Sequence[Tensor]) -> list[Tensor]:
    """``sum_b weights[row, b] flat[b]`` of every tensor: ``[B, n]`` each to ``[n]``, in one launch.

    **Guarantee.** As of :func:`dpcompile.kernels.kept.weighted_sums`. No atomics: the same result every time.
    """
    results = [values.new_empty(values.shape[1]) for values in flat]
    ends = programs_of([values.shape[1] for values in flat], _COLUMNS)
    if not ends or not ends[-1]:
        return results
    strides = [[values.stride(axis) for values in flat] for axis in (0, 1)]
    addresses = [[x.data_ptr() for x in tensors] for tensors in (flat, results)]
    described = [ends, [values.shape[1] for values in flat], *strides, list(rows), *addresses]
    table = numbers_table((), (), described, weights.device)
    with torch.cuda.device_of(weights):
        cast(Any, sums_kernel)[(ends[-1],)](
            table,
            len(flat),
            weights,
            weights.shape[1],
            *weights.stride(),
            DTYPE=DTYPES[weights.dtype],
            TILE_B=_EXAMPLES,
            TILE_L=_COLUMNS,
            num_warps=4,
        )
    return results
