"""Each of epsilon, noise, steps and rate from the others: what is found meets the target, and little more would not."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpcompile import calibrate_noise, solve
from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.errors import PrivacyError

DELTA = 1e-5
TARGET: dict[str, Any] = {"target_delta": DELTA, "target_epsilon": 2.0}


def epsilon(sigma: float, q: float, n: int, **options: Any) -> float:
    counted = PrivacyAccountant(noise_multiplier=sigma, sample_rate=q, **options)
    counted.step(n)
    return counted.epsilon(DELTA)


@pytest.mark.full
@settings(max_examples=12, deadline=None)
@given(st.floats(0.6, 5), st.floats(1e-3, 1), st.integers(1, 5000), st.floats(0.05, 30))
def test_what_is_found_meets_the_target(sigma: float, q: float, n: int, target: float) -> None:
    """By Rényi's bound, which is instant."""
    options: dict[str, Any] = {"method": "rdp"}
    known = {"target_delta": DELTA, "target_epsilon": target, **options}
    assert epsilon(solve(**known, sample_rate=q, steps=n), q, n, **options) <= target
    tries: list[tuple[dict[str, Any], Any, Any]] = [
        ({"noise_multiplier": sigma, "sample_rate": q}, lambda n: (sigma, q, n), lambda n: n + max(1, n * 2e-4)),
        ({"noise_multiplier": sigma, "steps": n}, lambda q: (sigma, q, n), lambda q: q * 1.0002),
    ]
    for found, feed, worse in tries:
        try:
            best = solve(**known, **found)
        except PrivacyError as error:
            assert "alone costs epsilon" in str(error)
            assert epsilon(sigma, q, 1, **options) > target or epsilon(sigma, 1e-9, n, **options) > target
            continue
        assert epsilon(*feed(best), **options) <= target
        if isinstance(best, int):
            assert epsilon(*feed(math.ceil(worse(best))), **options) > target
        elif best < 1:
            assert epsilon(*feed(min(worse(best), 1.0)), **options) > target or worse(best) > 1


@pytest.mark.full
@pytest.mark.parametrize("relation", ["zero_out", "replace_one"])
def test_by_the_tight_bound(relation: Any) -> None:
    options: dict[str, Any] = {"relation": relation}
    steps = solve(**TARGET, noise_multiplier=1.0, sample_rate=0.01, **options)
    assert isinstance(steps, int) and epsilon(1.0, 0.01, steps, **options) <= 2.0
    assert epsilon(1.0, 0.01, math.ceil(steps * 1.0002), **options) > 2.0
    rate = solve(**TARGET, noise_multiplier=1.0, steps=500, **options)
    assert epsilon(1.0, rate, 500, **options) <= 2.0 < epsilon(1.0, rate * 1.0002, 500, **options)
    sigma = solve(**TARGET, sample_rate=0.01, steps=500, **options)
    assert epsilon(sigma, 0.01, 500, **options) <= 2.0 < epsilon(sigma * 0.9998, 0.01, 500, **options)
    spent = solve(target_delta=DELTA, noise_multiplier=1.0, sample_rate=0.01, steps=500, **options)
    assert spent == epsilon(1.0, 0.01, 500, **options)


def test_pins() -> None:
    assert solve(target_delta=DELTA, target_epsilon=3.0, noise_multiplier=1.0, sample_rate=0.01) == 2666
    batch = solve(target_delta=DELTA, target_epsilon=3.0, noise_multiplier=1.0, steps=3000, dataset_size=50_000)
    assert batch == pytest.approx(472.925, abs=0.05) and epsilon(1.0, batch / 50_000, 3000) <= 3.0
    known = solve(target_delta=DELTA, noise_multiplier=1.0, steps=1000, expected_batch_size=10, dataset_size=1000)
    assert known == pytest.approx(1.82824, abs=1e-5)


def test_targets_that_all_and_that_none_meet() -> None:
    assert solve(**TARGET, noise_multiplier=1e9, sample_rate=0.01) == 2**40
    assert solve(**TARGET, noise_multiplier=1e3, steps=10) == 1.0
    assert solve(**TARGET, noise_multiplier=1e3, steps=10, dataset_size=300) == 300
    for method in ("pld", "rdp"):
        with pytest.raises(PrivacyError, match=r"one step alone costs epsilon .* more than the target of 2.0\n.*raise"):
            solve(**TARGET, noise_multiplier=0.3, sample_rate=0.9, method=method)  # type: ignore[arg-type]
        with pytest.raises(PrivacyError, match="alone costs epsilon inf"):
            solve(**TARGET, noise_multiplier=0, steps=3, method=method)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "noise_multiplier and steps and sample_rate are left out"),
        ({"noise_multiplier": 1.0, "steps": 3, "sample_rate": 0.1}, "nothing is left out"),
        ({"noise_multiplier": 1.0, "dataset_size": 10}, "steps and sample_rate are left out"),
        ({"noise_multiplier": 1.0, "steps": 0}, "steps is 0"),
        ({"noise_multiplier": -1.0, "steps": 3}, "noise_multiplier is -1.0"),
        ({"noise_multiplier": 1.0, "steps": 1.5}, "number of steps is 1.5"),
        ({"noise_multiplier": 1.0, "sample_rate": 2.0}, "sample_rate is 2.0"),
        ({"noise_multiplier": 1.0, "expected_batch_size": 3}, "expected_batch_size without dataset_size"),
        ({"noise_multiplier": 1.0, "sample_rate": 0.1, "dataset_size": 10}, "sample_rate and dataset_size"),
        ({"noise_multiplier": 1.0, "steps": 3, "dataset_size": 0}, "dataset_size is 0"),
        (
            {"noise_multiplier": 1.0, "expected_batch_size": 30, "dataset_size": 10},
            "expected_batch_size is 30, and dataset_size 10",
        ),
        ({"noise_multiplier": 1.0, "expected_batch_size": "3", "dataset_size": 10}, "expected_batch_size is '3'"),
        ({"noise_multiplier": 1.0, "steps": 3, "target_epsilon": -1.0}, "target_epsilon is -1.0"),
        ({"noise_multiplier": 1.0, "steps": 3, "target_delta": 1.0}, "delta is 1.0"),
        ({"noise_multiplier": 1.0, "steps": 3, "method": "rdp", "relation": "replace_one"}, "no Rényi bound"),
    ],
)
def test_what_cannot_be_solved_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyError, match=rf"(?s){message}.*what to do: "):
        solve(**{**TARGET, **given})


def test_noise_for_a_target_below_what_renyi_can_show() -> None:
    """There the search has no start from Rényi's bound, and what PLD finds is mu-Gaussian DP's own."""
    delta, steps = 1e-9, 1000
    sigma = calibrate_noise(target_epsilon=0.01, target_delta=delta, sample_rate=1.0, steps=steps)
    spent = [PrivacyAccountant(noise_multiplier=sigma * f, sample_rate=1.0) for f in (1.0, 0.99)]
    for accountant in spent:
        accountant.step(steps)
    assert spent[0].epsilon(delta) <= 0.01 < spent[1].epsilon(delta)
    with pytest.raises(PrivacyError, match="(?s)by Rényi's bound.*take method='pld'"):
        calibrate_noise(target_epsilon=0.01, target_delta=delta, sample_rate=1.0, steps=steps, method="rdp")
