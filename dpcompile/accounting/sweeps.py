"""What it costs to try several settings on the same data, and to keep the best."""

from __future__ import annotations

from typing import NamedTuple

from dpcompile.accounting.arguments import Method, check_delta, check_mechanism, check_steps, number
from dpcompile.accounting.composition import composed_epsilon
from dpcompile.accounting.events import sampled_gaussian
from dpcompile.errors import PrivacyError

__all__ = ["SweepCost", "sweep_cost"]


class SweepCost(NamedTuple):
    """Two ways to try settings, by what all that is learned from them costs."""

    runs: int
    """How many, or how many are expected."""
    composed: float
    """Epsilon of so many runs, all of whose weights and results may be seen or published."""
    random_number: float
    """Epsilon of a number of runs that is drawn from the geometric distribution of this mean, each with settings
    drawn at random from a list, of which the best one's weights and settings are all that anyone ever sees."""


def sweep_cost(
    *,
    runs: int,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    target_delta: float,
    method: Method = "pld",
) -> SweepCost:
    """Epsilon of ``runs`` trainings with the same noise on the same data, for relations "zero_out" and "add_remove".

    All of them together are a run of ``runs * steps`` steps. If only the best is seen, and how many there were is
    random, it is less for many runs: Papernot and Steinke 2022, "Hyperparameter tuning with Rényi differential
    privacy", theorem 2 with eta = 1, by dp-accounting. For a number of runs that is fixed
    beforehand there is no such bound: then it is the former number.

    Args:
        runs: 1 or more.
        noise_multiplier: sigma, of each run.
        sample_rate: q, of each run.
        steps: logical steps of each run, 1 or more.
        target_delta: at which epsilon is meant.
        method: of the first number; the second is always Rényi's bound.

    Raises:
        PrivacyError: an argument out of its range.

    **Guarantee.** Both numbers are upper bounds, if every run's epsilon counts all that it takes from the data but the
    choice of the best.
    """
    check_mechanism(noise_multiplier, sample_rate)
    check_delta(target_delta)
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise PrivacyError(f"runs is {runs!r}", remedy="give the number of trainings on the data, 1 or more")
    check_steps(steps)
    if not steps or not number(noise_multiplier):
        raise PrivacyError(
            "a sweep of runs that take no step, or have no noise", remedy="give steps and noise_multiplier above 0"
        )
    composed = composed_epsilon([(noise_multiplier, sample_rate, runs * steps)], target_delta, method, "zero_out")
    if runs == 1:  # of mean 1 the distribution has no other number
        return SweepCost(runs, composed, composed)
    return SweepCost(runs, composed, _random_number(runs, noise_multiplier, sample_rate, steps, target_delta))


def _random_number(runs: int, sigma: float, q: float, steps: int, delta: float) -> float:
    from dp_accounting import SelfComposedDpEvent, dp_event, rdp

    accountant = rdp.RdpAccountant()
    one = SelfComposedDpEvent(sampled_gaussian(sigma, q), steps)
    accountant.compose(dp_event.RepeatAndSelectDpEvent(one, mean=float(runs), shape=1.0))
    return float(accountant.get_epsilon(delta))
