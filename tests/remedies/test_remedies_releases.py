"""What an accountant is told, and steps beyond those planned: what their messages say to do, tried."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
from private_steps import backward
from remedies import Right, about, data, private, refused, stepped, trains

from dpcompile import PoissonLoader, PrivacyAccountant

TARGET: dict[str, Any] = {"noise_multiplier": None, "target_epsilon": 3.0, "target_delta": 1e-4}


def accountant(**options: Any) -> PrivacyAccountant:
    return PrivacyAccountant(**{"noise_multiplier": 1.0, "sample_rate": 0.1, "method": "rdp", **options})


def alone() -> float:
    counts = accountant()
    counts.step()
    return counts.epsilon(1e-5)


@refused("count it with compose(), once for each time that it was released; step() is for the steps of dpcompile's "
         "mechanism")  # fmt: skip
def test_a_step_of_another_law(told: int) -> Right:
    laplace = pytest.importorskip("dp_accounting").LaplaceDpEvent(10.0)
    counts = accountant()
    counts.step()
    if told:
        counts.compose(laplace)
    else:
        counts.step(event=laplace)
    assert alone() < counts.epsilon(1e-5) <= alone() + 0.1
    return about(counts.epsilon(1e-5))


@refused("make the accountant with method='rdp'")
def test_a_release_of_another_method(told: int) -> Right:
    event = pytest.importorskip("dp_accounting").ZCDpEvent(0.01)
    counts = accountant(method="rdp" if told else "pld")
    counts.step()
    counts.compose(event)
    assert counts.epsilon(1e-5) > alone()
    return about(counts.epsilon(1e-5))


@refused(
    "leave it out here, and add its own epsilon and delta to those of the accountant (basic composition); one is "
    "known for relation 'zero_out' and 'add_remove'",
    ways=3,
)
def test_a_release_of_another_relation(told: int) -> Right:
    event = pytest.importorskip("dp_accounting").LaplaceDpEvent(10.0)
    relations: Any = ("replace_one", "replace_one", "zero_out", "add_remove")
    counts = accountant(method="pld", relation=relations[told])
    counts.step()
    steps_alone = counts.epsilon(1e-5)
    if told == 1:
        return about(steps_alone + 0.1)
    counts.compose(event)
    assert steps_alone < counts.epsilon(1e-5) <= steps_alone + 0.1
    return about(counts.epsilon(1e-5))


@refused(
    "leave it out here, and add its own epsilon and delta to those of the accountant (basic composition)",
)
def test_a_release_of_no_relation(told: int) -> Right:
    counts = accountant(method="pld", relation="replace_one")
    counts.step()
    if not told:
        counts.compose(pytest.importorskip("dp_accounting").ZCDpEvent(0.01))
    return about(counts.epsilon(1e-5) + 0.3)


def falling(step: int) -> float:
    return 12.0 if step < 2 else 4.0


def by_the_draw(on_exceed: Any) -> Any:
    loader = PoissonLoader(data().dataset, expected_batch_size=falling, steps=4)
    return private(loader, **TARGET, steps=4, on_exceed=on_exceed)


def two_steps(model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in itertools.islice(loader, 2):
        backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()


@refused(
    "load the loader's state too (loader.load_state_dict, or load_checkpoint with the loader), and step once per draw; "
    "or pass on_exceed='warn' to make_private and report what the accountant says",
    ways=2,
    slow=True,
)
def test_resuming_without_the_draws(told: int) -> Right:
    before = by_the_draw("raise")
    two_steps(*before)
    model, optimizer, loader = by_the_draw("warn" if told == 2 else "raise")
    model.load_state_dict(before[0].state_dict())
    optimizer.load_state_dict(before[1].state_dict())
    if told == 1:
        loader.load_state_dict(before[2].state_dict())
    weights = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="draw 0 of the loader, and the run has stepped on draw 1")
        two_steps(model, optimizer, loader)
    spent = optimizer.epsilon(1e-4)
    assert (spent > 3.0) == (told == 2), spent
    return stepped(model, optimizer, weights, 4)


def two_passes(passes: int = 2, *also: str, **options: Any) -> Right:
    model, optimizer, loader = private(**{**TARGET, "epochs": 1, **options})
    with warnings.catch_warnings():
        for message in also:
            warnings.filterwarnings("ignore", message=message)
        done = trains(model, optimizer, loader, passes=passes)
    assert (optimizer.epsilon(1e-4) > 3.0) == bool(also)
    return done


@refused("; stop here, or plan the run with more epochs or steps", ways=3, warns=True, slow=True)
def test_a_pass_more_than_planned(told: int) -> Right:
    more: Any = ({}, {}, {"epochs": 2}, {"epochs": None, "steps": 6})[told]
    return two_passes(1 if told == 1 else 2, **more)


@refused("; report what the accountant says", warns=True)
def test_a_step_more_than_planned_that_only_warns(told: int) -> Right:
    return two_passes(2, *["step 4 of a run whose noise is calibrated for 3"] if told else [], on_exceed="warn")


class Deaf(PrivacyAccountant):
    """Takes every step for one of the first sigma."""

    def step(self, n: int = 1, *, event: Any = None) -> None:
        super().step(n)


@refused(
    "let its step() count, and its history show, what event= says, or take a PrivacyAccountant; the sums of this step "
    "were not released",
    ways=2,
)
def test_an_accountant_that_does_not_go_by_the_step(told: int) -> Right:
    class Heeding(Deaf):
        def step(self, n: int = 1, *, event: Any = None) -> None:
            PrivacyAccountant.step(self, n, event=event)

    kind = (Deaf, Heeding, PrivacyAccountant)[told]
    counts = kind(noise_multiplier=1.0, sample_rate=8 / 24, method="rdp")
    return trains(*private(accountant=counts, noise_schedule=lambda step: 1.0 + step / 9))
