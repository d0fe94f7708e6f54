"""Rates and noise that differ from step to step: rounding to fewer kinds, calibration, solve, ranks, digests."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest

from dpcompile import PoissonLoader, PrivacyAccountant, PrivacyError, calibrate_noise, schedules, solve
from dpcompile.accounting import composition
from dpcompile.accounting.by_step import ByStep
from dpcompile.accounting.composition import composed_epsilon
from dpcompile.accounting.events import sampled_gaussian
from dpcompile.accounting.runs import rounded_down
from dpcompile.accounting.truncation import TruncatedRate
from dpcompile.data.sampling import PoissonBatches, poisson_draw

DELTA = 1e-5
STEPS = 60


def rate_of(step: int) -> float:
    return 0.02 * 1.03**step


def noise_of(step: int) -> float:
    return 0.99**step


HISTORY = [(1.5 * noise_of(t), rate_of(t), 1 + t % 3) for t in range(STEPS)]


@pytest.mark.parametrize("most", [1, 7, 32, 59])
def test_rates_are_rounded_up_and_noise_down(most: int) -> None:
    """There is a one-to-one map of the steps to rounded ones that cost no less, as groups are disjoint in order."""
    fewer: Any = rounded_down(HISTORY, most)
    assert len(fewer) <= most and sum(n for _, _, n in fewer) == sum(n for _, _, n in HISTORY)
    left = Counter({(s, q): n for s, q, n in fewer})
    for sigma, q, n in sorted(HISTORY, key=lambda run: run[1]):  # here sigma falls where the rate grows
        fits = [k for k in left if k[0] <= sigma and k[1] >= q and left[k] >= n]
        assert fits, (sigma, q)
        left[min(fits, key=lambda k: k[1])] -= n
    assert not +left
    assert max(q for _, q, _ in fewer) == max(q for _, q, _ in HISTORY)


def test_few_rates_and_rates_with_a_cap_are_kept_apart() -> None:
    few = [(2.0 * 0.9**t, (0.1, 0.2)[t % 2], 1) for t in range(40)]
    assert {q for _, q, _ in rounded_down(few, 4)} == {0.1, 0.2}
    capped = [(1.0, TruncatedRate(rate_of(t), 1000, 50), 1) for t in range(STEPS)]
    assert Counter(rounded_down(capped, 4)) == Counter(capped)
    mixed = rounded_down([*HISTORY, *capped], 8)
    assert Counter(r for r in mixed if isinstance(r[1], TruncatedRate)) == Counter(capped)
    assert len(mixed) == 8 + STEPS


def test_rates_that_floating_point_barely_tells_apart() -> None:
    q, close = 0.1, []
    for _ in range(20):
        close.append((1.0, q, 1))
        q = math.nextafter(q, 1)
    for most in (1, 3, 19):
        fewer = rounded_down(close, most)
        assert len(fewer) <= most and sum(n for _, _, n in fewer) == 20
        assert max(r for _, r, _ in fewer) == close[-1][1]


@pytest.mark.full
@pytest.mark.parametrize("relation", ["zero_out", "replace_one"])
def test_epsilon_of_many_rates_is_a_bound_and_close(relation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    history = HISTORY[::2]
    monkeypatch.setattr(composition, "_DISTINCT", 10)
    bound = composed_epsilon(history, DELTA, "pld", relation)
    monkeypatch.setattr(composition, "_DISTINCT", len(history))
    monkeypatch.setattr(composition, "_FINE", len(history))
    exact = composed_epsilon(history, DELTA, "pld", relation)
    assert exact <= bound < 1.2 * exact


@pytest.mark.parametrize("sigma", [0.6, 2.0])
@pytest.mark.parametrize("relation", ["zero_out", "replace_one"])
def test_a_larger_rate_costs_no_less_at_any_epsilon(sigma: float, relation: Any) -> None:
    """What the rounding rests on, on the losses themselves; also below zero, where composition needs it."""
    found = [
        composition._one_step(sigma, q, 1e-3, relation == "replace_one").get_delta_for_epsilon(
            [-2.0, -0.5, 0.0, 0.1, 1.0, 3.0]
        )
        for q in (0.05, 0.1, 0.2, 0.8)
    ]
    for small, large in itertools.pairwise(found):
        assert all(s <= e + 1e-9 for s, e in zip(small, large, strict=True))


@pytest.mark.full
@pytest.mark.parametrize("method", ["pld", "rdp"])
def test_noise_is_calibrated_to_rates_by_the_step(method: Any) -> None:
    target: dict[str, Any] = {"target_epsilon": 3.0, "target_delta": DELTA, "steps": 12, "method": method}
    rate = schedules.steps(4, 2.0)
    options = {"sample_rate": lambda t: 0.05 * rate(t), "schedule": schedules.exponential(0.95)}
    sigma = calibrate_noise(**target, **options)

    def spent(sigma: float) -> float:
        accountant = PrivacyAccountant(noise_multiplier=sigma, sample_rate=0.05, method=method)
        for t in range(12):
            accountant.step(event=sampled_gaussian(sigma * 0.95**t, 0.05 * rate(t)))
        return accountant.epsilon(DELTA)

    assert spent(sigma) <= 3.0 < spent(sigma * 0.999)
    assert solve(**target, **options) == sigma
    known = {"target_delta": DELTA, "noise_multiplier": sigma, "steps": 12, "method": method}
    assert solve(**known, **options) == pytest.approx(spent(sigma), rel=1e-9)


def test_a_constant_rate_by_the_step_is_the_constant() -> None:
    target: dict[str, Any] = {"target_epsilon": 3.0, "target_delta": DELTA, "steps": 50}
    assert calibrate_noise(**target, sample_rate=lambda t: 0.1) == calibrate_noise(**target, sample_rate=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_multiplier": 1.0, "target_epsilon": 1.0}, r"(?s)something else is sought.*give steps and sample_rate"),
        ({"noise_multiplier": 1.0, "steps": 5, "dataset_size": 10}, r"(?s)the rate is known without.*leave"),
        ({"noise_multiplier": 1.0, "steps": 0}, r"steps is 0: nothing is released"),
        (
            {"target_epsilon": 1.0, "steps": 5, "sample_rate": lambda t: 1.5},
            r"sample_rate of step 0 is 1.5, not in \(0",
        ),
        (
            {"noise_multiplier": 1.0, "steps": 5, "sample_rate": lambda t: 0.2 - 0.1 * t},
            r"sample_rate of step 2 is 0.0",
        ),
    ],
)
def test_what_cannot_be_solved_by_the_step_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        solve(**{"target_delta": DELTA, "sample_rate": lambda t: 0.1, **options})


def test_bands_have_one_rate() -> None:
    with pytest.raises(PrivacyError, match=r"(?s)a schedule, and noise that is correlated over 2 steps"):
        calibrate_noise(target_epsilon=1.0, target_delta=DELTA, sample_rate=lambda t: 0.1, steps=5, bands=2)


# ---- functions of the step


def test_a_step_has_one_value_however_often_it_is_asked_for() -> None:
    calls = itertools.count(1)
    changing = ByStep(lambda step: float(next(calls)), "size")
    assert [changing(3), changing(0), changing(3), changing(0)] == [1.0, 2.0, 1.0, 2.0]


def test_digests_tell_values_apart_in_the_steps_that_they_cover() -> None:
    one, other = ByStep(lambda t: 1.0 + t, "size"), ByStep(lambda t: 1.0 + t + (t == 5), "size")
    assert one.is_of(other.state(5)) and not one.is_of(other.state(6))
    for odd in (None, 3, {}, {"steps": True}, {"steps": 0}, {"steps": -1}, {**one.state(4), "digest": None}):
        assert not one.is_of(odd)


def test_ranks_share_the_draw_of_each_step() -> None:
    size, seed, sizes = 50, 9, lambda t: 5.0 + 10 * t
    options: dict[str, Any] = {"seed": seed, "size": size, "sample_rate": lambda t: sizes(t) / size}
    parts: list[list[list[int]]] = []
    for rank in range(2):
        batches = PoissonBatches(**options, physical_batch_size=8, rank=rank, world_size=2)
        batches.cover(range(4), whole=True)
        parts.append([list(request.indices) for request in batches])
    for step, (one, other) in enumerate(zip(*parts, strict=True)):
        assert sorted(one + other) == poisson_draw(seed, step=step, size=size, sample_rate=sizes(step) / size)
    sums = [len(one) + len(other) for one, other in zip(*parts, strict=True)]
    assert sums[3] > sums[0] + 10


def test_draws_have_the_rates_of_their_steps() -> None:
    """Over many seeds, at six standard deviations."""
    size, runs = 100, 300
    loader = PoissonLoader(list(range(size)), expected_batch_size=lambda t: 5.0 * (1 + 3 * t), seed=1, steps=3)
    for step, expected in enumerate((5.0, 20.0, 35.0)):
        mean = sum(len(loader._sampler.draw(seed, step)) for seed in range(runs)) / runs
        assert abs(mean - expected) < 6 * math.sqrt(expected * (1 - expected / size) / runs)
