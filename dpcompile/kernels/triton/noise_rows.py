"""The next rows of correlated noise as one Triton kernel over all tensors: `dp_rows` of `kernels/cpp/gaussian.cpp`.

Importing this module imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpcompile.kernels.triton.normals import normals
from dpcompile.kernels.triton.table import NUMBERS, numbers_table, place_of, pointer, programs_of

__all__ = ["rows_", "rows_kernel"]

_BLOCK = 1024


@triton.jit
def rows_kernel(table, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """One program: all new rows of ``BLOCK`` elements of one tensor.

    The head of the table: first step, seed, rows made, more to make, rows kept. Its rows: programs, sizes, starts,
    tags, addresses. Behind them are the factors.
    """
    program = tl.program_id(0)
    i, before = place_of(table, count, program)  # type: ignore
    own = table + NUMBERS + i
    size, start = tl.load(own + count), tl.load(own + 2 * count)
    base = (program - before).to(tl.int64) * BLOCK - (start & 1)
    at = base + tl.arange(0, BLOCK)
    inside = (at >= 0) & (at < size)
    ring = pointer(table, count, 4, i, DTYPE)
    block = ((start + base) >> 1) + tl.arange(0, BLOCK // 2)
    tag = tl.load(own + 3 * count).to(tl.uint32)
    key0, key1 = tl.load(table + 1).to(tl.uint32), tl.load(table + 2).to(tl.uint32)
    first, made, more, kept = tl.load(table), tl.load(table + 3), tl.load(table + 4), tl.load(table + 5)
    factors = table + NUMBERS + 5 * count
    for row in range(made, made + more):
        z = normals(block, (first + row).to(tl.uint32), tag, key0, key1).to(DTYPE)
        y = z * tl.load(factors).to(tl.float64, bitcast=True).to(DTYPE)
        for back in range(1, kept + 1):
            factor = -tl.load(factors + back).to(tl.float64, bitcast=True).to(DTYPE)
            earlier = tl.load(ring + (row + kept - back) % kept * size + at, mask=inside, other=0.0)
            y = tl.fma(earlier, factor + tl.zeros_like(y), y)
        tl.debug_barrier()  # of threads that read what others write
        tl.store(ring + row % kept * size + at, y, mask=inside)
        tl.debug_barrier()


def rows_(
    rings: Sequence[Tensor],
    *,
    tags: Sequence[int],
    starts: Sequence[int],
    factors: Sequence[float],
    seed: int,
    first: int,
    made: int,
    more: int,
) -> None:
    """See :func:`dpcompile.kernels.gaussian.rows_`: one launch, which nothing waits for."""
    sizes = [ring.shape[1] for ring in rings]
    ends = programs_of([n + (start & 1) for n, start in zip(sizes, starts, strict=True)], _BLOCK)
    if not ends[-1]:
        return
    like = rings[0]
    table = numbers_table(
        [first, seed & 0xFFFFFFFF, seed >> 32, made, more, len(factors) - 1],
        (),
        [ends, sizes, starts, tags, [ring.data_ptr() for ring in rings]],
        like.device,
        factors,
    )
    with torch.cuda.device_of(like):
        cast(Any, rows_kernel)[(ends[-1],)](
            table,
            len(rings),
            DTYPE=tl.float64 if like.dtype == torch.float64 else tl.float32,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
