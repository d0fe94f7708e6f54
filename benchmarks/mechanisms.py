"""What the steps of private training cost: ``python -m benchmarks.mechanisms`` prints tables.

``--audit`` prints what an audit finds of it, by how many canaries there are. ``--step N`` times the optimizer on N
million parameters: the mean over as many steps as make each row of correlated noise once for each use. ``--exact N``
does that for exact noise, and for ChaCha20 without a grid.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.machine import describe_machine
from dpcompile import PoissonLoader, PrivacyAccountant, audit, calibrate_noise, make_private
from dpcompile.accounting.arguments import Relation
from dpcompile.accounting.events import rounds
from dpcompile.auditing.report import AuditReport
from dpcompile.noise.banded import BandedMechanism
from dpcompile.noise.buffers import optimal_powers
from dpcompile.noise.exact import ExactMechanism
from dpcompile.noise.mechanism import GaussianMechanism, Mechanism, Release
from dpcompile.noise.strategy import optimal_coefficients, prefix_error
from dpcompile.optim import fused_adam

NOISE_MULTIPLIER, SAMPLE_RATE, STEPS, DELTA = 1.0, 0.01, 1000, 1e-5
BANDS = (1, 2, 4, 8, 16)
DATASET_SIZE, CAPS = 1000, (1000, 32, 16, 10)  # 1000: no draw is truncated

RUNS = 10  # of a tuning run, on average
CANARIES = (100, 400, 1600, 6400)

__all__ = ["attacks", "audits", "bands", "caps", "relations", "step", "strategies", "tuned"]


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


def in_turn(steps: int) -> dict[str, float]:
    """The error of prefix sums over a pass of so many steps, RMS in units of sigma of the pass times C."""
    nodes = sum(t.bit_count() for t in range(1, steps + 1)) / steps
    found = {
        "independent": ((steps + 1) / 2) ** 0.5,
        "tree": (nodes * steps.bit_length()) ** 0.5,
        "buffers": optimal_powers(steps).error(steps, steps),
    }
    if steps <= 256:  # as many rows would be held
        found["all bands"] = prefix_error(optimal_coefficients(steps, steps, steps), steps, steps)
    return found


def strategies(
    banded: Sequence[tuple[int, int]] = ((2, 100), (8, 1000), (16, 1000), (32, 2000)),
    passes: Sequence[int] = (64, 256, 1000),
) -> dict[str, tuple[float, float | None]]:
    """Errors of prefix sums, RMS in units of sigma C: our coefficients, and jax-privacy's (None: not installed).

    Of bands and steps, and of buffers over passes, which take it a minute; without blocks.
    """
    found: dict[str, tuple[float, float | None]] = {}
    for b, steps in banded:
        ours = prefix_error(optimal_coefficients(b, steps, steps), steps, steps)
        found[f"{b} bands, {steps} steps"] = ours, None
    for steps in passes:
        found[f"buffers, {steps} steps"] = optimal_powers(steps).error(steps, steps), None
    try:
        from jax_privacy.matrix_factorization import buffered_toeplitz, toeplitz  # type: ignore[import-not-found]
    except ImportError:
        return found
    for b, steps in banded:
        name, theirs = f"{b} bands, {steps} steps", toeplitz.optimize_banded_toeplitz(steps, b)
        found[name] = found[name][0], prefix_error(np.asarray(theirs, dtype=float).tolist(), steps, steps)
    for steps in passes:
        name, matrix = f"buffers, {steps} steps", buffered_toeplitz.optimize(n=steps, error="mean")
        scale, decay = (np.asarray(x, dtype=float) for x in (matrix.output_scale, matrix.buf_decay))
        c = [1.0, *(decay ** np.arange(steps - 1)[:, None] @ scale).tolist()]
        found[name] = found[name][0], prefix_error(c, steps, steps)
    return found


def caps() -> dict[int, float]:
    """Epsilon by the cap on draws."""
    found = {}
    for cap in CAPS:
        run = PrivacyAccountant(
            noise_multiplier=NOISE_MULTIPLIER, sample_rate=SAMPLE_RATE, truncation=(DATASET_SIZE, cap)
        )
        run.step(STEPS)
        found[cap] = run.epsilon(DELTA)
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


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step", type=int, metavar="N", help="time the optimizer's step on N million parameters")
    parser.add_argument("--exact", type=int, metavar="N", help="the same with exact noise")
    parser.add_argument("--in-turn", action="store_true", help="errors of noise over a pass, by its steps")
    parser.add_argument("--strategies", action="store_true", help="errors of our matrices and of jax-privacy's")
    parser.add_argument("--audit", action="store_true", help="audit some runs (a minute)")
    asked = parser.parse_args()
    if asked.in_turn:
        for steps in (8, 64, 256, 1024, 10_000):
            print(f"{steps:6} steps  " + ", ".join(f"{name} {e:.3f}" for name, e in in_turn(steps).items()))
        return
    if asked.strategies:
        for name, (ours, theirs) in strategies().items():
            print(f"{name:22} {ours:.6f}" + ("" if theirs is None else f", jax-privacy's {theirs:.6f}"))
        return
    if asked.audit:
        print("| canaries | of any mechanism | if independent | proved | noise at most |\n|---|---|---|---|---|")
        for count, r in audits().items():
            print(f"| {count:,} | {r.any_mechanism:.2f} | {r.independent:.2f} | {r.proved:.2f} | {r.noise:.2f} |")
        return
    if asked.exact:
        kinds = {
            "Philox": GaussianMechanism(1.0, 1.0, 8.0, 0),
            "ChaCha20": GaussianMechanism(1.0, 1.0, 8.0, 0, secure=True),
            "exact": ExactMechanism(1.0, 1.0, 8.0, 0),
        }
        seconds = {name: step(mechanism, asked.exact * 1_000_000, 5) for name, mechanism in kinds.items()}
        machine = describe_machine(torch.get_num_threads())
        print(f"{machine['cpu']}, {machine['threads']} threads; AdamW on {asked.exact} million parameters: ")
        print(", ".join(f"{k} {s:.3f} s, ratio {s / seconds['Philox']:.1f}" for k, s in seconds.items()))
        return
    if asked.step:
        plain = GaussianMechanism(1.0, 1.0, 8.0, 0)
        banded = BandedMechanism(1.0, 1.0, 8.0, 0, coefficients=optimal_coefficients(16, STEPS))
        one, other = (step(mechanism, asked.step * 1_000_000, 30) for mechanism in (plain, banded))
        machine = describe_machine(torch.get_num_threads())
        print(f"{machine['cpu']}, {machine['threads']} threads; AdamW on {asked.step} million parameters, s a step: ")
        print(f"independent {one:.3f}, 16 bands {other:.3f}, ratio {other / one:.2f}")
        return
    print(f"sigma {NOISE_MULTIPLIER}, q {SAMPLE_RATE}, {STEPS} steps, delta {DELTA}")
    for name, epsilon in relations().items():
        print(f"{name:12} {epsilon:.3f}")
    print(f"{'best of ' + str(RUNS):12} {tuned():.5f} (rdp)")
    for name, value in attacks().items():
        print(f"{name:27} {value:.5f}")
    for cap, epsilon in caps().items():
        print(f"{DATASET_SIZE} examples, {cap} at most in a step  {epsilon:.5f}")
    for rate, steps in ((SAMPLE_RATE, STEPS), (0.05, 2000)):
        for target in (1.0, 8.0):
            print(f"\nexpected batch {rate} of the data, {steps} steps, target epsilon {target}, delta {DELTA}")
            print("bands  epsilon of sigma 1  sigma  error of prefix sums, RMS")
            for b, (epsilon, sigma, error) in bands(rate, steps, target).items():
                print(f"{b:5}  {epsilon:18.3f}  {sigma:5.2f}  {error:.2f}")


if __name__ == "__main__":
    main()
