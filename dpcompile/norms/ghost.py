"""Squared norms of sums of outer products, without the products.

``|sum_t r_t c_t^T|^2 = sum_{t,t'} <r_t, r_t'> <c_t, c_t'>`` (Goodfellow 2015, arXiv:1510.01799, for T = 1; Li et al.
2022, arXiv:2110.05679, section 4, for T > 1; Bu et al. 2022, arXiv:2205.10683, for convolutions).

Shape letters as in :mod:`dpcompile.norms.factors`. Norms are ``[B]``, float64: no square is lost or overflows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpcompile.kernels.by_index import index_norms
from dpcompile.kernels.exact import kinds_of
from dpcompile.kernels.gram import certain_norms, gram, gram_norms

__all__ = ["Sides", "ghost", "merge", "outer"]


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


def outer(sides: Sides) -> Tensor:
    """T = 1: the norm of an outer product is the product of the norms, in float64.

    The square of a tiny cotangent would vanish in float32, though its product with a huge activation does not.
    """
    dense = sides.rows if sides.one_hot == "cols" else sides.cols
    squares = dense.double().square().sum(-1)
    if sides.one_hot is None:
        squares = squares * sides.rows.double().square().sum(-1)
    return squares.flatten(1).sum(1)


def merge(all_sides: Sequence[Sides]) -> list[Sides]:
    """Concatenate sites of one kind along T: their gradients add, and so do their positions."""
    merged = []
    for kind in (None, "rows", "cols"):
        same = [s for s in all_sides if s.one_hot == kind]
        if len(same) == 1 and kind is not None:  # as it lies: a look-up's cotangents may be expanded
            merged += same
        elif same:
            rows = torch.cat([s.rows for s in same], dim=1 if kind == "rows" else 2)
            cols = torch.cat([s.cols for s in same], dim=1 if kind == "cols" else 2)
            merged.append(Sides(rows, cols, kind))
    return merged


def ghost(all_sides: Sequence[Sides], panels: int = 1) -> Tensor:
    """Gram matrices of rows and columns, multiplied and summed; cross terms between sites of different kinds too.

    Where all sites have an index for one of their sides, what it selects is summed instead
    (:mod:`dpcompile.kernels.by_index`).

    Args:
        all_sides: of one parameter.
        panels: how many parts a Gram matrix is made in. It is symmetric, so a part is multiplied only with the
            positions up to its own: ``(panels + 1) / (2 panels)`` of the work.

    **Guarantee.** The result is right or too large, whatever the values: Gram matrices are float64, and an example
    whose terms cancel too far even for that is done again by its gradient (:mod:`dpcompile.kernels.gram`).

    Returns:
        ``[B]``, float64.
    """
    parts = merge(all_sides)
    if len(parts) == 1 and parts[0].one_hot is not None:
        return index_norms(*parts[0].by_index())
    if len(parts) == 1:
        totals, sizes = gram_norms(gram(parts[0].rows, panels), gram(parts[0].cols, panels), panels)
    else:
        totals, sizes = _of_kinds(parts, panels)
    kinds = kinds_of([part.one_hot for part in parts])
    return certain_norms(totals, sizes, [part.rows for part in parts], [part.cols for part in parts], kinds)


def _of_kinds(parts: Sequence[Sides], panels: int) -> tuple[Tensor, Tensor]:
    """The sum of all products, and the squared size, of sites of several kinds: there is one block."""
    total: Tensor | float = 0.0
    size: Tensor | float = 0.0
    for i, part in enumerate(parts):
        if part.one_hot is None:
            own, squared_size = gram_norms(gram(part.rows, panels), gram(part.cols, panels), panels)
            total, size = total + own, size + squared_size.sqrt()
        else:
            index, dense = part.by_index()
            total = total + index_norms(index, dense)
            size = size + dense.double().square().sum(-1).sqrt().sum(1)
        for other in parts[i + 1 :]:
            total = total + 2 * (_inner(part, other, "rows") * _inner(part, other, "cols")).sum((1, 2, 3))
    assert isinstance(total, Tensor) and isinstance(size, Tensor)
    return total, size.square()


def _inner(a: Sides, b: Sides, side: str) -> Tensor:
    """All inner products ``<a_t, b_t'>`` of rows or of columns, ``[B, K, T, T']``, float64."""
    left, right = (a.rows, b.rows) if side == "rows" else (a.cols, b.cols)
    if a.one_hot == side and b.one_hot == side:
        return (left.unsqueeze(2) == right.unsqueeze(1)).unsqueeze(1).double()
    if a.one_hot == side:
        return _pick(right, left).mT
    if b.one_hot == side:
        return _pick(left, right)
    return torch.matmul(left.double(), right.double().mT)


def _pick(dense: Tensor, index: Tensor) -> Tensor:
    """``dense[b, k, t, index[b, t']]`` as ``[B, K, T, T']``."""
    batch, blocks, positions, _ = dense.shape
    return dense.gather(3, index[:, None, None, :].expand(batch, blocks, positions, index.shape[1])).double()
