"""Squared norms of sums of outer products, without the products.

``|sum_t r_t c_t^T|^2 = sum_{t,t'} <r_t, r_t'> <c_t, c_t'>`` (Goodfellow 2015, arXiv:1510.01799, for T = 1; Li et al.
2022, arXiv:2110.05679, section 4, for T > 1; Bu et al. 2022, arXiv:2205.10683, for convolutions).

Shape letters as in :mod:`dpcompile.norms.factors`. Every function returns ``[B]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpcompile.kernels.rounding import gram_unit, products_on
from dpcompile.norms.gram_op import gram_norms
from dpcompile.norms.index_op import index_norms
from dpcompile.norms.products import product, quicker

__all__ = ["Sides", "direct", "ghost", "ghost_of_gram", "merge", "outer"]


@dataclass(frozen=True, slots=True)
class Sides:
    """Rows and columns of one site; a one-hot side is its index ``[B, T]``."""

    rows: Tensor
    cols: Tensor
    one_hot: str | None = None

    def by_index(self) -> tuple[Tensor, Tensor]:
        """The side that is an index, ``[B, T]``, and the other, ``[B, T, D]``."""
        index, dense = (self.rows, self.cols) if self.one_hot == "rows" else (self.cols, self.rows)
        return index, dense.squeeze(1)


@dataclass(frozen=True, slots=True)
class Gram:
    """All inner products ``<a_t, b_t'>`` of a side, and how far each may be off.

    Attributes:
        values: ``[B, K, T, T']``.
        left: ``[B, K, T]``, lengths times the unit of rounding; None where the products are exact.
        right: ``[B, K, T']``: a product is off by at most ``left_t right_t'``.
    """

    values: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def times(self, weight: Tensor) -> Gram:
        """With the columns weighed, ``[T']``."""
        return Gram(self.values * weight, self.left, None if self.right is None else self.right * weight)

    def slack(self) -> Tensor | None:
        """``[B, K, T, T']``."""
        return None if self.left is None or self.right is None else self.left.unsqueeze(-1) * self.right.unsqueeze(-2)


def outer(sides: Sides) -> Tensor:
    """T = 1: the norm of an outer product is the product of the norms."""
    squares = sides.cols.square().sum(-1)
    if sides.one_hot is None:
        squares = squares * sides.rows.square().sum(-1)
    return squares.flatten(1).sum(1)


def merge(all_sides: Sequence[Sides]) -> list[Sides]:
    """Concatenate sites of one kind along T: their gradients add, and so do their positions."""
    merged = []
    for kind in (None, "rows", "cols"):
        same = [s for s in all_sides if s.one_hot == kind]
        if same:
            rows = torch.cat([s.rows for s in same], dim=1 if kind == "rows" else 2)
            cols = torch.cat([s.cols for s in same], dim=1 if kind == "cols" else 2)
            merged.append(Sides(rows, cols, kind))
    return merged


def ghost(all_sides: Sequence[Sides], panels: int = 1) -> Tensor:
    """Gram matrices of rows and columns, multiplied and summed; cross terms between sites of different kinds too.

    Where all sites have an index for one of their sides, what it selects is summed instead
    (:mod:`dpcompile.norms.index_op`).

    Args:
        all_sides: of one parameter.
        panels: how many parts a Gram matrix is made in. It is symmetric, so a part is multiplied only with the
            positions up to its own: ``(panels + 1) / (2 panels)`` of the work, and one part's memory.

    **Guarantee.** The result is not below the true squared norm where terms cancel: rounding in the Gram matrices,
    ``|R - R'| <= slack_R`` and ``|C - C'| <= slack_C``, moves the sum of ``R C`` by at most ``|R| slack_C +
    slack_R |C|``, and that bound is added (see :func:`_inner`). Where cotangents and activations of different positions
    are not parallel, this is about ``eps (1 + T / sqrt(width)) sqrt(width)`` of the result.
    """
    parts = merge(all_sides)
    if len(parts) == 1 and parts[0].one_hot is not None:
        return index_norms(*parts[0].by_index())
    total: Tensor | None = None
    for i, a in enumerate(parts):
        for j in range(i, len(parts)):
            term = _symmetric(a, panels) if i == j else 2 * _sum(*_grams(a, parts[j]))
            total = term if total is None else total + term
    assert total is not None
    return total.clamp_min(0)


def ghost_of_gram(rows: Tensor, gram: Tensor, width: int | torch.SymInt) -> Tensor:
    """The same, where the Gram matrix of the columns is there already.

    Args:
        rows: ``[B, K, T, P]``.
        gram: ``[B, K, T, T]``.
        width: how many operations went into each of its inner products.
    """
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    unit = _rounding(gram, width)
    # The lengths are those of the matrix as it was rounded: the true ones may be longer by this much.
    columns = Gram(gram, unit / (1 - unit) * lengths, lengths)
    return _sum(_inner(rows, False, rows, False), columns).clamp_min(0)


def _symmetric(sides: Sides, panels: int) -> Tensor:
    """The norm of one kind of site, panel by panel: what lies left of the panel's own square counts twice."""
    axes = {"rows": 1 if sides.one_hot == "rows" else 2, "cols": 1 if sides.one_hot == "cols" else 2}
    positions = sides.rows.shape[axes["rows"]]
    total: Tensor | None = None
    for n in range(panels):
        start, end = positions * n // panels, positions * (n + 1) // panels

        def part(first: int, last: int) -> Sides:
            rows = sides.rows.narrow(axes["rows"], first, last - first)
            return Sides(rows, sides.cols.narrow(axes["cols"], first, last - first), sides.one_hot)

        own, before = part(start, end), part(0, end)
        rows, cols = _grams(own, before)
        if n:
            weight = torch.ones(end, dtype=torch.float32, device=rows.values.device)
            weight = torch.where(torch.arange(end, device=weight.device) < start, 2 * weight, weight)
            rows = rows.times(weight)
        term = _sum(rows, cols)
        total = term if total is None else total + term
    assert total is not None
    return total


def _grams(a: Sides, b: Sides) -> tuple[Gram, Gram]:
    rows = _inner(a.rows, a.one_hot == "rows", b.rows, b.one_hot == "rows")
    return rows, _inner(a.cols, a.one_hot == "cols", b.cols, b.one_hot == "cols")


def _sum(rows: Gram, cols: Gram) -> Tensor:
    """The sum of all products, plus how far it may be off: ``[B]``."""
    if quicker(rows.values) and quicker(cols.values):
        return gram_norms(rows.values, rows.left, rows.right, cols.values, cols.left, cols.right)
    both = rows.values * cols.values
    slack = torch.finfo(both.dtype).eps * both.abs()
    rows_slack, cols_slack = rows.slack(), cols.slack()
    if cols_slack is not None:
        slack = slack + rows.values.abs() * cols_slack
    if rows_slack is not None:
        slack = slack + rows_slack * cols.values.abs()
    # Two sums: the first may be negative, and it must not take the slack of the others with it.
    return both.flatten(1).sum(1) + slack.flatten(1).sum(1)


def direct(sides: Sides, tiles: int) -> Tensor:
    """Instantiate ``rows^T cols`` a tile of rows at a time, square and add; only one tile exists at once."""
    size = -(-sides.rows.shape[-1] // tiles)
    total: Tensor | None = None
    for part in sides.rows.split(size, dim=-1):
        term = product(part.mT, sides.cols).square().flatten(1).sum(1)
        total = term if total is None else total + term
    assert total is not None
    return total


def _inner(a: Tensor, a_one_hot: bool, b: Tensor, b_one_hot: bool) -> Gram:
    """All inner products ``<a_t, b_t'>``.

    A product of ``n`` terms that rounds each sum by ``u = eps / 2`` is off by ``sqrt(n) u |a_t| |b_t'|`` but for
    improbable alignments of the rounding (Higham and Mary 2019, doi:10.1137/18M1226312, theorem 2.4).
    """
    if a_one_hot and b_one_hot:
        return Gram((a.unsqueeze(2) == b.unsqueeze(1)).unsqueeze(1).to(torch.float32))
    if a_one_hot:
        return Gram(_pick(b, a).mT)
    if b_one_hot:
        return Gram(_pick(a, b))
    left = _rounding(a, a.shape[-1]) * a.square().sum(-1).sqrt()
    return Gram(product(a, b.mT), left, b.square().sum(-1).sqrt())


def _rounding(values: Tensor, width: int | torch.SymInt) -> float:
    return gram_unit(int(width), values.dtype, products_on(values.device))


def _pick(dense: Tensor, index: Tensor) -> Tensor:
    """``dense[b, k, t, index[b, t']]`` as ``[B, K, T, T']``."""
    batch, blocks, positions, _ = dense.shape
    return dense.gather(3, index[:, None, None, :].expand(batch, blocks, positions, index.shape[1]))
