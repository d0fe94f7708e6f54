"""How often each example is drawn, and what of that depends on the size of the dataset."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpcompile.accounting.arguments import number
from dpcompile.accounting.by_step import ByStep, RateSchedule
from dpcompile.errors import PrivacyError

__all__ = ["SamplingRate"]

_LONGEST = 2**20  # steps, of a pass whose length is sought
_KINDS = 32  # rates of truncated steps, each of which takes seconds to account for


@dataclass(frozen=True, slots=True)
class SamplingRate:
    """The numbers of Poisson sampling, where they are functions of the step those of step 0.

    Attributes:
        sample_rate: q, the chance of each example, independently, to be in a step; with parts, in one of its part.
        expected_batch_size: B, which divides the sums.
        steps: of one pass.
        from_size: whether one of them was taken from the size of the dataset: then they are other numbers with one
            example more, and the size is not protected.
        schedule: rate and expected batch size of every step; None: they are constants.
    """

    sample_rate: float
    expected_batch_size: float
    steps: int
    from_size: bool
    schedule: RateSchedule | None = None

    @property
    def largest(self) -> float:
        """The largest rate of a pass from step 0 on."""
        return self.sample_rate if self.schedule is None else max(map(self.schedule.sample_rate, range(self.steps)))

    @property
    def sizes(self) -> str:
        """The expected batch size, or between what it moves in a pass."""
        if self.schedule is None:
            return str(self.expected_batch_size)
        found = [self.schedule.expected_batch_size(step) for step in range(self.steps)]
        return f"{min(found):g} to {max(found):g} by the step"

    @classmethod
    def given(
        cls,
        size: int,
        expected_batch_size: float | Callable[[int], float] | None,
        sample_rate: float | Callable[[int], float] | None,
        steps: int | None,
        bands: int = 1,
        max_batch_size: int | None = None,
    ) -> SamplingRate:
        """What the user gave; the rest from the size of the dataset, and in how many parts its examples take turns.

        Raises:
            PrivacyError: neither a batch size nor a rate, or numbers out of their range; functions with ``bands``, or
                of many values with a cap.
        """
        if callable(expected_batch_size) or callable(sample_rate):
            if bands > 1:
                raise PrivacyError(
                    f"a batch size by the step, and noise that is correlated over {bands} steps: no bound is known for "
                    "rows of several sample rates",
                    remedy="give expected_batch_size a number, or leave bands out",
                )
            return _by_step(size, expected_batch_size, sample_rate, steps, max_batch_size)
        if expected_batch_size is None and sample_rate is None:
            raise PrivacyError(
                "neither expected_batch_size nor sample_rate is given",
                remedy="give the mean size that a logical batch should have, expected_batch_size=",
            )
        if sample_rate is not None and not 0 < _number(sample_rate) <= 1:
            raise PrivacyError(
                f"sample_rate is {sample_rate!r}, not in (0, 1]",
                remedy="give the chance of each example to be in a logical batch",
            )
        largest = math.inf if sample_rate is not None else size / bands
        if expected_batch_size is not None and not (0 < _number(expected_batch_size) <= largest):
            whole = "the size of the dataset, or its users" if bands == 1 else f"the size of each of {bands} parts"
            interval = f"(0, {size / bands:g}] ({whole})" if sample_rate is None else "(0, inf)"
            raise PrivacyError(
                f"expected_batch_size is {expected_batch_size}, not in {interval}",
                remedy="give the mean size that a logical batch should have, within this interval",
            )
        rate = sample_rate if sample_rate is not None else _number(expected_batch_size) * bands / size
        expected = expected_batch_size if expected_batch_size is not None else rate * size / bands
        if not math.isfinite(expected):
            raise PrivacyError(f"expected_batch_size is {expected}", remedy="give a finite number")
        if steps is None:
            steps = math.ceil(size / expected if sample_rate is None else bands / rate)
        return cls(rate, expected, steps, sample_rate is None or expected_batch_size is None)


def _by_step(
    size: int,
    expected: float | Callable[[int], float] | None,
    rate: float | Callable[[int], float] | None,
    steps: int | None,
    max_batch_size: int | None,
) -> SamplingRate:
    """As given, of functions: of the one that is left out, the ratio to the size."""
    whose = " (the size of the dataset)" if rate is None else ""
    sizes = rates = None
    if expected is not None:
        largest = float(size) if rate is None else math.inf
        sizes = ByStep(_function(expected), "expected_batch_size", largest=largest, whose=whose)
    if rate is not None:
        rates = ByStep(_function(rate), "sample_rate", largest=1.0)
    if rates is None:
        known = sizes
        assert known is not None
        rates = ByStep(lambda step: known(step) / size, "sample_rate", largest=1.0)
    found = RateSchedule(rates, sizes or ByStep(lambda step: rates(step) * size, "expected_batch_size"))
    length = _pass(rates) if steps is None else steps
    if isinstance(length, int):  # what is none is refused by the loader
        values = [found.at(step) for step in range(length)]
        kinds = len({value.sample_rate for value in values})
        if max_batch_size is not None and kinds > _KINDS:
            raise PrivacyError(
                f"max_batch_size is {max_batch_size}, and the steps of a pass have {kinds} sample rates: each takes "
                "seconds to account for, and it is not known that epsilon of truncated draws grows with the rate, so "
                "that they could be rounded to fewer",
                remedy=f"leave max_batch_size out, or let the batch size take {_KINDS} values at most",
            )
    first = found.at(0)
    return SamplingRate(*first, length, rate is None or expected is None, found)


def _function(given: float | Callable[[int], float]) -> Callable[[int], float]:
    return given if callable(given) else lambda step: given


def _pass(rates: Callable[[int], float]) -> int:
    """So many steps, from step 0 on, that an example is drawn once on average."""
    drawn = 0.0
    for step in range(_LONGEST):
        drawn += rates(step)
        if drawn >= 1 - 1e-9:
            return step + 1
    raise PrivacyError(
        f"{_LONGEST} steps draw an example {drawn:.3g} times on average: it is not known how long a pass is",
        remedy="give PoissonLoader steps=, how many are one pass",
    )


def _number(x: Any) -> float:
    return math.nan if isinstance(x, bool) else number(x)
