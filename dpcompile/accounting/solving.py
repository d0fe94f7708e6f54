"""Any one of epsilon, noise multiplier, steps and sample rate, from the others."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from dpcompile.accounting.arguments import (
    Method,
    Relation,
    check_delta,
    check_mechanism,
    check_size,
    check_steps,
    check_target,
    number,
)
from dpcompile.accounting.calibration import calibrate_noise, kinds_of_steps
from dpcompile.accounting.composition import composed_epsilon
from dpcompile.accounting.truncation import Truncation, check_truncated, sampled_at
from dpcompile.errors import PrivacyError
from dpcompile.progress import working

__all__ = ["solve"]

_TOLERANCE = 1e-4  # of what is found, relative
_MOST_STEPS, _LEAST_RATE = 2**40, 1e-9


@working("calibrating a run")
def solve(
    *,
    target_delta: float,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
    steps: int | None = None,
    sample_rate: float | Callable[[int], float] | None = None,
    expected_batch_size: float | None = None,
    dataset_size: int | None = None,
    schedule: Callable[[int], float] | None = None,
    method: Method = "pld",
    relation: Relation = "zero_out",
    truncation: Truncation | None = None,
) -> float:
    """The one that is left out of epsilon, noise multiplier, steps and sample rate, from the others.

    Args:
        target_delta: in (0, 1); well below 1 / size of the dataset.
        target_epsilon: more than 0; left out, the epsilon is returned.
        noise_multiplier: sigma; left out, the smallest that meets the target is returned.
        steps: logical steps, at least 1; left out, the largest number that meets the target is returned, an int.
        sample_rate: in (0, 1]; left out, the largest that meets the target is returned. Or a function of the step,
            counted from 0, as ``loader.schedule.sample_rate`` is.
        expected_batch_size: with ``dataset_size``, in place of the sample rate, which is their ratio.
        dataset_size: number of examples.
        schedule: what sigma is multiplied by in step t, counted from 0 (:mod:`dpcompile.schedules`); None: 1.
        method: of the accountant that will be used.
        relation: of that accountant.
        truncation: of that accountant: ``(dataset_size, max_batch_size)`` of a loader with a cap.

    Raises:
        PrivacyError: not exactly one left out, an argument out of its range, a target that nothing meets, or a rate
            that is sought for a cap: it is not known that epsilon grows with it. A schedule or a rate by the step, if
            steps or sample rate are sought.

    **Guarantee.** With what is returned, ``PrivacyAccountant`` with the same method and relation says at most
    ``target_epsilon`` at ``target_delta``. What is returned is the best to a relative 1e-4: the next better one that
    was tried does not meet the target, and was no further away.

    ==============================================  ===================================================
    edge case                                       outcome
    ==============================================  ===================================================
    a target that one step or rate 1e-9 misses      refused
    a target that 2**40 steps, or rate 1, meet      2**40 steps, or rate 1
    noise 0                                         epsilon is infinity, no number of steps meets a target
    an expected batch size that is sought           a float, to be rounded down; at most the dataset's size
    ==============================================  ===================================================
    """
    check_delta(target_delta)
    check_truncated(truncation, method, relation)
    if schedule is not None or callable(sample_rate):
        numbers = (target_epsilon, noise_multiplier, steps, sample_rate, expected_batch_size, dataset_size)
        return _solved_by_step(target_delta, *numbers, schedule, method, relation, truncation)
    rate = _rate(sample_rate, expected_batch_size, dataset_size)
    given = {
        "target_epsilon": target_epsilon,
        "noise_multiplier": noise_multiplier,
        "steps": steps,
        "sample_rate": rate,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) != 1:
        raise PrivacyError(
            f"{' and '.join(missing)} are left out" if missing else "nothing is left out, so nothing is sought",
            remedy="leave out exactly one of target_epsilon, noise_multiplier, steps and sample_rate (or "
            "expected_batch_size, with dataset_size): the one to be found",
        )
    if truncation is not None:
        _refuse_no_sense(truncation, dataset_size, missing[0])
    check_mechanism(1.0 if noise_multiplier is None else noise_multiplier, 1.0 if rate is None else rate)
    _check_given(steps, target_epsilon)

    def spent(method: Method, relation: Relation, steps: int, rate: float) -> float:
        assert noise_multiplier is not None
        q = sampled_at(rate, truncation if method == "pld" else None)  # by Rényi's bound a search begins
        return composed_epsilon([(noise_multiplier, q, steps)], target_delta, method, relation)

    if target_epsilon is None:
        assert steps is not None and rate is not None
        return spent(method, relation, steps, rate)
    if noise_multiplier is None:
        assert steps is not None and rate is not None
        return calibrate_noise(
            target_epsilon=target_epsilon, target_delta=target_delta, sample_rate=rate, steps=steps, method=method,
            relation=relation, truncation=truncation,
        )  # fmt: skip
    if steps is None:
        assert rate is not None
        return _largest(lambda m, r, n: spent(m, r, int(n), rate), target_epsilon, method, relation, (1, _MOST_STEPS))
    size = dataset_size or 1
    ends = (_LEAST_RATE * size, float(size))
    return _largest(lambda m, r, b: spent(m, r, steps, b / size), target_epsilon, method, relation, ends)


def _check_given(steps: int | None, target_epsilon: float | None) -> None:
    if steps is not None:
        check_steps(steps)
    if steps == 0:
        raise PrivacyError("steps is 0: nothing is released", remedy="give 1 or more")
    if target_epsilon is not None:
        check_target(target_epsilon)


def _solved_by_step(
    target_delta: float,
    target_epsilon: float | None,
    noise_multiplier: float | None,
    steps: int | None,
    sample_rate: float | Callable[[int], float] | None,
    expected_batch_size: float | None,
    dataset_size: int | None,
    schedule: Callable[[int], float] | None,
    method: Method,
    relation: Relation,
    truncation: Truncation | None,
) -> float:
    """Epsilon or the noise multiplier, of steps that differ."""
    rate = sample_rate if callable(sample_rate) else _rate(sample_rate, expected_batch_size, dataset_size)
    if rate is None or steps is None or (target_epsilon is None) == (noise_multiplier is None):
        raise PrivacyError(
            "a schedule, or a sample rate by the step, and something else is sought than epsilon or noise_multiplier",
            remedy="give steps and sample_rate (a number or a function), and one of target_epsilon and "
            "noise_multiplier",
        )
    if callable(sample_rate) and (expected_batch_size, dataset_size) != (None, None):
        raise PrivacyError(
            "sample_rate by the step, and expected_batch_size or dataset_size: the rate is known without",
            remedy="leave expected_batch_size and dataset_size out",
        )
    if noise_multiplier is None:
        assert target_epsilon is not None
        return calibrate_noise(
            target_epsilon=target_epsilon, target_delta=target_delta, sample_rate=rate, steps=steps, method=method,
            relation=relation, schedule=schedule, truncation=truncation,
        )  # fmt: skip
    check_mechanism(noise_multiplier, 1.0 if callable(rate) else rate)
    _check_given(steps, None)
    kinds = kinds_of_steps(schedule, rate, steps)
    runs = [(noise_multiplier * f, sampled_at(q, truncation), n) for (f, q), n in kinds.items()]
    return composed_epsilon(runs, target_delta, method, relation)


def _refuse_no_sense(truncation: Truncation, dataset_size: int | None, missing: str) -> None:
    if dataset_size not in (None, truncation[0]):
        raise PrivacyError(
            f"truncation is of {truncation[0]} examples, and dataset_size is {dataset_size}",
            remedy="give truncation=(dataset_size, max_batch_size) with the same size",
        )
    if missing == "sample_rate":
        raise PrivacyError(
            "a sample rate is sought, for draws with a cap: it is not known that epsilon grows with it",
            remedy="give the rate and leave out another one; plan_privacy tells epsilon of several",
        )


def _rate(sample_rate: float | None, expected_batch_size: float | None, dataset_size: int | None) -> float | None:
    if dataset_size is None and expected_batch_size is not None:
        raise PrivacyError(
            "expected_batch_size without dataset_size", remedy="give both, or sample_rate, which is their ratio"
        )
    if dataset_size is None:
        return sample_rate
    check_size(dataset_size)
    if sample_rate is not None:
        raise PrivacyError(
            "sample_rate and dataset_size: the rate is known without",
            remedy="leave one of them out; with dataset_size the rate is expected_batch_size / dataset_size",
        )
    if expected_batch_size is None:
        return None
    if not 0 < number(expected_batch_size) <= dataset_size:
        raise PrivacyError(
            f"expected_batch_size is {expected_batch_size!r}, and dataset_size {dataset_size}",
            remedy="give a number above 0, up to dataset_size",
        )
    return expected_batch_size / dataset_size


def _largest(
    spent: Callable[[Method, Relation, float], float],
    epsilon: float,
    method: Method,
    relation: Relation,
    ends: tuple[float, float],
) -> float:
    """The largest that meets a target, of numbers that cost more the larger they are; whole ones if the ends are."""
    start, factor = math.sqrt(ends[0] * ends[1]), 4.0
    if method == "pld":  # from what Rényi's bound says, in no time and a little below
        try:
            start, factor = _largest(spent, epsilon, "rdp", "zero_out", ends), 1.1
        except PrivacyError:
            start = ends[0]
    whole = isinstance(ends[0], int)
    cost = functools.cache(functools.partial(spent, method, relation))
    rounded = (lambda x: min(max(round(x), ends[0]), ends[1])) if whole else (lambda x: min(max(x, ends[0]), ends[1]))
    low = high = rounded(start)
    if cost(low) <= epsilon:
        while cost(high) <= epsilon:
            if high == ends[1]:
                return high
            low, high = high, rounded(high * factor + whole)
            factor *= factor
    else:
        while cost(low) > epsilon:
            if low == ends[0]:
                raise PrivacyError(
                    f"{'one step' if whole else f'{low:g}'} alone costs epsilon {cost(low):.6g}, more than the target "
                    f"of {epsilon}",
                    remedy="raise target_epsilon, target_delta or noise_multiplier",
                )
            low, high = rounded(low / factor - whole), low
            factor *= factor
    return _between(cost, epsilon, low, high, whole)


def _between(cost: Callable[[float], float], epsilon: float, low: float, high: float, whole: bool) -> float:
    """Where epsilon is met, of a ``low`` that meets it and a ``high`` that does not."""
    aim = -1
    while high - low > max(whole, low * _TOLERANCE):
        middle, at_low, at_high = math.sqrt(low * high), cost(low), cost(high)
        if 0 < at_low < at_high < math.inf and high < 2 * low:
            share = math.log(epsilon / at_low) / math.log(at_high / at_low)
            guess = low * (high / low) ** share * (1 + aim * _TOLERANCE / 3)
            middle = guess if low < guess < high else middle
        if whole:
            middle = min(max(round(middle), low + 1), high - 1)
        if cost(middle) <= epsilon:
            low, aim = middle, 1
        else:
            high, aim = middle, -1
    return low
