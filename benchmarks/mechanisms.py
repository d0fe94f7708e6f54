"""What the steps of private training cost: ``python -m benchmarks.mechanisms`` prints tables.

``--digits`` also trains the digits example for some numbers of bands, to the same epsilon, and ``--step`` times the
optimizer's step on 20 million parameters.
"""

from __future__ import annotations

import argparse
import runpy
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import torch
from torch import nn
from torch.utils.data import DataLoader

from dpcompile import PrivacyAccountant, calibrate_noise, make_private
from dpcompile.accounting.arguments import Relation
from dpcompile.accounting.events import rounds
from dpcompile.noise.banded import BandedMechanism
from dpcompile.noise.mechanism import GaussianMechanism, Mechanism, Release
from dpcompile.noise.strategy import optimal_coefficients, prefix_error
from dpcompile.optim import fused_adam

NOISE_MULTIPLIER, SAMPLE_RATE, STEPS, DELTA = 1.0, 0.01, 1000, 1e-5
BANDS = (1, 2, 4, 8, 16)

__all__ = ["bands", "digits", "relations", "step"]


def relations() -> dict[str, float]:
    """Epsilon by which datasets are neighbours."""
    found = {}
    for relation in get_args(Relation):
        accountant = PrivacyAccountant(noise_multiplier=NOISE_MULTIPLIER, sample_rate=SAMPLE_RATE, relation=relation)
        accountant.step(STEPS)
        found[relation] = accountant.epsilon(DELTA)
    return found


def bands(sample_rate: float, steps: int, target_epsilon: float) -> dict[int, tuple[float, float, float]]:
    """By the number of bands: epsilon of sigma 1; sigma of the target; and the error of prefix sums of that sigma.

    Args:
        sample_rate: expected batch size over the size of the dataset.
        steps: of the run.
        target_epsilon: at the delta of this page.
    """
    found = {}
    for b in (b for b in BANDS if b * sample_rate <= 1):
        accountant = PrivacyAccountant(noise_multiplier=NOISE_MULTIPLIER, sample_rate=b * sample_rate)
        accountant.step(rounds(steps, b))
        sigma = calibrate_noise(
            target_epsilon=target_epsilon, target_delta=DELTA, sample_rate=b * sample_rate, steps=steps, bands=b
        )
        error = sigma * prefix_error(optimal_coefficients(b, steps), steps)
        found[b] = accountant.epsilon(DELTA), sigma, error
    return found


def digits(count: int, target_epsilon: float, epochs: int = 20, seeds: int = 3) -> list[float]:
    """Test accuracies of the digits example, one for each seed, with so many bands."""
    example = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "examples" / "train_digits.py")))
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        train, images, labels = example.digits()
        network = example.Network()
        options: dict[str, Any] = {
            "target_epsilon": target_epsilon,
            "target_delta": 1e-4,
            "epochs": epochs,
            "backend": "eager",
        }
        inner = torch.optim.SGD(network.parameters(), lr=example.LEARNING_RATE)
        model, optimizer, loader = make_private(
            network, inner, DataLoader(train, batch_size=example.BATCH_SIZE), bands=count, seed=seed, **options
        )
        for _ in range(epochs):
            for x, y, _ in loader:
                nn.functional.cross_entropy(model(x), y, reduction="none").mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        found.append(example.accuracy(model, images, labels))
    return found


def step(mechanism: Mechanism, numel: int, steps: int) -> float:
    """Seconds of a step of AdamW with the noise of a mechanism, the mean of some."""
    weight = nn.Parameter(torch.zeros(numel))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    optimizer.register_step_pre_hook(lambda *_: None)  # as the guard of DPOptimizer
    total, seconds = torch.zeros(numel), []
    for n in range(steps + 1):
        begin = time.perf_counter()
        assert fused_adam.update_(optimizer, [weight], Release([total], [0], n), mechanism)
        seconds.append(time.perf_counter() - begin)
    return statistics.mean(seconds[1:])


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--digits", action="store_true", help="train the digits example (minutes)")
    parser.add_argument("--step", action="store_true", help="time the optimizer's step (a minute)")
    asked = parser.parse_args()
    print(f"sigma {NOISE_MULTIPLIER}, q {SAMPLE_RATE}, {STEPS} steps, delta {DELTA}")
    for name, epsilon in relations().items():
        print(f"{name:12} {epsilon:.3f}")
    for rate, steps in ((SAMPLE_RATE, STEPS), (0.05, 2000)):
        for target in (1.0, 8.0):
            print(f"\nexpected batch {rate} of the data, {steps} steps, target epsilon {target}, delta {DELTA}")
            print("bands  epsilon of sigma 1  sigma  error of prefix sums, RMS")
            for b, (epsilon, sigma, error) in bands(rate, steps, target).items():
                print(f"{b:5}  {epsilon:18.3f}  {sigma:5.2f}  {error:.2f}")
    if asked.digits:
        for target in (1.0, 3.0, 8.0):
            for b in (1, 2, 4):
                found = digits(b, target)
                each = " ".join(f"{x:.3f}" for x in found)
                print(f"digits, epsilon {target}, {b} bands: accuracy {statistics.mean(found):.3f} ({each})")
    if asked.step:
        numel, plain = 20_000_000, GaussianMechanism(1.0, 1.0, 8.0, 0)
        banded = BandedMechanism(1.0, 1.0, 8.0, 0, coefficients=optimal_coefficients(16, STEPS))
        for name, mechanism in (("independent", plain), ("16 bands", banded)):
            print(f"AdamW on {numel:,} parameters, {name}: {step(mechanism, numel, 30):.3f} s a step")


if __name__ == "__main__":
    main()
