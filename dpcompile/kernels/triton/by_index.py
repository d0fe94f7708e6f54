"""Norms of sums by an index as a Triton kernel, in float64: the work of `kernels/cpp/by_index.cpp`.

Importing this module imports Triton.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpcompile.kernels.triton.squares import squares_of

__all__ = ["index_kernel", "sums_and_sizes"]

_TILE = 128


@triton.jit
def index_kernel(
    ordered, order, values, lengths, which, sums, sizes, positions, width, values_b, values_t, values_d,
    TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One program: some columns of one example, over its positions in the order of their index."""
    program = tl.program_id(0)
    tiles = tl.cdiv(width, TILE)
    b, tile = (program // tiles).to(tl.int64), program % tiles
    wanted = True
    if MASKED:
        wanted = tl.load(which + b) != 0
    if wanted:
        d = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
        columns = values + b * values_b + d * values_d
        ordered += b * positions
        order += b * positions
        lengths += b * positions
        sum_, total = tl.zeros((TILE,), tl.float64), tl.zeros((TILE,), tl.float64)
        length, size = tl.sum(sum_, 0), tl.sum(sum_, 0)
        for t in range(0, positions):
            at = tl.load(order + t)
            sum_ += tl.load(columns + at * values_t, mask=d < width, other=0.0).to(tl.float64)
            length += tl.load(lengths + at)
            own = tl.load(ordered + t)
            last = (t + 1 == positions) | (tl.load(ordered + t + 1, mask=t + 1 < positions, other=0) != own)
            total = tl.where(last, tl.fma(sum_, sum_, total), total)
            size = tl.where(last, size + length * length, size)
            sum_, length = tl.where(last, tl.zeros_like(sum_), sum_), tl.where(last, 0.0, length)
        tl.store(sums + program, tl.sum(total, 0))
        tl.store(sizes + b, size, mask=tile == 0)


def sums_and_sizes(index: Tensor, cotangents: Tensor, which: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`dpcompile.kernels.by_index.sums_and_sizes`; no atomics, and nothing waits for the device.

    Args:
        index: integers ``[B, T]``.
        cotangents: ``[B, T, D]``, any strides; no size is zero.
        which: ``[B]``, bool: of examples that are not in it the results are 0. None: all.
    """
    batch, positions, width = cotangents.shape
    ordered, order = index.sort(dim=1)
    lengths = squares_of(cotangents).sqrt().contiguous()
    tiles = -(-width // _TILE)
    sums = torch.zeros(batch, tiles, dtype=torch.float64, device=cotangents.device)
    sizes = torch.zeros(batch, dtype=torch.float64, device=cotangents.device)
    with torch.cuda.device_of(cotangents):
        cast(Any, index_kernel)[(batch * tiles,)](
            ordered.contiguous(), order.contiguous(), cotangents, lengths,
            sizes if which is None else which.to(torch.int8), sums, sizes, positions, width, *cotangents.stride(),
            TILE=_TILE, MASKED=which is not None, num_warps=1,
        )  # fmt: skip
    return sums.sum(1), sizes
