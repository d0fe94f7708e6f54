"""Schedules of noise and C: what is set, what is counted, what a calibrated schedule costs, resuming."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fakes import PrivateModel

from dpcompile import DPOptimizer, PrivacyAccountant, PrivacyError, calibrate_noise, schedules
from dpcompile.accounting.composition import composed_epsilon
from dpcompile.accounting.runs import merged, rounded_down

Q, DELTA = 0.1, 1e-5


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpcompile.optim.optimizer.engine_of", lambda model: model.engine)


def optimizer_of(sigma: float = 2.0, accountant: PrivacyAccountant | None = None) -> tuple[PrivateModel, DPOptimizer]:
    model = PrivateModel(a=torch.zeros(3))
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    return model, DPOptimizer(
        inner, model, noise_multiplier=sigma, expected_batch_size=1.0, seed=1, accountant=accountant
    )


def one_step(model: PrivateModel, optimizer: DPOptimizer) -> None:
    model.engine.deliver()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("factor", "wanted"),
    [
        (schedules.exponential(0.5), [1.0, 0.5, 0.25, 0.125]),
        (schedules.steps(2, 0.1), [1.0, 1.0, 0.1, 0.1]),
        (schedules.cosine(2, 0.5), [1.0, 0.75, 0.5, 0.5]),
        (lambda t: 1 + t, [1.0, 2.0, 3.0, 4.0]),
    ],
)
def test_factors_by_step(factor: Any, wanted: list[float]) -> None:
    for kind, number in ((schedules.NoiseSchedule, "noise_multiplier"), (schedules.ClipSchedule, "max_grad_norm")):
        _, optimizer = optimizer_of()
        base = getattr(optimizer, number)
        schedule, found = kind(optimizer, factor), []
        for _ in wanted:
            assert schedule.value == getattr(optimizer, number) == getattr(optimizer.mechanism, number)
            found.append(schedule.value / base)
            schedule.step()
        assert found == pytest.approx(wanted)


def test_each_step_is_counted_with_the_noise_that_it_had() -> None:
    accountant = PrivacyAccountant(noise_multiplier=2.0, sample_rate=Q)
    model, optimizer = optimizer_of(2.0, accountant)
    schedule = schedules.NoiseSchedule(optimizer, schedules.exponential(0.5))
    for _ in range(3):
        one_step(model, optimizer)
        one_step(model, optimizer)
        schedule.step()
    assert accountant.history == [(2.0, Q, 2), (1.0, Q, 2), (0.5, Q, 2)]
    assert accountant.epsilon(DELTA) == composed_epsilon(accountant.history, DELTA, "pld", "zero_out")


def test_the_noise_drawn_is_that_of_the_step() -> None:
    model, optimizer = optimizer_of(2.0)
    schedules.NoiseSchedule(optimizer, lambda t: 0.25)
    plain, other = optimizer_of(0.5)
    one_step(model, optimizer)
    one_step(plain, other)
    torch.testing.assert_close(model.a, plain.a)


@pytest.mark.full
@pytest.mark.parametrize("method", ["pld", "rdp"])
def test_a_calibrated_schedule_meets_its_target(method: Any) -> None:
    factor, steps = schedules.exponential(0.9), 20
    target: dict[str, Any] = {"target_epsilon": 3.0, "target_delta": DELTA, "sample_rate": Q, "steps": steps}
    sigma = calibrate_noise(**target, schedule=factor, method=method)

    def spent(sigma: float) -> float:
        return composed_epsilon([(sigma * factor(t), Q, 1) for t in range(steps)], DELTA, method, "zero_out")

    assert spent(sigma) <= 3.0 < spent(sigma * 0.999)
    assert sigma > calibrate_noise(**target, method=method)


def test_a_schedule_of_ones_is_no_schedule() -> None:
    target: dict[str, Any] = {"target_epsilon": 3.0, "target_delta": DELTA, "sample_rate": Q, "steps": 50}
    assert calibrate_noise(**target, schedule=lambda t: 1) == calibrate_noise(**target)


@pytest.mark.parametrize("factor", [lambda t: 0, lambda t: -1.0, lambda t: math.nan, lambda t: 1 if t < 3 else 0])
def test_a_schedule_that_takes_the_noise_away_is_refused(factor: Any) -> None:
    with pytest.raises(PrivacyError, match=r"(?s)multiplies the noise of step . by .*finite numbers above 0"):
        calibrate_noise(target_epsilon=1, target_delta=DELTA, sample_rate=Q, steps=5, schedule=factor)
    _, optimizer = optimizer_of()
    for odd in (-1.0, math.nan, math.inf):
        with pytest.raises(PrivacyError, match=f"noise_multiplier is {odd}"):
            optimizer.move_noise_multiplier(odd)


def test_less_noise_than_a_target_was_calibrated_to_is_refused() -> None:
    _, optimizer = optimizer_of(2.0, PrivacyAccountant(noise_multiplier=2.0, sample_rate=Q))
    optimizer.plan(10)
    optimizer.move_noise_multiplier(2.5)
    with pytest.raises(PrivacyError, match=r"(?s)from 2.5 to 1.0.*calibrated to for 10 steps.*schedule=factor"):
        optimizer.move_noise_multiplier(1.0)
    assert optimizer.noise_multiplier == optimizer.mechanism.noise_multiplier == 2.5
    with pytest.raises(PrivacyError, match="calibrated to"):
        schedules.NoiseSchedule(optimizer, schedules.exponential(0.5)).step()


def test_noise_that_is_merely_assigned_is_refused() -> None:
    model, optimizer = optimizer_of(2.0, PrivacyAccountant(noise_multiplier=2.0, sample_rate=Q))
    optimizer.noise_multiplier = 0.01
    model.engine.deliver()
    with pytest.raises(PrivacyError, match=r"(?s)multiplier 0.01, its accountant counts 2.0.*schedules.NoiseSchedule"):
        optimizer.step()


def test_only_private_optimizers_have_schedules() -> None:
    plain = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(
        PrivacyError, match=r"(?s)NoiseSchedule was given a SGD.*what DPOptimizer or make_private returned"
    ):
        schedules.NoiseSchedule(plain, schedules.exponential(0.5))  # type: ignore[arg-type]


def test_a_resumed_run_goes_on_with_schedule_and_history() -> None:
    def run(resumed: dict[str, Any] | None, count: int) -> dict[str, Any]:
        accountant = PrivacyAccountant(noise_multiplier=2.0, sample_rate=Q)
        model, optimizer = optimizer_of(2.0, accountant)
        noise = schedules.NoiseSchedule(optimizer, schedules.exponential(0.5))
        bound = schedules.ClipSchedule(optimizer, schedules.exponential(0.25))
        if resumed is not None:
            noise.load_state_dict(resumed["noise"])
            bound.load_state_dict(resumed["bound"])
            optimizer.load_state_dict(resumed["optimizer"])
            model.load_state_dict(resumed["model"])
        for _ in range(count):
            one_step(model, optimizer)
            noise.step()
            bound.step()
        states = {"noise": noise, "bound": bound, "optimizer": optimizer, "model": model}
        return {name: x.state_dict() for name, x in states.items()} | {"history": accountant.history}

    whole, half = run(None, 4), run(None, 2)
    again = run(half, 2)
    assert again["history"] == whole["history"] and again["noise"] == whole["noise"] == {"base": 2.0, "last_step": 4}
    torch.testing.assert_close(again["model"]["a"], whole["model"]["a"])


def test_a_state_of_other_noise_says_that_schedules_are_loaded_first() -> None:
    model, optimizer = optimizer_of(2.0)
    schedule = schedules.NoiseSchedule(optimizer, schedules.exponential(0.5))
    one_step(model, optimizer)
    schedule.step()
    _, fresh = optimizer_of(2.0)
    with pytest.raises(
        PrivacyError, match=r"(?s)noise_multiplier was 1.0 .* and is 2.0 here.*load the schedule's state first"
    ):
        fresh.load_state_dict(optimizer.state_dict())


# ---- many kinds of steps


def test_steps_are_rounded_to_less_noise_and_none_is_lost() -> None:
    history = [(2.0 * 0.99**t, q, 1 + t % 3) for t in range(200) for q in (0.1, 0.01)]
    for most in (1, 7, 32, 199):
        fewer = rounded_down(history, most)
        assert len(fewer) <= 2 * most
        for rate in (0.1, 0.01):
            true = sorted(s for s, q, n in history if q == rate for _ in range(n))
            down = sorted(s for s, q, n in fewer if q == rate for _ in range(n))
            assert len(true) == len(down) and all(d <= t for d, t in zip(down, true, strict=True))
    assert rounded_down(history, 400) is history
    assert merged([(1.0, 0.1, 2), (2.0, 0.1, 1), (1.0, 0.1, 3)]) == [(1.0, 0.1, 5), (2.0, 0.1, 1)]


@pytest.mark.full
def test_epsilon_of_a_schedule_is_a_bound_and_close(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpcompile.accounting import composition

    history = [(2.0 * 0.98**t, Q, 1) for t in range(60)]
    bound = composed_epsilon(history, DELTA, "pld", "zero_out")
    monkeypatch.setattr(composition, "_DISTINCT", 60)
    monkeypatch.setattr(composition, "_FINE", 60)
    exact = composed_epsilon(history, DELTA, "pld", "zero_out")
    assert exact <= bound < 1.03 * exact
