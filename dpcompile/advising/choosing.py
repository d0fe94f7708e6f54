"""Batch size and length of a run for a target, by what noise costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from dpcompile.accounting.arguments import Method
from dpcompile.accounting.batch_sizes import better_batch_size
from dpcompile.accounting.calibration import calibrate_noise
from dpcompile.accounting.solving import solve
from dpcompile.errors import PrivacyError

__all__ = ["Run", "choose_run"]

_STEPS = 1000  # for which the length is chosen, if the user leaves it
_FEWEST_STEPS = 100  # below, fewer steps are likely to cost more than noise does
_EPOCHS = 3, 100  # the length is between these
_SMALLEST = 16  # a smaller batch is slow, and gains nothing
_SLACK = 2e-4  # twice the tolerance of a calibrated sigma


class Run(NamedTuple):
    """One training."""

    batch_size: int
    """Expected, of a logical step."""
    epochs: int
    """Passes over the data."""
    steps: int
    """Logical steps."""
    noise_multiplier: float
    """Sigma: with it all trainings of the sweep together meet the target."""
    epsilon: float
    """Of this training alone; it is what ``make_private`` is to be given as its target."""


def choose_run(
    dataset_size: int,
    target_epsilon: float,
    target_delta: float,
    numel: int,
    epochs: int | None,
    runs: int,
    method: Method = "pld",
) -> Run:
    """The length and the batch size at which the noise of the whole run is near its least.

    With so many steps T at a batch B that sigma grows as their root, the noise in the mean of all updates, sigma C /
    (B sqrt(T)), tends to C / (mu n): neither a larger batch nor more steps lessen it. That is where B * epochs =
    mu**2 n, and there it is about 1.2 times its least (mu of Gaussian DP for the target: Dong, Roth, Su 2022,
    "Gaussian differential privacy"; Bu, Dong, Long, Su 2020 for the approximation). The batch is the power of two next
    to that, in 100 steps at least.

    Args:
        dataset_size: n.
        target_epsilon: of all runs together.
        target_delta: likewise.
        numel: trainable numbers of the model.
        epochs: passes over the data; None: so many that about 1,000 steps are taken, 3 to 100.
        runs: trainings on the same data.
        method: of the accountant.

    Raises:
        PrivacyError: no batch size without a far better one was found.

    **Guarantee.** ``runs`` trainings of this sigma, rate and length meet the target by that accountant, as do as many
    whose sigma is calibrated for ``epsilon``; and
    :func:`dpcompile.accounting.batch_sizes.better_batch_size` knows none that is far better.
    """
    from dp_accounting import gaussian_mechanism

    mu = 1 / gaussian_mechanism.get_sigma_gaussian(target_epsilon, target_delta) / math.sqrt(runs)
    if epochs is None:
        epochs = min(max(math.ceil(mu * math.sqrt(_STEPS)), _EPOCHS[0]), _EPOCHS[1])
    longest = min(epochs * dataset_size / _FEWEST_STEPS, float(dataset_size))
    ideal = min(max(mu**2 * dataset_size / epochs, _SMALLEST), longest)
    for batch in _near(ideal, dataset_size):
        found = _run(batch, epochs, dataset_size, target_epsilon, target_delta, runs, method)
        advice = better_batch_size(
            noise_multiplier=found.noise_multiplier, target_epsilon=found.epsilon, target_delta=target_delta,
            sample_rate=batch / dataset_size, steps=found.steps, expected_batch_size=batch, numel=numel,
            method=method,
        )  # fmt: skip
        if advice is None:
            return found
    raise PrivacyError(
        f"of {dataset_size} examples and {epochs} epochs no batch size is near the best: each has one that is far "
        "better, in fewer or more steps",
        remedy="give other epochs=, or leave it out; plan_privacy compares batch sizes and lengths",
    )


def _near(size: float, most: int) -> Iterator[int]:
    """Powers of two, or all examples: the nearest first."""
    sizes = {min(2**k, most) for k in range(most.bit_length() + 1)}
    yield from sorted(sizes, key=lambda b: abs(math.log(b / max(size, 1.0))))


def _run(
    batch: int, epochs: int, size: int, target_epsilon: float, target_delta: float, runs: int, method: Method
) -> Run:
    rate, steps = batch / size, epochs * math.ceil(size / batch)
    known: dict[str, Any] = {"target_delta": target_delta, "sample_rate": rate, "method": method}
    sigma = calibrate_noise(target_epsilon=target_epsilon, steps=runs * steps, **known)
    if runs == 1:
        return Run(batch, epochs, steps, sigma, target_epsilon)
    one = solve(noise_multiplier=sigma * (1 + _SLACK), steps=steps, **known)  # calibrated anew, sigma is no smaller
    return Run(batch, epochs, steps, sigma, one)
