"""What the steps of private training cost: ``python -m benchmarks.mechanisms`` prints a table."""

from __future__ import annotations

from typing import get_args

from dpcompile import PrivacyAccountant
from dpcompile.accounting.arguments import Relation

NOISE_MULTIPLIER, SAMPLE_RATE, STEPS, DELTA = 1.0, 0.01, 1000, 1e-5

__all__ = ["relations"]


def relations() -> dict[str, float]:
    """Epsilon by which datasets are neighbours."""
    found = {}
    for relation in get_args(Relation):
        accountant = PrivacyAccountant(noise_multiplier=NOISE_MULTIPLIER, sample_rate=SAMPLE_RATE, relation=relation)
        accountant.step(STEPS)
        found[relation] = accountant.epsilon(DELTA)
    return found


if __name__ == "__main__":
    print(f"sigma {NOISE_MULTIPLIER}, q {SAMPLE_RATE}, {STEPS} steps, delta {DELTA}")
    for name, epsilon in relations().items():
        print(f"{name:12} {epsilon:.3f}")
