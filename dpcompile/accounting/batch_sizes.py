"""Whether another batch size would train with much less noise, or at much less compute, at the same epsilon.

Sources: Ponomareva et al. 2023, "How to DP-fy ML", and McKenna et al. 2025, "Scaling laws for differentially private
language models" (what noise costs is sigma over the batch size, and flattens); Bu, Dong, Long, Su 2020, "Deep learning
with Gaussian differential privacy", for the approximation by which sizes are tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from dpcompile.accounting.arguments import Method
from dpcompile.accounting.composition import composed_epsilon

__all__ = ["BatchSizeAdvice", "better_batch_size"]

_Error: TypeAlias = "Callable[[float, int], float]"  # of a batch size and a number of steps
_LESS_NOISE = 1.5  # so many times less is worth to be said, of the same compute
_LESS_COMPUTE, _SAME_NOISE = 4, 1.05  # so many times less, of the same noise but for this
_MARGIN = 1.1  # by which the approximation may be too small
_FLAT = 1.15  # where doubling the batch once more gains less, its gain is over
_FEWEST_STEPS = 100  # below, fewer steps are likely to cost more than noise does


class BatchSizeAdvice(NamedTuple):
    """A run of the same epsilon that is better than the one planned."""

    expected_batch_size: int
    """Of its logical steps."""
    steps: int
    """Logical steps."""
    noise: float
    """Its error over that of the planned run: noise and sampling in the mean of all its updates, RMS."""
    compute: float
    """Examples that it processes, over those of the planned run."""

    def __str__(self) -> str:
        where = "of the noise in the mean of all updates"
        if self.noise < 1:
            what = f"as many examples processed, and at most {math.ceil(100 * self.noise)} % {where}"
        else:
            what = f"{math.ceil(100 * self.compute)} % of the examples processed, and at most "
            what += f"{math.ceil(100 * self.noise - 1e-9)} % {where}"
        return f"{self.expected_batch_size:,} in {self.steps:,} steps: {what}"


def better_batch_size(
    *,
    noise_multiplier: float,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    expected_batch_size: float,
    numel: int,
    method: Method = "pld",
) -> BatchSizeAdvice | None:
    """The batch size to plan with instead, if there is one that is far better; in a few tenths of a second.

    Two things are looked for, both at the target. *Less noise for the same compute:* a larger batch in as many fewer
    steps, at least 100, whose error is at most 1 / 1.5 of the planned run's. *Less compute for the same noise:* a
    smaller batch in as many steps, a quarter at most, whose error is at most 5 per cent more. Errors are those of the
    mean of all updates: ``sqrt((sigma**2 numel / B**2 + 1 / B) / steps)`` in units of C, where the first term is the
    noise, and the second what sampling adds at most, as no clipped gradient is longer than C: where sampling adds less,
    the other run is better than said.

    Sizes are tried, by powers of two, with the approximation of Gaussian DP for many steps. What is found is returned
    only if the noise that it would have meets the target by a bound: for a larger batch Rényi's, else the accountant's.
    A run that follows it is not advised again.

    Args:
        noise_multiplier: sigma that was calibrated for the planned run.
        target_epsilon: above 0.
        target_delta: in (0, 1).
        sample_rate: q, of the planned run.
        steps: of the planned run.
        expected_batch_size: B, of the planned run.
        numel: trainable numbers of the model.
        method: of the accountant.

    **Guarantee.** The target is met, for "zero_out" and "add_remove", with a noise multiplier of which the error is
    what is returned.
    """
    from dp_accounting import gaussian_mechanism

    mu = 1 / gaussian_mechanism.get_sigma_gaussian(target_epsilon, target_delta)

    def error(size: float, steps: int) -> float:
        spread = (mu * expected_batch_size / (size * sample_rate)) ** 2 / steps
        return _error(1 / math.sqrt(math.log1p(spread)), size, steps, numel)

    size, length = _larger(error, expected_batch_size, steps, sample_rate)
    most = 1 / _LESS_NOISE
    if error(size, length) > most * error(expected_batch_size, steps):
        size, length = _smaller(error, expected_batch_size, steps), steps
        most = _SAME_NOISE
        if size * _LESS_COMPUTE > expected_batch_size:
            return None
    planned = _error(noise_multiplier, expected_batch_size, steps, numel)
    guess = error(size, length) / error(expected_batch_size, steps)
    for noise in sorted({min(guess * _MARGIN, most), most}):
        left = ((noise * planned) ** 2 * length - 1 / size) / numel
        run = size * math.sqrt(max(left, 0.0)), min(sample_rate * size / expected_batch_size, 1.0), length
        bound = "rdp" if size > expected_batch_size else method
        if composed_epsilon([run], target_delta, bound, "zero_out") <= target_epsilon:
            return BatchSizeAdvice(math.ceil(size), length, noise, size * length / (expected_batch_size * steps))
    return None


def _error(sigma: float, size: float, steps: int, numel: int) -> float:
    return math.sqrt(((sigma / size) ** 2 * numel + 1 / size) / steps)


def _larger(error: _Error, size: float, steps: int, sample_rate: float) -> tuple[float, int]:
    """Doubled, with half as many steps, as long as that gains something."""
    factor = 1
    while 2 * factor * sample_rate <= 1 and steps >= _FEWEST_STEPS * 2 * factor:
        now, then = (error(f * size, round(steps / f)) for f in (factor, 2 * factor))
        if now < _FLAT * then:
            break
        factor *= 2
    return factor * size, round(steps / factor)


def _smaller(error: _Error, size: float, steps: int) -> float:
    """Halved, with as many steps, as long as the error stays the same, nearly."""
    most, found = _SAME_NOISE * error(size, steps), size
    while found > 1 and error(half := math.ceil(found / 2), steps) <= most:
        found = half
    return found
