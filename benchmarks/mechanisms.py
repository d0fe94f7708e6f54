"""What the steps of private training cost: ``python -m benchmarks.mechanisms`` prints a table.

``python -m benchmarks.mechanisms audit`` prints what an audit finds of it, by how many canaries there are.
"""

from __future__ import annotations

import sys
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dpcompile import PoissonLoader, PrivacyAccountant, audit, make_private
from dpcompile.accounting.arguments import Relation
from dpcompile.auditing.report import AuditReport

NOISE_MULTIPLIER, SAMPLE_RATE, STEPS, DELTA = 1.0, 0.01, 1000, 1e-5

CANARIES = (100, 400, 1600, 6400)

__all__ = ["audits", "relations"]


def relations() -> dict[str, float]:
    """Epsilon by which datasets are neighbours."""
    found = {}
    for relation in get_args(Relation):
        accountant = PrivacyAccountant(noise_multiplier=NOISE_MULTIPLIER, sample_rate=SAMPLE_RATE, relation=relation)
        accountant.step(STEPS)
        found[relation] = accountant.epsilon(DELTA)
    return found


def audits(counts: tuple[int, ...] = CANARIES, noise_multiplier: float = 2.0, steps: int = 8) -> dict[int, AuditReport]:
    """Reports by number of canaries, of steps with every row in each."""

    def losses(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    found = {}
    for count in counts:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10))
        loader = PoissonLoader(
            TensorDataset(torch.randn(32, 20), torch.randint(0, 10, (32,))),
            expected_batch_size=32, sample_rate=1.0, physical_batch_size=512, steps=steps, seed=0,
        )  # fmt: skip
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        given = make_private(model, inner, loader, noise_multiplier=noise_multiplier, seed=1, backend="eager")
        found[count] = audit(*given, losses, canaries=count, seed=count, delta=DELTA)
    return found


if __name__ == "__main__" and sys.argv[1:] == ["audit"]:
    print("| canaries | of any mechanism | if independent | proved | noise at most |\n|---|---|---|---|---|")
    for count, r in audits().items():
        print(f"| {count:,} | {r.any_mechanism:.2f} | {r.independent:.2f} | {r.proved:.2f} | {r.noise:.2f} |")
elif __name__ == "__main__":
    print(f"sigma {NOISE_MULTIPLIER}, q {SAMPLE_RATE}, {STEPS} steps, delta {DELTA}")
    for name, epsilon in relations().items():
        print(f"{name:12} {epsilon:.3f}")
