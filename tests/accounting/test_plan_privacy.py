"""The planning table: each row is what the accountant says of that run."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from dpcompile import PrivacyAccountant, plan_privacy
from dpcompile.errors import PrivacyError

COMMON: dict[str, Any] = {"dataset_size": 1000, "target_delta": 1e-5, "method": "rdp"}


def epsilon(sigma: float, q: float, n: int, method: Any = "rdp") -> float:
    counted = PrivacyAccountant(noise_multiplier=sigma, sample_rate=q, method=method)
    counted.step(n)
    return counted.epsilon(1e-5)


def test_what_runs_cost() -> None:
    plan = plan_privacy(
        **COMMON, expected_batch_sizes=[10, 300], epochs=[1, 2.5], noise_multiplier=1.0, max_grad_norm=0.5
    )
    assert [(row.expected_batch_size, row.steps) for row in plan.rows] == [(10, 100), (10, 250), (300, 4), (300, 10)]
    for row in plan.rows:
        assert row.epsilon == epsilon(1.0, row.sample_rate, row.steps) and row.noise_multiplier == 1.0
        assert row.sample_rate == row.expected_batch_size / 1000 and row.epochs == row.steps * row.sample_rate
        assert row.noise_per_example == 0.5 / row.expected_batch_size
        assert row.examples == row.steps * row.expected_batch_size


def test_the_noise_that_a_target_needs() -> None:
    plan = plan_privacy(**COMMON, expected_batch_sizes=[10, 100], steps=[50], target_epsilon=1.5)
    small, large = plan.rows
    assert small.noise_multiplier < large.noise_multiplier and small.noise_per_example > large.noise_per_example
    for row in plan.rows:
        assert row.epsilon == epsilon(row.noise_multiplier, row.sample_rate, 50) <= 1.5
        assert epsilon(row.noise_multiplier * 0.999, row.sample_rate, 50) > 1.5
    tight = plan_privacy(**{**COMMON, "method": "pld"}, expected_batch_sizes=[10], steps=[50], target_epsilon=1.5)
    assert tight.rows[0].noise_multiplier < small.noise_multiplier
    assert tight.rows[0].epsilon == epsilon(tight.rows[0].noise_multiplier, 0.01, 50, "pld")


def test_it_prints_and_is_saved() -> None:
    plan = plan_privacy(**COMMON, expected_batch_sizes=[10], steps=[1000], noise_multiplier=1.0)
    assert str(plan) == (
        "1000 examples, delta 1e-05, C 1, rdp, zero_out\n"
        "batch  steps  epochs  sample rate  sigma  epsilon  sigma C / batch  examples\n"
        "   10   1000      10         0.01      1    2.102        1.000e-01     1e+04"
    )
    assert plan.markdown().splitlines()[1].startswith("| ---: | ---: |") and "| 2.102 |" in plan.markdown()
    assert json.loads(plan.json())["rows"] == [plan.rows[0]._asdict()] and json.loads(plan.json())["delta"] == 1e-5
    no_noise = plan_privacy(**COMMON, expected_batch_sizes=[10], steps=[1], noise_multiplier=0.0)
    assert json.loads(no_noise.json())["rows"][0]["epsilon"] is None and " inf " in str(no_noise)


def test_what_is_printed_is_not_too_small() -> None:
    for sigma in (0.51234567, 0.99999, 1.0, 12.34501, 123456.7):
        plan = plan_privacy(**COMMON, expected_batch_sizes=[10], steps=[3], noise_multiplier=sigma)
        cells = plan.cells()[1]
        assert float(cells[5]) >= plan.rows[0].epsilon and sigma <= float(cells[4]) <= sigma * 1.002


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither of noise_multiplier and target_epsilon"),
        ({"noise_multiplier": 1.0, "target_epsilon": 1.0, "steps": [1]}, "both of noise_multiplier"),
        ({"noise_multiplier": 1.0}, "neither of steps and epochs"),
        ({"noise_multiplier": 1.0, "steps": [1], "epochs": [1]}, "both of steps and epochs"),
        ({"noise_multiplier": 1.0, "steps": 3}, "steps is 3"),
        ({"noise_multiplier": 1.0, "steps": []}, r"steps is \[\]"),
        ({"noise_multiplier": 1.0, "steps": [1.5]}, "number of steps is 1.5"),
        ({"noise_multiplier": 1.0, "epochs": [0]}, "epochs holds 0"),
        ({"noise_multiplier": 1.0, "epochs": [math.inf]}, "epochs holds inf"),
        ({"noise_multiplier": 1.0, "epochs": "12"}, "epochs is '12'"),
        ({"noise_multiplier": 1.0, "steps": [1], "expected_batch_sizes": [1001]}, "expected_batch_sizes holds 1001"),
        ({"noise_multiplier": 1.0, "steps": [1], "expected_batch_sizes": [None]}, "expected_batch_sizes holds None"),
        ({"noise_multiplier": 1.0, "steps": [1], "max_grad_norm": 0}, "max_grad_norm is 0"),
        ({"noise_multiplier": 1.0, "steps": [1], "dataset_size": 1.5}, "dataset_size is 1.5"),
        ({"noise_multiplier": -1.0, "steps": [1]}, "noise_multiplier is -1.0"),
        ({"target_epsilon": -1.0, "steps": [1]}, "target_epsilon is -1.0"),
        ({"noise_multiplier": 1.0, "steps": [1], "target_delta": 2}, "delta is 2"),
    ],
)
def test_plans_without_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyError, match=rf"(?s){message}.*what to do: "):
        plan_privacy(**{**COMMON, "expected_batch_sizes": [10], **given})
