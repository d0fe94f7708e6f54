"""How much noise a target needs."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping

from dpcompile.accounting.arguments import (
    Method,
    Relation,
    check_bands,
    check_delta,
    check_mechanism,
    check_steps,
    check_target,
    number,
)
from dpcompile.accounting.by_step import ByStep
from dpcompile.accounting.composition import composed_epsilon
from dpcompile.accounting.events import rounds
from dpcompile.accounting.truncation import Truncation, check_truncated, no_bound_of_parts, sampled_at
from dpcompile.errors import PrivacyError
from dpcompile.progress import working

__all__ = ["calibrate_noise", "kinds_of_steps"]

_TOLERANCE = 1e-4  # of a calibrated noise multiplier, relative
_MOST_NOISE = 2.0**20
_COARSER = 8  # the grid on which the noise of truncated samples is sought first


@working("calibrating the noise")
def calibrate_noise(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float | Callable[[int], float],
    steps: int,
    method: Method = "pld",
    relation: Relation = "zero_out",
    bands: int = 1,
    schedule: Callable[[int], float] | None = None,
    truncation: Truncation | None = None,
) -> float:
    """The smallest noise multiplier, to a relative 1e-4, whose epsilon after ``steps`` is at most the target.

    Args:
        target_epsilon: more than 0.
        target_delta: in (0, 1); well below 1 / size of the dataset.
        sample_rate: in (0, 1]; with ``bands`` that of the loader, of the part whose turn it is. Or a function of the
            step, counted from 0, as ``loader.schedule.sample_rate`` is; not with ``bands``.
        steps: logical steps of the whole training, at least 1.
        method: of the accountant that will be used.
        relation: of that accountant.
        bands: of a mechanism with correlated noise (:class:`dpcompile.noise.banded.BandedMechanism`) and of its loader.
        schedule: what the result is multiplied by in step t, counted from 0 (:mod:`dpcompile.schedules`); None: 1.
        truncation: ``(dataset_size, max_batch_size)`` of a loader with a cap, ``loader.truncation``.

    Raises:
        PrivacyError: an argument out of its range, a factor that is not above 0, a target that no noise multiplier
            up to 2**20 reaches, or ``bands`` with a schedule, ``truncation`` or "replace_one".

    **Guarantee.** ``PrivacyAccountant(noise_multiplier=result, ...)`` with the same method, relation and truncation
    says at most ``target_epsilon`` at ``target_delta`` after ``steps``, each of the noise that the schedule gives it
    and of its rate, or after ``rounds(steps, bands)`` of them (:func:`dpcompile.accounting.events.rounds`).
    """
    check_target(target_epsilon)
    check_delta(target_delta)
    by_step = callable(sample_rate)
    check_mechanism(1.0, 1.0 if by_step else sample_rate)
    check_steps(steps)
    check_truncated(truncation, method, relation)
    check_bands(bands, relation)
    if bands > 1 and truncation is not None:
        raise no_bound_of_parts(truncation[1], bands)
    if steps == 0:
        raise PrivacyError(
            "steps is 0: nothing to calibrate", remedy="give the number of logical steps of the training"
        )
    if bands > 1 and (schedule is not None or by_step):
        raise PrivacyError(
            f"a schedule, and noise that is correlated over {bands} steps: no bound is known for rows of several sizes",
            remedy="leave out the one or the other",
        )
    steps = rounds(steps, bands)
    kinds = kinds_of_steps(schedule, sample_rate, steps)
    search = functools.partial(_smallest, target_epsilon, target_delta, kinds)
    if method == "pld" and len(kinds) > 1:  # Rényi's bound takes longer for each sigma
        return search(truncation, "pld", relation, 1.0, 2.0)
    # PLD is slow for little noise, so it starts from RDP's answer, which is fast and a few per cent above.
    factor = 1.1
    try:
        sigma = search(None, "rdp", "zero_out", 1.0, 2.0)
    except PrivacyError:  # Rényi's bound has a least epsilon, about log(1/delta) / 1000, whatever the noise
        if method == "rdp":
            raise
        sigma, factor = _MOST_NOISE, 2.0
    if method == "rdp":
        return sigma
    if truncation is None:
        return search(truncation, "pld", relation, sigma, factor)
    sigma = search(truncation, "pld", relation, sigma, factor, _COARSER)  # a step takes seconds on the fine grid
    return search(truncation, "pld", relation, sigma, 1.001)


def kinds_of_steps(
    schedule: Callable[[int], float] | None, sample_rate: float | Callable[[int], float], steps: int
) -> Mapping[tuple[float, float], int]:
    """How many steps there are of each factor of the noise and each rate."""
    if schedule is None and not callable(sample_rate):
        return {(1.0, sample_rate): steps}
    factor = _factor(schedule) if schedule is not None else lambda step: 1.0
    rate = ByStep(sample_rate, "sample_rate", largest=1.0) if callable(sample_rate) else lambda step: sample_rate
    return Counter((factor(step), rate(step)) for step in range(steps))


def _smallest(
    epsilon: float,
    delta: float,
    kinds: Mapping[tuple[float, float], int],
    truncation: Truncation | None,
    method: Method,
    relation: Relation,
    start: float,
    factor: float,
    coarser: int = 1,
) -> float:
    steps = sum(kinds.values())

    @functools.cache
    def spent(sigma: float) -> float:
        runs = [(sigma * f, sampled_at(q, truncation), n) for (f, q), n in kinds.items()]
        return composed_epsilon(runs, delta, method, relation, coarser=coarser)

    low = high = start
    while spent(high) > epsilon:
        low, high = high, high * factor
        if high > _MOST_NOISE:
            raise PrivacyError(
                f"no noise multiplier up to 2**20 gives epsilon {epsilon} at delta {delta} in {steps} steps"
                + (", by Rényi's bound" if method == "rdp" else ""),
                remedy="raise target_epsilon or target_delta, or "
                + ("take method='pld' (accountant='pld' in make_private)" if method == "rdp" else "train fewer steps"),
            )
    while low == high or spent(low) <= epsilon:
        high, low = low, low / factor
        if low < 2**-10:
            return high  # the target is so loose that next to no noise meets it
    return _between(spent, epsilon, low, high)


def _between(spent: Callable[[float], float], epsilon: float, low: float, high: float) -> float:
    """Where epsilon is met, of a ``low`` that does not meet it and a ``high`` that does.

    Epsilon is about a power of sigma: from the interpolation by such a power it is asked a little above and below.
    """
    at_low, at_high, aim = spent(low), spent(high), 1
    while high > low * (1 + _TOLERANCE):
        middle = math.sqrt(low * high)
        if 0 < at_high < at_low < math.inf and high < 2 * low:
            share = math.log(at_low / epsilon) / math.log(at_low / at_high)
            guess = low * (high / low) ** share * (1 + aim * _TOLERANCE / 3)
            middle = guess if low < guess < high else middle
        found = spent(middle)
        if found > epsilon:
            low, at_low, aim = middle, found, 1
        else:
            high, at_high, aim = middle, found, -1
    return high


def _factor(schedule: Callable[[int], float]) -> Callable[[int], float]:
    def checked(step: int) -> float:
        factor = number(schedule(step))
        if not 0 < factor < math.inf:
            raise PrivacyError(
                f"the schedule multiplies the noise of step {step} by {factor}: such a step would have none",
                remedy="give a schedule of finite numbers above 0",
            )
        return factor

    return checked
