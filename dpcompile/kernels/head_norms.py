"""Norms of every example's gradient of a head whose logits are made in parts (:mod:`dpcompile.kernels.head`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from dpcompile.graph.slices import accumulation_dtype
from dpcompile.kernels.by_index import index_norms
from dpcompile.kernels.exact import settled
from dpcompile.kernels.gram import gram, gram_norms
from dpcompile.kernels.head import class_parts, slopes
from dpcompile.kernels.products import blocked_product_
from dpcompile.kernels.rounding import WIDE, gamma, linear_slack, unit_of
from dpcompile.kernels.squares import squares_of

__all__ = ["head_norms"]

_ANY_STRIDES = (torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe)  # examples are counted that are done again
_Slack: TypeAlias = Callable[[Tensor, Tensor], Tensor]
_SHORT = 64  # positions whose Gram matrices cost nothing
_AT_ONCE = 2**22  # elements of Gram matrices, or of a gradient, that exist at once


@torch.library.custom_op("dpcompile::head_norms", mutates_args=(), tags=_ANY_STRIDES)
def head_norms(
    cotangent: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    totals: Tensor,
    of_bias: bool,
    index: Tensor | None,
    looked_up: Tensor | None,
) -> Tensor:
    """Squared norms of every example's :func:`dpcompile.kernels.head.head_sums`: ``[B]``, float64.

    By Gram matrices (Li et al. 2022, arXiv:2110.05679, section 4), those of the logits' gradients added up part by
    part, with the cross terms of a table that is the same parameter. Memory is that of a part's logits.

    Where an example has more positions than columns, by its gradient, a part at a time.

    **Guarantee.** Right or too large, whatever the values: what rounding may move is added, what it is likely to have
    moved in the logits too, which the sum makes anew, and an example whose terms cancel is done again in float64. NaN
    and infinity stay in their example.

    Args:
        cotangent: ``[B, T]``.
        hidden: ``[B, T, D]``.
        weight: ``[V, D]``.
        bias: ``[V]`` or None.
        labels: ``[B, T]``.
        totals: ``[B, T]``.
        of_bias: whether the norm is that of the bias.
        index: where ``weight`` is also a table that was looked up: integers in ``[0, V)``, ``[B, S]``.
        looked_up: the cotangents of what was found there, ``[B, S, D]``.
    """
    batch, positions, _ = hidden.shape
    squared = torch.empty(batch, dtype=torch.float64, device=hidden.device)
    longest = squares_of(weight).amax().sqrt()
    if bias is not None:
        longest = longest + bias.masked_fill(bias.isinf(), 0.0).abs().amax()  # a class may be masked
    for own in _groups(batch, positions, index):
        table = None if index is None or looked_up is None else (index[own], looked_up[own])
        rows = _Rows(cotangent[own], hidden[own], weight, bias, labels[own], totals[own], of_bias, table)
        squared[own] = rows.norms(longest)
    return squared


@head_norms.register_fake
def _(
    cotangent: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    totals: Tensor,
    of_bias: bool,
    index: Tensor | None,
    looked_up: Tensor | None,
) -> Tensor:
    """Shapes only."""
    return hidden.new_empty(hidden.shape[0], dtype=torch.float64)


def _groups(batch: int, positions: int, index: Tensor | None) -> list[slice]:
    """The examples, so many at a time that their Gram matrices are small."""
    each = positions * (positions + (0 if index is None else index.shape[1]))
    step = max(1, _AT_ONCE // max(1, each))
    return [slice(start, min(batch, start + step)) for start in range(0, batch, step)]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some examples, as :func:`head_norms` takes them; ``table`` is index and cotangents."""

    cotangent: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    totals: Tensor
    of_bias: bool
    table: tuple[Tensor, Tensor] | None

    def norms(self, longest: Tensor) -> Tensor:
        """``[b]``, float64; ``longest`` is what no row of ``weight`` is longer than, and no bias beyond."""
        columns = self.columns()
        positions, width = columns.shape[1:]
        by_grams = columns.device.type == "cpu" and positions <= max(width, _SHORT)
        total, slack, lengths = self._by_grams(columns) if by_grams else self._by_products(columns)
        rows = lengths * squares_of(columns).sqrt()
        size = rows.sum(1)
        if self.table is not None:
            size = size + squares_of(self.table[1]).sqrt().sum(1)
        found = settled(total, slack(total, size.square()), size.square(), self.redone)
        # A logit that is off by d moves a softmax p by 2 sqrt(2) d of the length of p - y at most.
        unsure = 2.83 * unit_of(columns.dtype) * (squares_of(self.hidden).sqrt() + 1) * longest
        return (found.sqrt() + (unsure * rows).square().sum(1).sqrt()).square()

    def _by_grams(self, columns: Tensor) -> tuple[Tensor, _Slack, Tensor]:
        """Squared norms, how far they may be off by squared norms and sizes, and the lengths of slopes ``[b, T]``."""
        batch, positions, width = columns.shape
        panels = 1 if positions < 64 else 4
        grams = columns.new_zeros(batch, 1, positions, positions, dtype=torch.float64)
        crossed = None if self.table is None else grams.new_zeros(batch, positions, self.table[0].shape[1])
        for part, slope in self.parts():
            grams += gram(slope.unsqueeze(1), panels)
            if self.table is not None and crossed is not None:
                place, inside = _places(self.table[0], part)
                picked = slope.gather(2, place.unsqueeze(1).expand(-1, positions, -1)).double()
                crossed += torch.where(inside.unsqueeze(1), picked, 0.0)
        total, _ = gram_norms(grams, gram(columns.unsqueeze(1), panels), panels)
        terms = self.weight.shape[0] + width + 2 * positions
        if self.table is not None and crossed is not None:
            index, cotangents = self.table
            inner = torch.bmm(columns.double(), cotangents.double().mT)
            total = total + index_norms(index, cotangents) + 2 * (inner * crossed).sum((1, 2))
            terms += index.shape[1]
        unit = gamma(terms + 8, WIDE)
        return total, lambda _, sizes: unit * sizes, grams[:, 0].diagonal(dim1=1, dim2=2).sqrt()

    def _by_products(self, columns: Tensor) -> tuple[Tensor, _Slack, Tensor]:
        """The same by the gradients, a part at a time."""
        batch, positions, width = columns.shape
        total = columns.new_zeros(batch, dtype=torch.float64)
        squares = columns.new_zeros(batch, positions, dtype=torch.float64)
        step, roundings = max(1, _AT_ONCE // width), 1
        for part, slope in self.parts():
            squares += squares_of(slope)
            for first in range(0, slope.shape[2], step):
                own = slope[:, :, first : first + step]
                each = columns.new_empty(own.shape[2], width)
                for b in range(batch):
                    roundings = blocked_product_(own[b].mT, columns[b], each)
                    if self.table is not None:
                        index, cotangents = self.table[0][b], self.table[1][b]
                        place, inside = _places(index, slice(part.start + first, part.start + first + len(each)))
                        each.index_add_(0, place, torch.where(inside.unsqueeze(1), cotangents, 0).to(each.dtype))
                    total[b] += squares_of(each).sum()
        unit = gamma(roundings + (0 if self.table is None else self.table[0].shape[1]), unit_of(columns.dtype))
        return total, lambda squared, sizes: linear_slack(squared, unit, sizes), squares.sqrt()

    def columns(self) -> Tensor:
        """What the slopes are multiplied with: ``[b, T, D]``, or ones; 0 where the cotangent is."""
        given = torch.ones_like(self.hidden[..., :1]) if self.of_bias else self.hidden
        dtype = accumulation_dtype(given.dtype)
        zero = torch.zeros((), dtype=dtype, device=given.device)
        return torch.where((self.cotangent == 0).unsqueeze(2), zero, given.to(dtype))

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Parts of the classes, and the gradients of their logits, ``[b, T, part]``."""
        shape = self.cotangent.shape
        cotangent, hidden, labels, totals = (
            x.flatten(0, 1) for x in (self.cotangent, self.hidden, self.labels, self.totals)
        )
        for part in class_parts(hidden, self.weight):
            slope = slopes(cotangent, hidden, self.weight, self.bias, labels, totals, part)
            yield part, slope.unflatten(0, shape)

    def redone(self, which: Tensor) -> Tensor:
        """Squared norms of some of the examples by their gradients, in float64."""
        given = (x[which] for x in (self.cotangent, self.hidden, self.labels, self.totals))
        cotangent, hidden, labels, totals = given
        table = None if self.table is None else (self.table[0][which], self.table[1][which])
        few = _Rows(cotangent, hidden, self.weight, self.bias, labels, totals, self.of_bias, table)
        columns = few.columns().double()
        squared, squares = columns.new_zeros(len(columns)), columns.new_zeros(columns.shape[:2])
        for part, slope in few.parts():
            squares += squares_of(slope)
            for b in range(len(squared)):
                each = slope[b].double().mT @ columns[b]
                if table is not None:
                    place, inside = _places(table[0][b], part)
                    each.index_add_(0, place, torch.where(inside.unsqueeze(1), table[1][b].double(), 0.0))
                squared[b] += each.square().sum()
        size = (squares.sqrt() * squares_of(columns).sqrt()).sum(1)
        terms = columns.shape[1]
        if table is not None:
            size, terms = size + squares_of(table[1]).sqrt().sum(1), terms + table[0].shape[1]
        return (squared.sqrt() + gamma(terms + 2, WIDE) * size).square()


def _places(index: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Where in a part of the classes each number is, and whether it is there."""
    inside = (index >= part.start) & (index < part.stop)
    return (index - part.start).clamp(0, part.stop - part.start - 1), inside
