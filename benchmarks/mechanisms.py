"""What the steps of private training cost: ``python -m benchmarks.mechanisms`` prints a table."""

from __future__ import annotations

import math
from typing import get_args

from dp_accounting.dp_event import RepeatAndSelectDpEvent

from dpcompile import PrivacyAccountant
from dpcompile.accounting.arguments import Relation

NOISE_MULTIPLIER, SAMPLE_RATE, STEPS, DELTA = 1.0, 0.01, 1000, 1e-5

RUNS = 10  # of a tuning run, on average

__all__ = ["attacks", "relations", "tuned"]


def relations() -> dict[str, float]:
    """Epsilon by which datasets are neighbours."""
    found = {}
    for relation in get_args(Relation):
        accountant = PrivacyAccountant(noise_multiplier=NOISE_MULTIPLIER, sample_rate=SAMPLE_RATE, relation=relation)
        accountant.step(STEPS)
        found[relation] = accountant.epsilon(DELTA)
    return found


def tuned() -> float:
    """Epsilon of the best of a Poisson number of such runs, by Rényi's bound (Papernot and Steinke 2022)."""
    run, tuning = (
        PrivacyAccountant(noise_multiplier=NOISE_MULTIPLIER, sample_rate=SAMPLE_RATE, method="rdp") for _ in range(2)
    )
    run.step(STEPS)
    tuning.compose(RepeatAndSelectDpEvent(run.event, RUNS, math.inf))
    return tuning.epsilon(DELTA)


def attacks() -> dict[str, float]:
    """What the run says of attacks."""
    run = PrivacyAccountant(noise_multiplier=NOISE_MULTIPLIER, sample_rate=SAMPLE_RATE)
    run.step(STEPS)
    mu, regret = run.gaussian_bound()
    return {
        "delta at epsilon 1": run.delta(1.0),
        "mu": mu,
        "regret": regret,
        "attack advantage": run.attack_advantage(),
        "true-positive rate at 0.01": run.true_positive_rate(0.01),
    }


if __name__ == "__main__":
    print(f"sigma {NOISE_MULTIPLIER}, q {SAMPLE_RATE}, {STEPS} steps, delta {DELTA}")
    for name, epsilon in relations().items():
        print(f"{name:12} {epsilon:.3f}")
    print(f"{'best of ' + str(RUNS):12} {tuned():.5f} (rdp)")
    for name, value in attacks().items():
        print(f"{name:27} {value:.5f}")
