"""What several runs on the same data cost, against the accountant and against the theorem written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dpcompile import PrivacyAccountant, PrivacyError
from dpcompile.accounting.sweeps import sweep_cost

RUN: dict[str, Any] = {"noise_multiplier": 1.1, "sample_rate": 0.02, "steps": 300, "target_delta": 1e-5}


@pytest.mark.parametrize("runs", [1, 2, 7])
def test_all_that_is_seen_is_one_long_run(runs: int) -> None:
    counted = PrivacyAccountant(noise_multiplier=1.1, sample_rate=0.02)
    counted.step(runs * 300)
    assert sweep_cost(runs=runs, **RUN).composed == counted.epsilon(1e-5)


def by_the_theorem(runs: int, sigma: float, steps: int, delta: float) -> float:
    """Papernot and Steinke 2022, theorem 2, eta = 1, for Gaussian noise without sampling; epsilon by Canonne et al."""
    orders = np.concatenate([1 + np.logspace(-2, 3, 2000)])
    divergence = steps * orders / (2 * sigma**2)
    gamma = 1 / runs  # the mean of a geometric distribution is the inverse of its parameter
    own = 2 * ((1 - 1 / orders) * divergence + math.log(1 / gamma) / orders)
    selected = divergence + own.min() + math.log(runs) / (orders - 1)
    return float((selected + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)).min())


@pytest.mark.parametrize("runs", [2, 5, 30])
def test_a_random_number_of_runs(runs: int) -> None:
    given = {"noise_multiplier": 30.0, "sample_rate": 1.0, "steps": 100, "target_delta": 1e-6}
    found = sweep_cost(runs=runs, **given).random_number
    assert found == pytest.approx(by_the_theorem(runs, 30.0, 100, 1e-6), rel=0.02)


def test_order() -> None:
    found = [sweep_cost(runs=k, **RUN) for k in (1, 2, 8, 64)]
    for name in ("composed", "random_number"):
        values = [getattr(c, name) for c in found]
        assert values == sorted(values) and values[0] < values[-1]
    assert found[0].random_number == found[0].composed and found[-1].random_number < found[-1].composed / 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"runs": 0}, "runs is 0"),
        ({"runs": True}, "runs is True"),
        ({"runs": 2.5}, "runs is 2.5"),
        ({"noise_multiplier": 0.0}, "have no noise"),
        ({"steps": 0}, "take no step"),
        ({"sample_rate": 1.5}, "sample_rate is 1.5"),
        ({"target_delta": 0}, "delta is 0"),
    ],
)
def test_what_makes_no_sense(change: dict[str, Any], said: str) -> None:
    with pytest.raises(PrivacyError, match=said):
        sweep_cost(**{"runs": 2, **RUN, **change})
