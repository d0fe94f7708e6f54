"""Poisson draws, truncated or not, and how a draw is cut into physical batches.

Sources: Abadi et al. 2016, section 2.2; for truncated draws arXiv:2508.15089, as dp-accounting has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dpcompile.data.padding import Request
from dpcompile.noise.counter import Stream
from dpcompile.noise.normal import uniform, uniform_at, uniforms

__all__ = ["PoissonBatches", "cut", "default_physical_batch_size", "kept", "poisson_draw", "poisson_draws"]

_TOGETHER = 1024  # numbers that are made at once, for several steps


def poisson_draw(seed: int, *, step: int, size: int, sample_rate: float, secure: bool = False) -> list[int]:
    """Indices drawn at one logical step: each of ``size`` independently with probability ``sample_rate``, ascending.

    The gaps between chosen indices are geometric, so the time is that of the draw, not of the dataset.

    Args:
        seed: in [0, 2**64); with ``secure`` in [0, 2**256).
        step: logical step, in [0, 2**32).
        size: of the dataset, at least 1.
        sample_rate: in (0, 1].
        secure: ChaCha20 instead of Philox.

    **Guarantee.** The result is a function of the arguments. Over a uniform seed each index is in it with probability
    ``sample_rate``, up to the rounding of float64, independently of the other indices and of other steps.

    ====================  =============================
    edge case             outcome
    ====================  =============================
    nothing drawn         an empty list: a step of noise
    ``sample_rate`` 1     every index
    ====================  =============================
    """
    if sample_rate >= 1:
        return list(range(size))
    at_a_time = _at_a_time(size * sample_rate)
    drawn, used = [-1], 0
    while drawn[-1] < size:
        u = uniform(seed, step=step, stream=Stream.SAMPLING, numel=at_a_time, start=used, secure=secure)
        drawn += _positions(u, drawn[-1], size, sample_rate)
        used += at_a_time
    return [i for i in drawn[1:] if i < size]


def poisson_draws(
    seed: int, *, steps: Sequence[int], size: int, sample_rate: float, secure: bool = False
) -> Iterator[list[int]]:
    """:func:`poisson_draw` of each of these steps. Their numbers are made together: few take as long as many.

    **Guarantee.** The very same draws: numbers are counters' in both, and what is made of a step's has its shape.
    """
    if sample_rate >= 1:
        yield from (list(range(size)) for _ in steps)
        return
    at_a_time = _at_a_time(size * sample_rate)
    together = max(1, _TOGETHER // at_a_time)
    for begin in range(0, len(steps), together):
        some = steps[begin : begin + together]
        numbers = uniforms(seed, steps=some, stream=Stream.SAMPLING, numel=at_a_time, secure=secure)
        for step, u in zip(some, numbers, strict=True):
            drawn = _positions(u, -1, size, sample_rate)
            if drawn[-1] < size:
                drawn = poisson_draw(seed, step=step, size=size, sample_rate=sample_rate, secure=secure)
            yield [i for i in drawn if i < size]


def _positions(u: Tensor, last: int, size: int, sample_rate: float) -> list[int]:
    """Where the next indices are, behind the last one, by a uniform number for each gap; beyond ``size``: none."""
    # P(gap >= k) = (1 - q)**k for u' = 1 - u uniform in (0, 1]; no gap needs to reach beyond the dataset
    gaps = torch.log(1 - u).div_(math.log1p(-sample_rate)).floor_().clamp_(0, size)
    return (last + torch.cumsum(gaps.to(torch.int64) + 1, 0)).tolist()


def _at_a_time(expected: float) -> int:
    """So many gaps that one pass nearly always reaches the end of the dataset."""
    return math.ceil(expected + 6 * math.sqrt(expected)) + 16


def kept(drawn: list[int], max_batch_size: int, *, seed: int, step: int, secure: bool = False) -> list[int]:
    """Of the drawn indices as many as the cap allows, chosen at random, ascending.

    Every index has a random number of its own in each step, and the smallest are kept.

    Args:
        drawn: at one logical step, ascending.
        max_batch_size: the cap.
        seed: as in :func:`poisson_draw`; the numbers are of another stream than the draws.
        step: logical step.
        secure: ChaCha20 instead of Philox.

    **Guarantee.** The result is a function of the arguments. Over a uniform seed it is, up to the rounding of float64,
    a uniform subset of what was drawn, independently of the draw and of other steps. One index less in the draw lets at
    most one other in, and puts none out.

    ==========================  ======================================
    edge case                   outcome
    ==========================  ======================================
    no more drawn than the cap  all of them
    equal numbers               the smaller index: odds of 2**-53
    ==========================  ======================================
    """
    if len(drawn) <= max_batch_size:
        return drawn
    places = torch.tensor(drawn, dtype=torch.int64)
    numbers = uniform_at(seed, step=step, stream=Stream.TRUNCATION, places=places, secure=secure)
    return places[torch.argsort(numbers, stable=True)[:max_batch_size]].sort().values.tolist()


def cut(
    indices: list[int],
    *,
    physical_batch_size: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
    whole: bool = False,
    room: int = 1,
) -> Iterator[Request]:
    """One logical batch as requests of ``physical_batch_size`` each; at least one, so that an empty draw is a step.

    With ``whole`` it is one request, of as many physical batches. There are as many as ``room`` examples take, at
    least: with the cap of truncated draws, which are never larger, always the same number.

    **Guarantee.** Over all ranks every index is in exactly one request, and every rank has as many requests, of the
    same sizes.
    """
    own = indices[rank::world_size]
    largest = -(-max(len(indices), room) // world_size)
    starts = range(0, largest, physical_batch_size)
    if whole:
        yield Request(own, len(starts) * physical_batch_size, step)
        return
    for part, start in enumerate(starts):
        taken = own[start : start + physical_batch_size]
        yield Request(taken, physical_batch_size, step, part, len(starts))


def default_physical_batch_size(expected_batch_size: float, size: int, cap: int | None = None) -> int:
    """Expected draw plus two standard deviations, up to the next multiple of 8, at most the dataset.

    With a cap on what a rank gets of a draw: the cap in equal parts, as few as are at most one and a half times as
    large. A draw in several parts runs each forward twice, for a third more work; one batch takes more memory.

    About one draw in forty-four needs a second physical batch. More room would pad every step to spare those few, less
    would split too many: between one and a half and two and a half deviations the work per step is within 5 per cent
    of the least.
    """
    deviation = math.sqrt(expected_batch_size * (1 - expected_batch_size / size))
    usual = min(math.ceil((expected_batch_size + 2 * deviation) / 8) * 8, size)
    return usual if cap is None else math.ceil(cap / math.ceil(cap / (1.5 * usual)))


class PoissonBatches:
    """The batch sampler behind a DataLoader: requests of the logical steps set by :meth:`cover`.

    Attributes:
        sample_rate: a number, or a function of the logical step.
    """

    def __init__(
        self,
        *,
        seed: int,
        size: int,
        sample_rate: float | Callable[[int], float],
        physical_batch_size: int,
        secure: bool = False,
        rank: int = 0,
        world_size: int = 1,
        max_batch_size: int | None = None,
    ) -> None:
        self.rank, self.world_size, self.max_batch_size = rank, world_size, max_batch_size
        self.seed, self.size, self.sample_rate, self.secure = seed, size, sample_rate, secure
        self.physical_batch_size = physical_batch_size
        self._steps, self._whole = range(0), False

    def cover(self, steps: range, *, whole: bool) -> None:
        """Set the logical steps of the next ``iter()``, and whether each is one request."""
        self._steps, self._whole = steps, whole

    def draw(self, seed: int, step: int) -> list[int]:
        """Indices of one logical step, ascending."""
        rate = self.sample_rate(step) if callable(self.sample_rate) else self.sample_rate
        drawn = poisson_draw(seed, step=step, size=self.size, sample_rate=rate, secure=self.secure)
        return self._kept(drawn, seed, step)

    def __iter__(self) -> Iterator[Request]:
        # bound now: a generator would read them at its first item
        return self._requests(self.seed, self._steps, self._whole)

    def _kept(self, drawn: list[int], seed: int, step: int) -> list[int]:
        if self.max_batch_size is None:
            return drawn
        return kept(drawn, self.max_batch_size, seed=seed, step=step, secure=self.secure)

    def _draws(self, seed: int, steps: range) -> Iterator[list[int]]:
        if getattr(self.draw, "__func__", None) is not PoissonBatches.draw or callable(self.sample_rate):
            return (self.draw(seed, step) for step in steps)
        numbers = {"size": self.size, "sample_rate": self.sample_rate, "secure": self.secure}
        drawn = poisson_draws(seed, steps=steps, **numbers)
        return (self._kept(one, seed, step) for step, one in zip(steps, drawn, strict=True))

    def _requests(self, seed: int, steps: range, whole: bool) -> Iterator[Request]:
        for step, drawn in zip(steps, self._draws(seed, steps), strict=True):
            yield from cut(
                drawn,
                physical_batch_size=self.physical_batch_size,
                step=step,
                rank=self.rank,
                world_size=self.world_size,
                whole=whole,
                room=self.max_batch_size or 1,
            )
