"""Gram matrices in float64, the sum over two of them, and norms that are certain, as operations.

``<A A^T, G G^T>`` is a sum of terms as large as ``S**2`` (:mod:`dpcompile.kernels.rounding`). A float32 inner product
of n terms may be off by ``n 2**-24`` of them, which is more than many norms are; in float64 it is nothing, and products
of float32 numbers are exact. As operations they are shared between parameters with one input.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from dpcompile.kernels.build import kernel
from dpcompile.kernels.exact import exact_norms, settled
from dpcompile.kernels.operators import operator
from dpcompile.kernels.rounding import WIDE, gamma

__all__ = ["certain_norms", "gram", "gram_norms"]

_AT_ONCE = 2**18  # elements of a side that are widened at once, on CPUs: they stay in the cache
_ANY_STRIDES = (torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe)  # examples are counted that are done again


@operator("gram", tags=_ANY_STRIDES)
def gram(side: Tensor, panels: int) -> Tensor:
    """All inner products of an example's positions, the lower part of them, in float64.

    Args:
        side: ``[B, K, T, P]``, any strides.
        panels: how many parts the matrix is made in. It is symmetric: a part's rows are multiplied with the positions
            up to its own last.

    Returns:
        ``[B, K, T, T]``, float64; anything to the right of a panel.
    """
    batch, blocks, positions, width = side.shape
    total = side.new_empty((batch, blocks, positions, positions), dtype=torch.float64)
    each = max(1, blocks * positions * width)
    step = max(1, _AT_ONCE // each) if side.device.type == "cpu" else max(1, batch)
    for first in range(0, batch, step):
        wide = side[first : first + step].double().flatten(0, 1)
        out = total[first : first + step].flatten(0, 1)
        for n in range(panels):
            start, end = positions * n // panels, positions * (n + 1) // panels
            if panels == 1:
                torch.bmm(wide, wide.mT, out=out)
            else:
                out[:, start:end, :end] = torch.bmm(wide[:, start:end], wide[:, :end].mT)
    return total


@torch.library.register_fake("dpcompile::gram")
def _(side: Tensor, panels: int) -> Tensor:
    """Shapes only."""
    batch, blocks, positions, _ = side.shape
    return side.new_empty((batch, blocks, positions, positions), dtype=torch.float64)


@operator("gram_norms")
def gram_norms(rows: Tensor, cols: Tensor, panels: int) -> tuple[Tensor, Tensor]:
    """``sum_tt' R_tt' C_tt'``, and the squared size of what it is the norm of.

    NaN and infinity stay what they are, in their example.

    Args:
        rows: ``R [B, K, T, T]``, as :func:`gram` makes it.
        cols: ``C``, the same.
        panels: of both.

    Returns:
        ``[B]`` twice, float64.
    """
    library = _library() if rows.device.type == "cpu" else None
    if library is not None:
        return _sums(library, rows, cols, panels)
    positions = rows.shape[2]
    total = rows.new_zeros(rows.shape[0])
    for n in range(panels):
        start, end = positions * n // panels, positions * (n + 1) // panels
        both = rows[:, :, start:end, :end] * cols[:, :, start:end, :end]
        by_row = 2 * both[..., :start].sum(-1) + both[..., start:].sum(-1)
        total = total + by_row.flatten(1).sum(1)
    lengths = rows.diagonal(dim1=2, dim2=3).sqrt() * cols.diagonal(dim1=2, dim2=3).sqrt()
    return total, lengths.sum(2).square().sum(1)


def _sums(library: ctypes.CDLL, rows: Tensor, cols: Tensor, panels: int) -> tuple[Tensor, Tensor]:
    rows, cols = rows.contiguous(), cols.contiguous()
    totals, sizes = rows.new_empty(rows.shape[0]), rows.new_empty(rows.shape[0])
    memory = [ctypes.c_void_p(x.data_ptr()) for x in (rows, cols)]
    numbers = [ctypes.c_int64(n) for n in (*rows.shape[:3], panels)]
    results = [ctypes.c_void_p(x.data_ptr()) for x in (totals, sizes)]
    library.dp_gram_norms(*memory, *numbers, *results, ctypes.c_int(torch.get_num_threads()))
    return totals, sizes


@kernel("gram")
def _library(library: ctypes.CDLL) -> bool:
    """Whether sums over small integers, which are exact, come out; nothing right of a panel is read."""
    lower = torch.arange(25.0, dtype=torch.float64).square().reshape(1, 1, 5, 5).tril()
    whole = lower + lower.tril(-1).mT
    wanted = (whole.square().sum((1, 2, 3)), whole.diagonal(dim1=2, dim2=3).sum(2).square().sum(1))
    right = lower.new_full((5, 5), torch.nan).triu(1)
    right[:2, :2] = whole[0, 0, :2, :2].triu(1)  # the first of two panels, and below it the second
    right[2:, 2:] = whole[0, 0, 2:, 2:].triu(1)
    panelled = lower + right
    both = (_sums(library, whole, whole, 1), _sums(library, panelled, panelled, 2))
    return all(torch.equal(found, value) for sums in both for found, value in zip(sums, wanted, strict=True))


@torch.library.register_fake("dpcompile::gram_norms")
def _(rows: Tensor, cols: Tensor, panels: int) -> tuple[Tensor, Tensor]:
    """Shapes only."""
    return rows.new_empty(rows.shape[0]), rows.new_empty(rows.shape[0])


@operator("certain_norms", tags=_ANY_STRIDES)
def certain_norms(totals: Tensor, sizes: Tensor, rows: Sequence[Tensor], cols: Sequence[Tensor], kinds: str) -> Tensor:
    """Squared norms from sums over Gram matrices, right or too large.

    **Guarantee.** Inner products and their sum round a term at most P + D + T (K + 1) + 8 times, which moves the total
    by at most ``gamma`` of the size. Where that is not little, the example is done again
    (:func:`dpcompile.kernels.exact.settled`).

    Args:
        totals: ``[B]``, float64, sums over Gram matrices of float64.
        sizes: ``[B]``, squared sizes.
        rows: of all sites, see :func:`dpcompile.kernels.exact.exact_norms`.
        cols: "
        kinds: "

    Returns:
        ``[B]``, float64.
    """
    one_hot = kinds.split(",")
    widths = [
        s.shape[-1]
        for side, index in ((rows, "rows"), (cols, "cols"))
        for s, kind in zip(side, one_hot, strict=True)
        if kind != index
    ]
    positions = sum(r.shape[1 if r.ndim == 2 else 2] for r in rows)
    blocks = max(s.shape[1] for side in (rows, cols) for s in side if s.ndim == 4)
    roundings = 2 * max(widths) + positions * (blocks + 1) + 8

    def redo(which: Tensor) -> Tensor:
        return exact_norms([r[which] for r in rows], [c[which] for c in cols], kinds)

    return settled(totals, gamma(roundings, WIDE) * sizes, sizes, redo)


@torch.library.register_fake("dpcompile::certain_norms")
def _(totals: Tensor, sizes: Tensor, rows: Sequence[Tensor], cols: Sequence[Tensor], kinds: str) -> Tensor:
    """Shapes only."""
    return torch.empty_like(totals)
