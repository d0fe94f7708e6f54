"""Norms of every example's gradient behind a linear function that works row by row (:mod:`dpcompile.norms.row_maps`).

In row o the gradient is ``h_o = s_o g_o + sum_jk w_jo C_jko <w_ko, g_o>``, with ``g = sum_t rows_t cols_t^T``. Its norm
is made of ``a_ko = <w_ko, g_o> = sum_t rows_to <w_ko, cols_t>``, products of parameters with the columns:

    ``|h|^2 = |s g|^2 + sum_o (2 s_o sum_j b_jo a_jo + sum_jl b_jo b_lo <w_jo, w_lo>)``, ``b_jo = sum_k C_jko a_ko``

and ``|s g|^2`` is a ghost norm (Li et al. 2022, arXiv:2110.05679, section 4), of rows times s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpcompile.kernels.exact import settled, sizes_of
from dpcompile.kernels.mapped_products import by_products
from dpcompile.kernels.operators import operator
from dpcompile.kernels.rounding import WIDE, gamma

__all__ = ["mapped_norms"]

_EXAMPLES = 2**21  # elements of columns and Gram matrices that exist at once in float64
_PARAMETERS = 2**19  # the same of a parameter
_ANY_STRIDES = (torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe)  # examples are counted that are done again


@operator("mapped_norms", tags=_ANY_STRIDES)
def mapped_norms(rows: Tensor, cols: Tensor, scale: Tensor, bases: Sequence[Tensor], mixed: Tensor) -> Tensor:
    """Squared norms ``[B]``, float64, of the gradients ``[B, P, D]`` behind the function; right or too large.

    **Guarantee.** Three ways, each for the examples of which the one before could not tell: by float32 products of the
    parameters (:mod:`dpcompile.kernels.mapped_products`); all in float64; by the gradient itself, which exists some
    rows at a time (:func:`dpcompile.kernels.exact.settled`). In float64, what roundings can move, in any order of
    additions, is at most ``gamma`` of the size ``L S``, where ``S = sum_t |rows_t| |cols_t|`` and ``L`` is the most
    that the function can make a row longer, by its absolute terms. Bases may be nearly constant: their means are taken
    from them first.

    ===========================================  ============================================
    edge case                                    outcome
    ===========================================  ============================================
    a gradient that the function makes zero      what a float32 sum of such terms leaves
    rows or columns that are not finite          not finite
    parameters that are not finite               not finite, for all examples
    ===========================================  ============================================

    Args:
        rows: ``[B, 1, T, P]``.
        cols: ``[B, 1, T, D]``.
        scale: ``s [P]``, float64.
        bases: ``w_k`` but for the first, which is a row of ones; of ``P D`` elements each.
        mixed: ``C [1 + bases, 1 + bases, P]``, float64.
    """
    quick = by_products(rows, cols, scale, bases, mixed)
    if quick is None:
        return _in_float64(rows, cols, scale, bases, mixed)
    return settled(*quick, redo=lambda which: _in_float64(rows[which], cols[which], scale, bases, mixed))


@torch.library.register_fake("dpcompile::mapped_norms")
def _(rows: Tensor, cols: Tensor, scale: Tensor, bases: Sequence[Tensor], mixed: Tensor) -> Tensor:
    """Shapes only."""
    return rows.new_empty(rows.shape[0], dtype=torch.float64)


def _in_float64(rows: Tensor, cols: Tensor, scale: Tensor, bases: Sequence[Tensor], mixed: Tensor) -> Tensor:
    """The same without float32 products."""
    batch, _, positions, p = rows.shape
    width = cols.shape[-1]
    tail = _centred(scale, [w.reshape(p, width) for w in bases], mixed, width)
    spread = sizes_of(rows, cols)
    sizes = tail.longest.square() * spread
    count = len(bases) + 1
    unit = gamma(3 * width + 2 * p + 4 * positions + count * (count + 2) + 32, WIDE)
    moved = unit * tail.longest + gamma(width + 4 * count + 8, WIDE) * tail.parts  # of a row's length
    each = max(1, positions * (width + p + positions))
    step = max(1, _EXAMPLES // each)
    parts = [_norms(rows[i : i + step, 0], cols[i : i + step, 0], tail) for i in range(0, batch, step)]
    squared = torch.cat(parts) if parts else rows.new_zeros(0, dtype=torch.float64)

    def redo(which: Tensor) -> Tensor:
        found = torch.stack([_directly(rows[i, 0], cols[i, 0], tail) for i in which.tolist()])
        return (found.sqrt() + moved * spread[which].sqrt()).square()

    return settled(squared, (2 * tail.longest + moved) * moved * spread, sizes, redo)


@dataclass(frozen=True, slots=True)
class _Tail:
    """The function, with bases that have no mean: ``w = c + m``, and the row of ones takes what is with ``m``.

    Attributes:
        scale: as above.
        weights: ``w [P, D]``.
        means: ``m [P]`` of each.
        mixed: ``C`` of the ones and the ``c``.
        inner: ``<c_j, c_l>`` of every row, ``[1 + bases, 1 + bases, P]``.
        longest: by how much a row may become longer.
        parts: the same by the terms that ``mixed`` was added up of.
    """

    scale: Tensor
    weights: Sequence[Tensor]
    means: Sequence[Tensor]
    mixed: Tensor
    inner: Tensor
    longest: Tensor
    parts: Tensor

    def blocks(self) -> list[slice]:
        """Rows that are widened at once."""
        p, width = self.scale.shape[0], self.weights[0].shape[1] if self.weights else 1
        return _blocks(p, width)

    def centred(self, rows: slice) -> list[Tensor]:
        """Some rows of every ``c``, float64."""
        return [w[rows].double() - m[rows].unsqueeze(1) for w, m in zip(self.weights, self.means, strict=True)]


def _blocks(p: int, width: int) -> list[slice]:
    step = max(1, _PARAMETERS // max(width, 1))
    return [slice(i, min(i + step, p)) for i in range(0, p, step)]


def _centred(scale: Tensor, weights: Sequence[Tensor], mixed: Tensor, width: int) -> _Tail:
    p, count = scale.shape[0], len(weights) + 1
    blocks = _blocks(p, width)
    means = [torch.cat([w[rows].double().mean(1) for rows in blocks]) for w in weights]
    total, parts = mixed.clone(), mixed.abs()
    for side in (0, 1):  # w_j = c_j + m_j, on both sides of C
        for k, mean in enumerate(means, 1):
            total.select(side, 0).add_(total.select(side, k) * mean)
            parts.select(side, 0).add_(parts.select(side, k) * mean.abs())
    inner = scale.new_zeros(count, count, p)
    inner[0, 0] = width
    found = _Tail(scale, weights, means, total, inner, scale.new_zeros(()), scale.new_zeros(()))
    lengths = scale.new_zeros(count, p)
    lengths[0] = float(width) ** 0.5
    for rows in blocks:
        wide = found.centred(rows)
        for j, a in enumerate(wide, 1):
            inner[0, j, rows] = inner[j, 0, rows] = a.sum(1)
            lengths[j, rows] = weights[j - 1][rows].double().square().sum(1).sqrt()
            for k, b in enumerate(wide[:j], 1):
                inner[j, k, rows] = inner[k, j, rows] = (a * b).sum(1)
    centred = inner.diagonal(dim1=0, dim2=1).T.sqrt()
    longest = ((total.abs() * centred.unsqueeze(1) * centred).sum((0, 1)) + scale.abs()).amax()
    most = ((parts * lengths.unsqueeze(1) * lengths).sum((0, 1)) + scale.abs()).amax()
    return replace(found, longest=longest, parts=most)


def _norms(rows: Tensor, cols: Tensor, tail: _Tail) -> Tensor:
    """Of some examples, by the sums above: ``[B]``."""
    rows, cols = rows.double(), cols.double()
    batch, positions, width = cols.shape
    scaled = rows * tail.scale
    total = (torch.bmm(scaled, scaled.mT) * torch.bmm(cols, cols.mT)).sum(2).sum(1)
    flat, ones = cols.reshape(batch * positions, width), cols.sum(2, keepdim=True)
    for block in tail.blocks():
        own = rows[..., block]
        sums = [(own * ones).sum(1)]
        for weight in tail.centred(block):
            seen = torch.mm(flat, weight.T).view(batch, positions, weight.shape[0])
            sums.append((own * seen).sum(1))
        of = torch.stack(sums, 1)  # a: [B, 1 + bases, rows]
        mix = (tail.mixed[..., block].unsqueeze(0) * of.unsqueeze(1)).sum(2)
        total = total + (2 * tail.scale[block] * mix * of).sum(1).sum(1)
        total = total + ((tail.inner[..., block].unsqueeze(0) * mix.unsqueeze(1)).sum(2) * mix).sum(1).sum(1)
    return total


def _directly(rows: Tensor, cols: Tensor, tail: _Tail) -> Tensor:
    """An example's squared norm by its gradient, some rows at a time."""
    total, cols = tail.scale.new_zeros(()), cols.double()
    for block in tail.blocks():
        each = rows[:, block].double().T @ cols
        wide = [torch.ones_like(each), *tail.centred(block)]
        of = torch.stack([(w * each).sum(1) for w in wide])
        mix = (tail.mixed[..., block] * of.unsqueeze(0)).sum(1)
        found = each * tail.scale[block].unsqueeze(1)
        for w, number in zip(wide, mix, strict=True):
            found = found + w * number.unsqueeze(1)
        total = total + found.square().sum()
    return total
