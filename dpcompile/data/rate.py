"""How often each example is drawn, and what of that depends on the size of the dataset."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dpcompile.accounting.arguments import number
from dpcompile.errors import PrivacyError

__all__ = ["SamplingRate"]


@dataclass(frozen=True, slots=True)
class SamplingRate:
    """The constants of Poisson sampling.

    Attributes:
        sample_rate: q, the chance of each example, independently, to be in a step; with parts, in one of its part.
        expected_batch_size: B, which divides the sums.
        steps: of one pass.
        from_size: whether one of them was taken from the size of the dataset: then they are other numbers with one
            example more, and the size is not protected.
    """

    sample_rate: float
    expected_batch_size: float
    steps: int
    from_size: bool

    @classmethod
    def given(
        cls, size: int, expected_batch_size: float | None, sample_rate: float | None, steps: int | None, bands: int = 1
    ) -> SamplingRate:
        """What the user gave; the rest from the size of the dataset, and in how many parts its examples take turns.

        Raises:
            PrivacyError: neither a batch size nor a rate, or numbers out of their range.
        """
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
            whole = "the size of the dataset" if bands == 1 else f"the size of the dataset over {bands} bands"
            interval = f"(0, {size / bands:g}] ({whole})" if sample_rate is None else "(0, inf)"
            raise PrivacyError(
                f"expected_batch_size is {expected_batch_size}, not in {interval}",
                remedy="give the mean size that a logical batch should have",
            )
        rate = sample_rate if sample_rate is not None else _number(expected_batch_size) * bands / size
        expected = expected_batch_size if expected_batch_size is not None else rate * size / bands
        if not math.isfinite(expected):
            raise PrivacyError(f"expected_batch_size is {expected}", remedy="give a finite number")
        if steps is None:
            steps = math.ceil(size / expected if sample_rate is None else bands / rate)
        return cls(rate, expected, steps, sample_rate is None or expected_batch_size is None)


def _number(x: Any) -> float:
    return math.nan if isinstance(x, bool) else number(x)
