"""Cyclic Poisson sampling: examples are dealt out to parts once, and every draw is of one part, by turns.

Source: Choquette-Choo et al., "(Amplified) Banded Matrix Factorization" (NeurIPS 2023), algorithm 2, with parts that
each example falls into by itself, so that one example more moves no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpcompile.data.sampling import PoissonBatches, poisson_draw
from dpcompile.noise.counter import Stream
from dpcompile.noise.normal import uniform

__all__ = ["CyclicBatches", "deal"]

_AT_A_TIME = 2**20


def deal(seed: int, *, size: int, bands: int, secure: bool = False) -> list[Tensor]:
    """The indices of each part, ascending, int64: each of ``size`` is in one of ``bands`` parts.

    Args:
        seed: in [0, 2**64); with ``secure`` in [0, 2**256).
        size: of the dataset.
        bands: how many parts.
        secure: ChaCha20 instead of Philox.

    **Guarantee.** The result is a function of the arguments. Over a uniform seed each index is in each part with the
    same probability, independently of the others and of all draws. So parts differ in size, by about the root of it,
    and some may be empty.
    """
    parts = []
    for start in range(0, size, _AT_A_TIME):
        n = min(_AT_A_TIME, size - start)
        u = uniform(seed, step=0, stream=Stream.PARTS, numel=n, start=start, secure=secure)
        parts.append((u * bands).to(torch.int32).clamp_max_(bands - 1))
    part = torch.cat(parts)
    sizes = torch.bincount(part, minlength=bands).tolist()
    return list(torch.argsort(part, stable=True).split(sizes))


class CyclicBatches(PoissonBatches):
    """Requests of the logical steps: step t is a Poisson sample, at ``sample_rate``, of part t mod ``bands``.

    Args:
        bands: how many parts.
        **options: of :class:`dpcompile.data.sampling.PoissonBatches`.

    **Guarantee.** No index is in two of ``bands`` consecutive steps. In the steps of its part each is with probability
    ``sample_rate``, independently of all others and of other steps.
    """

    def __init__(self, *, bands: int, **options: Any) -> None:
        super().__init__(**options)
        self.bands = bands
        self._dealt: tuple[int, Sequence[Tensor]] | None = None  # for which seed

    def draw(self, seed: int, step: int) -> list[int]:
        """Indices of one logical step, ascending."""
        if self._dealt is None or self._dealt[0] != seed:
            self._dealt = seed, deal(seed, size=self.size, bands=self.bands, secure=self.secure)
        part = self._dealt[1][step % self.bands]
        assert not callable(self.sample_rate), "parts are drawn from at one rate"
        drawn = poisson_draw(seed, step=step, size=len(part), sample_rate=self.sample_rate, secure=self.secure)
        return part[torch.tensor(drawn, dtype=torch.int64)].tolist()
