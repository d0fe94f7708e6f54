"""Accounting: what its messages say to do, tried."""

from __future__ import annotations

from typing import Any

import pytest
from remedies import Right, about, equals, refused

from dpcompile import PrivacyAccountant, calibrate_noise, plan_privacy

TARGET: dict[str, Any] = {"target_epsilon": 3.0, "target_delta": 1e-5, "method": "rdp"}


def accountant(**options: Any) -> PrivacyAccountant:
    return PrivacyAccountant(**{"noise_multiplier": 1.0, "sample_rate": 0.1, "method": "rdp", **options})


def counted(**options: Any) -> Right:
    counts = accountant(**options)
    counts.step()
    return about(counts.epsilon(1e-5))


@refused("give a finite number, 0 or more (0: epsilon is infinite)")
def test_a_noise_multiplier_below_zero(told: int) -> Right:
    return counted(noise_multiplier=1.0 if told else -1.0)


@refused("give the expected batch size divided by the size of the dataset")
def test_a_rate_above_one(told: int) -> Right:
    return counted(sample_rate=8 / 64 if told else 8)


@refused("give a number well below 1 / size of the dataset")
def test_a_delta_of_one(told: int) -> Right:
    counts = accountant()
    counts.step()
    return about(counts.epsilon(1e-5 if told else 1.0))


@refused("give a number, 0 or more")
def test_an_epsilon_below_zero(told: int) -> Right:
    counts = accountant()
    counts.step()
    return about(counts.delta(0.5 if told else -0.5))


@refused("give a number in [0, 1]")
def test_a_rate_of_false_positives_in_per_cent(told: int) -> Right:
    counts = accountant(method="pld")
    counts.step()
    return about(counts.true_positive_rate(0.05 if told else 5))


@refused("give a finite number above 0")
def test_a_target_of_zero(told: int) -> Right:
    return about(calibrate_noise(**{**TARGET, "target_epsilon": 3.0 if told else 0.0}, sample_rate=0.1, steps=5))


@refused("give an integer, 1 or more (1: noise without correlation)")
def test_bands_of_zero(told: int) -> Right:
    return about(calibrate_noise(**TARGET, sample_rate=0.1, steps=5, bands=1 if told else 0))


@refused("take relation='zero_out' or 'add_remove', or bands=1", ways=3, slow=True)
def test_bands_for_another_relation(told: int) -> Right:
    relation: Any = ("replace_one", "zero_out", "add_remove", "replace_one")[told]
    return about(
        calibrate_noise(
            target_epsilon=3.0, target_delta=1e-5, sample_rate=0.1, steps=4, bands=1 if told == 3 else 2,
            relation=relation, method="pld",
        )
    )  # fmt: skip


@refused("take 'pld' or 'rdp'", ways=2)
def test_an_unknown_method(told: int) -> Right:
    methods: Any = ("prv", "pld", "rdp")
    return counted(method=methods[told])


@refused("take 'zero_out', 'add_remove' or 'replace_one'", ways=3)
def test_an_unknown_relation(told: int) -> Right:
    relations: Any = ("substitute", "zero_out", "add_remove", "replace_one")
    return counted(relation=relations[told], method="pld")


@refused("take method='pld' (accountant='pld' in make_private)")
def test_renyi_for_one_replaced(told: int) -> Right:
    return counted(relation="replace_one", method="pld" if told else "rdp")


@refused("give the number of logical steps of the training")
def test_nothing_to_calibrate(told: int) -> Right:
    return about(calibrate_noise(**TARGET, sample_rate=0.1, steps=5 if told else 0))


@refused("leave out the one or the other", ways=2)
def test_a_schedule_and_bands(told: int) -> Right:
    schedule = None if told == 1 else lambda step: 1.0 + step / 4
    return about(calibrate_noise(**TARGET, sample_rate=0.1, steps=4, bands=1 if told == 2 else 2, schedule=schedule))


@refused("raise target_epsilon or target_delta, or take method='pld' (accountant='pld' in make_private)", ways=3)
def test_a_target_that_renyi_does_not_meet(told: int) -> Right:
    target, delta = [(0.01, 1e-9), (3.0, 1e-9), (0.01, 0.5), (0.01, 1e-9)][told]
    method: Any = "pld" if told == 3 else "rdp"
    return about(calibrate_noise(target_epsilon=target, target_delta=delta, sample_rate=1.0, steps=1000, method=method))


@refused("raise target_epsilon or target_delta, or train fewer steps", ways=3, slow=True)
def test_a_target_that_no_noise_meets(told: int) -> Right:
    target, delta, steps = [(1e-4, 1e-10, 10**5), (3.0, 1e-10, 10**5), (1e-4, 0.5, 10**5), (1e-4, 1e-10, 1)][told]
    return about(calibrate_noise(target_epsilon=target, target_delta=delta, sample_rate=1.0, steps=steps))


@refused("give a schedule of finite numbers above 0")
def test_a_schedule_with_a_step_without_noise(told: int) -> Right:
    return about(
        calibrate_noise(**TARGET, sample_rate=0.1, steps=4, schedule=lambda step: step + 1.0 if told else step)
    )


@refused("give one of them: the other is what the plan tells", ways=2)
def test_a_plan_of_both(told: int) -> Right:
    noise: Any = {} if told == 2 else {"noise_multiplier": 1.0}
    target: Any = {} if told == 1 else {"target_epsilon": 3.0}
    rows = plan_privacy(
        dataset_size=100, expected_batch_sizes=[10], steps=[5], target_delta=1e-5, method="rdp", **noise, **target
    )
    return about(rows.rows[0].epsilon)


@refused("give one of them, a list")
def test_a_plan_without_a_length(told: int) -> Right:
    length: Any = {"steps": [5]} if told else {}
    rows = plan_privacy(
        dataset_size=100, expected_batch_sizes=[10], target_delta=1e-5, noise_multiplier=1.0, method="rdp", **length
    )
    return about(rows.rows[0].epsilon)


@refused("give a finite number above 0")
def test_a_plan_with_a_bound_of_zero(told: int) -> Right:
    rows = plan_privacy(
        dataset_size=100, expected_batch_sizes=[10], target_delta=1e-5, noise_multiplier=1.0, steps=[5], method="rdp",
        max_grad_norm=1.0 if told else 0.0,
    )  # fmt: skip
    return about(rows.rows[0].epsilon)


@refused("give a list of numbers")
def test_a_plan_with_a_number_for_a_list(told: int) -> Right:
    steps: Any = [5] if told else "5"
    rows = plan_privacy(
        dataset_size=100, expected_batch_sizes=[10], target_delta=1e-5, noise_multiplier=1.0, steps=steps, method="rdp"
    )
    return about(rows.rows[0].epsilon)


@refused("give numbers above 0; a batch is no larger than the dataset")
def test_a_plan_with_a_batch_larger_than_the_data(told: int) -> Right:
    sizes = [100] if told else [1000]
    rows = plan_privacy(
        dataset_size=100, expected_batch_sizes=sizes, target_delta=1e-5, noise_multiplier=1.0, steps=[5], method="rdp"
    )
    return about(rows.rows[0].epsilon)


@refused("give (dataset_size, max_batch_size), two integers above 0, as loader.truncation has them", slow=True)
def test_a_cap_that_is_one_number(told: int) -> Right:
    cap: Any = (80, 20) if told else 20
    return counted(truncation=cap, method="pld")


@refused("take method='pld' (accountant='pld' in make_private), or leave the cap out", ways=2)
def test_a_cap_and_renyi(told: int) -> Right:
    return counted(truncation=None if told == 2 else (80, 20), method="pld" if told == 1 else "rdp")


@refused(
    "take relation='zero_out' or 'replace_one', for which the size is public, or leave the cap out", ways=3, slow=True
)
def test_a_cap_and_add_remove(told: int) -> Right:
    relations: Any = ("add_remove", "zero_out", "replace_one", "add_remove")
    return counted(truncation=None if told == 3 else (80, 20), relation=relations[told], method="pld")


@refused("make the accountant with the relation of the saved run")
def test_steps_of_another_relation(told: int) -> Right:
    saved = accountant(relation="zero_out")
    saved.step()
    counts = accountant(relation="zero_out" if told else "add_remove")
    counts.load_state_dict(saved.state_dict())
    return equals(counts.epsilon(1e-5), saved.epsilon(1e-5))


def gaussian(noise_multiplier: float = 5.0) -> Any:
    return pytest.importorskip("dp_accounting").GaussianDpEvent(noise_multiplier)


@refused("load the state first, and compose what it does not hold afterwards")
def test_a_release_before_the_state(told: int) -> Right:
    saved = accountant()
    saved.step()
    counts = accountant()
    if not told:
        counts.compose(gaussian())
    counts.load_state_dict(saved.state_dict())
    if told:
        counts.compose(gaussian())
    return about(counts.epsilon(1e-5))


@refused(
    "bound it by one of these, such as pure epsilon by ZCDpEvent(epsilon**2 / 2); or leave it out here, and "
    "add its own epsilon and delta to those of the accountant (basic composition)",
    ways=2,
)
def test_a_release_that_is_not_known(told: int) -> Right:
    events = pytest.importorskip("dp_accounting")
    counts = accountant()
    counts.step()
    alone = counts.epsilon(1e-5)
    if told < 2:
        counts.compose(
            events.ZCDpEvent(0.1**2 / 2) if told else events.SampledWithReplacementDpEvent(100, 10, gaussian())
        )
    return about(counts.epsilon(1e-5) if told == 1 else alone + 0.1)


@refused("give the number that dp_accounting documents for it")
def test_a_release_without_its_number(told: int) -> Right:
    counts = accountant()
    counts.compose(gaussian(5.0 if told else float("nan")))
    return about(counts.epsilon(1e-5))


def resumed(state: Any) -> Right:
    counts = accountant()
    counts.load_state_dict(state)
    return about(counts.epsilon(1e-5))


def saved_state() -> Any:
    saved = accountant()
    saved.step(3)
    saved.compose(gaussian())
    return saved.state_dict()


@refused("load what PrivacyAccountant.state_dict() returned")
def test_a_state_without_its_history(told: int) -> Right:
    return resumed(saved_state() if told else {k: v for k, v in saved_state().items() if k != "history"})


@refused("load what PrivacyAccountant.state_dict() returned")
def test_a_history_of_something_else(told: int) -> Right:
    return resumed(saved_state() if told else {**saved_state(), "history": [["one", 2]]})


@refused("load what PrivacyAccountant.state_dict() returned")
def test_a_history_of_other_rates(told: int) -> Right:
    return resumed(saved_state() if told else {**saved_state(), "history": [[1.0, [0.1, 80], 3]]})


@refused("load what PrivacyAccountant.state_dict() returned")
def test_releases_without_how_often(told: int) -> Right:
    return resumed(saved_state() if told else {**saved_state(), "releases": ["GaussianDpEvent"]})


@refused("load what PrivacyAccountant.state_dict() returned")
def test_releases_that_are_none(told: int) -> Right:
    return resumed(saved_state() if told else {**saved_state(), "releases": [["GaussianDpEvent", 1]]})


@refused("give a number far below delta, such as 1e-8")
def test_a_slack_of_one(told: int) -> Right:
    counts = accountant()
    counts.step()
    return about(counts.gaussian_bound(1e-8 if told else 1.0).mu)


@refused("give the number of examples, 1 or more")
def test_a_plan_for_no_data(told: int) -> Right:
    rows = plan_privacy(dataset_size=100 if told else 0, expected_batch_sizes=[10], target_delta=1e-5,
                        noise_multiplier=1.0, steps=[5], method="rdp")  # fmt: skip
    return about(rows.rows[0].epsilon)


@refused("give a delta well below that, such as 0.001")
def test_a_plan_with_a_delta_as_large_as_one_of_the_data(told: int) -> Right:
    rows = plan_privacy(dataset_size=100, expected_batch_sizes=[10], target_delta=0.001 if told else 0.01,
                        noise_multiplier=1.0, steps=[5], method="rdp")  # fmt: skip
    return about(rows.rows[0].epsilon)
