"""Solving for what is not given, and schedules by the step: what their messages say to do, tried."""

from __future__ import annotations

from typing import Any

from remedies import Right, about, refused

from dpcompile import solve
from dpcompile.accounting.sweeps import sweep_cost

GIVEN: dict[str, Any] = {"target_delta": 1e-5, "noise_multiplier": 1.0, "sample_rate": 0.1, "method": "rdp"}


@refused(
    "leave out exactly one of target_epsilon, noise_multiplier, steps and sample_rate (or "
    "expected_batch_size, with dataset_size): the one to be found",
    ways=2,
)
def test_solving_for_nothing(told: int) -> Right:
    rest: Any = [{"steps": 5, "target_epsilon": 3.0}, {"steps": 5}, {"target_epsilon": 3.0}][told]
    return about(float(solve(**GIVEN, **rest)))


@refused("give an integer, 0 or more and below 2**63")
def test_steps_below_zero(told: int) -> Right:
    return about(solve(**GIVEN, steps=5 if told else -5))


@refused("give 1 or more")
def test_solving_for_no_steps(told: int) -> Right:
    return about(solve(**GIVEN, steps=1 if told else 0))


@refused("leave one of them out; with dataset_size the rate is expected_batch_size / dataset_size", ways=2)
def test_solving_with_a_size_that_is_not_needed(told: int) -> Right:
    rest: Any = [{"sample_rate": 0.1, "dataset_size": 80}, {"sample_rate": 0.1},
                 {"expected_batch_size": 8, "dataset_size": 80}][told]  # fmt: skip
    return about(solve(target_delta=1e-5, noise_multiplier=1.0, method="rdp", steps=5, **rest))


@refused("give both, or sample_rate, which is their ratio", ways=2)
def test_solving_without_the_size(told: int) -> Right:
    rest: Any = [{"expected_batch_size": 8}, {"expected_batch_size": 8, "dataset_size": 80}, {"sample_rate": 0.1}][told]
    return about(solve(target_delta=1e-5, noise_multiplier=1.0, method="rdp", steps=5, **rest))


@refused("give a number above 0, up to dataset_size")
def test_solving_with_a_batch_larger_than_the_data(told: int) -> Right:
    solved = solve(target_delta=1e-5, noise_multiplier=1.0, method="rdp", steps=5,
                   expected_batch_size=80 if told else 81, dataset_size=80)  # fmt: skip
    return about(solved)


@refused("raise target_epsilon, target_delta or noise_multiplier", ways=3, slow=True)
def test_solving_for_what_one_step_exceeds(told: int) -> Right:
    target, delta, noise = [(0.01, 1e-5, 1.0), (30.0, 1e-5, 1.0), (0.01, 0.5, 1.0), (0.01, 1e-5, 1000.0)][told]
    found = solve(target_epsilon=target, target_delta=delta, noise_multiplier=noise, sample_rate=0.5, method="rdp")
    return about(float(found))


@refused("give steps and sample_rate (a number or a function), and one of target_epsilon and noise_multiplier")
def test_solving_with_a_schedule_for_the_steps(told: int) -> Right:
    rest: Any = {"steps": 5} if told else {"target_epsilon": 30.0}
    return about(solve(**GIVEN, schedule=lambda step: 1.0 + step / 9, **rest))


@refused("leave expected_batch_size and dataset_size out")
def test_solving_with_a_rate_by_the_step_and_a_size(told: int) -> Right:
    rest: Any = {} if told else {"dataset_size": 80}
    found = solve(target_delta=1e-5, noise_multiplier=1.0, method="rdp", steps=5,
                  sample_rate=lambda step: 0.1 + step / 100, **rest)  # fmt: skip
    return about(found)


CAPPED: dict[str, Any] = {"target_delta": 1e-5, "noise_multiplier": 2.0, "method": "pld"}


@refused("give truncation=(dataset_size, max_batch_size) with the same size")
def test_solving_with_a_cap_of_other_data(told: int) -> Right:
    found = solve(**CAPPED, steps=2, expected_batch_size=8, dataset_size=80, truncation=(80 if told else 90, 20))
    return about(found)


@refused("give the rate and leave out another one; plan_privacy tells epsilon of several")
def test_solving_for_the_rate_of_capped_draws(told: int) -> Right:
    rest: Any = {"sample_rate": 0.1} if told else {"target_epsilon": 3.0}
    return about(solve(**CAPPED, steps=2, truncation=(80, 20), **rest))


@refused("give the number of trainings on the data, 1 or more")
def test_a_sweep_of_no_runs(told: int) -> Right:
    found = sweep_cost(noise_multiplier=1.0, sample_rate=0.1, steps=5, runs=2 if told else 0, target_delta=1e-5)
    return about(found.composed)


@refused("give steps and noise_multiplier above 0")
def test_a_sweep_without_noise(told: int) -> Right:
    found = sweep_cost(noise_multiplier=1.0 if told else 0.0, sample_rate=0.1, steps=5, runs=2, target_delta=1e-5)
    return about(found.composed)


@refused("give a schedule of finite numbers above 0")
def test_a_schedule_that_comes_to_zero(told: int) -> Right:
    return about(solve(**GIVEN, steps=5, schedule=lambda step: 1.0 - step / (5 if told else 4)))


@refused("give a function whose values are finite, above 0 and within these bounds, at every step")
def test_a_rate_by_the_step_above_one(told: int) -> Right:
    given = {**GIVEN, "sample_rate": lambda step: (step + 1) / (5 if told else 4)}
    return about(solve(**given, steps=5))


@refused("give a function that has a number for every step from 0 on")
def test_a_rate_by_the_step_that_ends(told: int) -> Right:
    rates = [0.1] * 5 if told else [0.1] * 4
    return about(solve(**{**GIVEN, "sample_rate": lambda step: rates[step]}, steps=5))
