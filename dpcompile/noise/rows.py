"""Rows of correlated noise: y with C y = z, by forward substitution, some rows ahead of their use.

With a[0] = 1 / c[0] and a[j] = c[j] / c[0] the row of step t is ``a[0] z[t] - a[1] y[t-1] - ... - a[K] y[t-K]``,
K = b - 1, where rows before the block count as 0. K rows are kept of every element. They are made K at a time, in place
and while a part of them lies in a cache: so memory is read and written about once a step, and not K times.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpcompile.kernels import gaussian as native
from dpcompile.noise.counter import STEPS, Span, Stream, check_range, check_seed, counter_tag
from dpcompile.noise.mechanism import Release, pieces_of
from dpcompile.noise.normal import gaussians

__all__ = ["Place", "Rows", "places_of"]


@dataclass(frozen=True, slots=True)
class Place:
    """Elements of one parameter, on one device.

    Attributes:
        parameter: its index in the model.
        start: index of the first element in the whole parameter.
        numel: how many.
        dtype: of the rows.
        device: where they lie.
    """

    parameter: int
    start: int
    numel: int
    dtype: torch.dtype
    device: torch.device


def places_of(release: Release) -> tuple[list[Tensor], list[Place]]:
    """Views of the totals of a release, and where in its parameter each lies."""
    pieces, places = [], []
    for i, (total, parameter) in enumerate(zip(release.totals, release.parameters, strict=True)):
        for piece, start in pieces_of(total, None if release.runs is None else release.runs[i]):
            pieces.append(piece)
            places.append(Place(parameter, start, piece.numel(), piece.dtype, piece.device))
    return pieces, places


@dataclass(slots=True)
class _Ring:
    """``[K, numel]``: row r of block number ``block`` at r % K, for the last K rows that were ``made``."""

    values: Tensor
    block: int
    made: int = 0


class Rows:
    """The rows of one seed's noise, for the elements that were asked for last.

    Args:
        coefficients: c, b of them, 2 or more.
        restart: rows of a block.
        seed: see :func:`dpcompile.noise.gaussian`.
        secure: see there.

    **Guarantee.** :meth:`at` is a function of the arguments above, the step, and each element's place in its parameter:
    what was asked for before, in which parts, and by how many ranks, decides only how much has to be drawn. What
    :attr:`held` has is a copy of it, and may be dropped at any time.

    =================================================  ===============================================
    edge case                                          outcome
    =================================================  ===============================================
    the first row after a resumed run, or a new shard  the rows of its block are drawn again
    a parameter that was frozen, and is trained again  likewise, of this parameter
    steps left out                                     their rows are made, and not returned
    an earlier step                                    drawn again from the begin of the block, the same
    =================================================  ===============================================
    """

    def __init__(self, coefficients: Sequence[float], restart: int, seed: int, secure: bool) -> None:
        self._factors = [1 / coefficients[0], *(c / coefficients[0] for c in coefficients[1:])]
        self._kept, self._restart = len(coefficients) - 1, restart
        self._seed, self._secure = seed, secure
        self.held: dict[Place, _Ring] = {}

    def at(self, step: int, places: Sequence[Place]) -> list[Tensor]:
        """The row of a step: ``[numel]`` for each place, no two equal; to be read before the next call.

        Raises:
            PrivacyError: a step or a seed out of range.
        """
        check_seed(self._seed, secure=self._secure)
        check_range("logical step", step, STEPS)
        block, row = divmod(step, self._restart)
        self.held = {place: self._ring(place, block, row) for place in places}
        wanted = min((row // self._kept + 1) * self._kept, self._restart)
        while late := [place for place, ring in self.held.items() if ring.made < wanted]:
            made = min(self.held[place].made for place in late)
            together = [place for place in late if self.held[place].made == made]
            self._make(together, block, made, min(self._kept, wanted - made))
        return [self.held[place].values[row % self._kept] for place in places]

    def _ring(self, place: Place, block: int, row: int) -> _Ring:
        ring = self.held.get(place)
        if ring is None:
            values = torch.zeros(self._kept, place.numel, dtype=place.dtype, device=place.device)
            return _Ring(values, block)
        if ring.block != block or row < ring.made - self._kept:
            ring.values.zero_()
            return _Ring(ring.values, block)
        return ring

    def _make(self, places: Sequence[Place], block: int, made: int, more: int) -> None:
        first = block * self._restart
        check_range("logical step", first + made + more - 1, STEPS)
        for kind in {(p.dtype, p.device) for p in places}:
            own = [p for p in places if (p.dtype, p.device) == kind]
            rings = [self.held[p].values for p in own]
            if not self._secure and native.takes(rings):
                tags = [counter_tag(Stream.GRADIENT, p.parameter) for p in own]
                native.rows_(
                    rings, tags=tags, starts=[p.start for p in own], factors=self._factors, seed=self._seed,
                    first=first, made=made, more=more,
                )  # fmt: skip
            else:
                for row in range(made, made + more):
                    self._make_one(own, rings, first + row, row)
        for place in places:
            self.held[place].made = made + more

    def _make_one(self, places: Sequence[Place], rings: Iterable[Tensor], step: int, row: int) -> None:
        spans = [Span(p.parameter, p.numel, p.start) for p in places]
        dtype, device = places[0].dtype, places[0].device
        drawn = gaussians(self._seed, step=step, spans=spans, dtype=dtype, device=device, secure=self._secure)
        for ring, value in zip(rings, drawn, strict=True):
            value.mul_(self._factors[0])
            for j in range(1, self._kept + 1):
                value.sub_(ring[(row - j) % self._kept], alpha=self._factors[j])
            ring[row % self._kept].copy_(value)
