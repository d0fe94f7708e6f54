"""Advice on the batch size: what it says is true when it is tried, and it is rare."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import calibrate_noise, make_private
from dpcompile.accounting import batch_sizes
from dpcompile.accounting.batch_sizes import BatchSizeAdvice, better_batch_size
from dpcompile.schedules import cosine

# size of the dataset, batch, epochs, epsilon, delta, trainable numbers
SMALL_BATCHES = [(10_000, 16, 3, 8.0, 1e-5, 4_000_000), (60_000, 128, 15, 8.0, 1e-5, 26_000)]
LARGE_BATCHES = [(1000, 1000, 100, 1.0, 1e-4, 10_000), (32_000, 4096, 50, 0.5, 1e-5, 5000)]
USUAL = [
    (1437, 256, 20, 3.0, 1e-4, 65_000),  # README
    (1437, 256, 20, 1.0, 1e-4, 65_000),
    (60_000, 600, 15, 1.0, 1e-5, 26_000),
    (50_000, 512, 20, 3.0, 1e-5, 200_000),
    (50_000, 4096, 164, 8.0, 1e-5, 2_700_000),  # De et al. 2022, CIFAR-10
    (50_000, 4096, 72, 1.0, 1e-5, 2_700_000),
    (67_000, 2048, 10, 3.0, 7e-6, 125_000_000),  # Li et al. 2022, language models
    (42_000, 1024, 10, 8.0, 1e-5, 125_000_000),
    (40, 8, 2, 3.0, 1e-3, 15),
    (1000, 8, 3, 8.0, 1e-4, 4_000_000),  # too few steps to do with fewer
    (2000, 4, 2, 8.0, 1e-5, 15),  # sampling adds more than noise does
]


def planned(size: int, batch: float, epochs: int, epsilon: float, delta: float, numel: int) -> dict[str, Any]:
    steps = epochs * math.ceil(size / batch)
    run: dict[str, Any] = {"target_epsilon": epsilon, "target_delta": delta, "sample_rate": batch / size}
    return {**run, "steps": steps, "expected_batch_size": batch, "numel": numel}


def advised(run: dict[str, Any], method: Any = "pld") -> tuple[float, BatchSizeAdvice | None]:
    known = {k: v for k, v in run.items() if k not in ("expected_batch_size", "numel")}
    sigma = calibrate_noise(**known, method=method)
    return sigma, better_batch_size(noise_multiplier=sigma, method=method, **run)


def error(sigma: float, batch: float, steps: int, numel: int, sampling: float = 1.0) -> float:
    """Of the mean of all updates over C, for terms of this norm."""
    return math.sqrt((numel * sigma**2 / batch**2 + sampling**2 / batch) / steps)


@pytest.mark.parametrize("method", ["rdp", pytest.param("pld", marks=pytest.mark.slow)])
@pytest.mark.parametrize("setting", SMALL_BATCHES + LARGE_BATCHES)
def test_what_is_advised_is_true_when_it_is_tried(setting: Any, method: Any) -> None:
    run = planned(*setting)
    sigma, advice = advised(run, method)
    assert advice is not None
    batch, numel = run["expected_batch_size"], run["numel"]
    followed = {**run, "steps": advice.steps, "expected_batch_size": float(advice.expected_batch_size)}
    followed["sample_rate"] = run["sample_rate"] * advice.expected_batch_size / batch
    then, again = advised(followed, method)
    assert again is None
    for sampling in (0.0, 0.3, 1.0):
        ratio = error(then, advice.expected_batch_size, advice.steps, numel, sampling)
        ratio /= error(sigma, batch, run["steps"], numel, sampling)
        assert ratio <= advice.noise * (1 + 1e-6) and ratio > advice.noise / 1.3
    compute = advice.expected_batch_size * advice.steps / (batch * run["steps"])
    assert compute == advice.compute
    if setting in SMALL_BATCHES:
        assert advice.noise <= 2 / 3 and compute == pytest.approx(1, rel=0.01) and advice.steps >= 100
        assert f"{advice.expected_batch_size:,} in {advice.steps:,} steps: as many" in str(advice)
    else:
        assert advice.noise <= 1.05 and compute <= 1 / 4 + 1e-3 and advice.steps == run["steps"]
        assert str(advice).endswith(f" % of the examples processed, and at most {math.ceil(100 * advice.noise)} % of "
                                    "the noise in the mean of all updates")  # fmt: skip


def test_what_no_bound_confirms_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an approximation that is far too small: what is said is the least that is worth saying, which holds."""
    monkeypatch.setattr(batch_sizes, "_MARGIN", 0.5)
    for setting, most in ((SMALL_BATCHES[1], 2 / 3), (LARGE_BATCHES[0], 1.05)):
        advice = advised(planned(*setting), "rdp")[1]
        assert advice is not None and advice.noise == most
    monkeypatch.setattr(batch_sizes, "composed_epsilon", lambda *_: math.inf)
    assert advised(planned(*SMALL_BATCHES[1]), "rdp")[1] is None


@pytest.mark.parametrize("setting", USUAL)
def test_usual_runs_are_left_alone(setting: Any) -> None:
    assert advised(planned(*setting), "rdp")[1] is None


def parts(batch_size: int, size: int = 2000) -> tuple[Any, ...]:
    model = nn.Linear(64, 64)
    loader = DataLoader(TensorDataset(torch.zeros(size, 64)), batch_size=batch_size)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), loader


TARGET: dict[str, Any] = {"target_epsilon": 8.0, "target_delta": 1e-5, "accountant": "rdp", "backend": "eager"}


def test_make_private_warns_once_and_not_of_what_it_advised() -> None:
    said = (
        r"batches of 4 in 1,000 steps meet epsilon 8 with a noise multiplier of 0\.\d+\. So would batches of 32 in 125 "
        r"steps: as many examples processed, and at most \d\d % of the noise in the mean of all updates\. To try it: "
        r"batch size 32, steps=125; plan_privacy compares others\."
    )
    with pytest.warns(UserWarning, match=said) as caught:
        make_private(*parts(4), **TARGET, epochs=2)
    assert len(caught) == 1 and caught[0].filename == __file__
    make_private(*parts(32), **TARGET, steps=125)
    make_private(*parts(32), **TARGET, epochs=2)


@pytest.mark.parametrize(
    "options",
    [
        {"noise_multiplier": 0.5, "target_epsilon": None, "epochs": 2},
        {"epochs": 2, "noise_schedule": cosine(1000, 0.5)},
        {"epochs": 2, "bands": 2},
        {"epochs": 2, "batch_size_schedule": lambda step: 1.0 + (step > 3)},
    ],
    ids=["no plan", "schedule", "bands", "sizes"],
)
def test_it_says_nothing_of_what_it_does_not_know(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_private(*parts(4), **{**TARGET, **options})
