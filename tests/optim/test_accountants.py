"""Accountants that count for an optimizer: one of the user's own, one with other releases; none that forgets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from dp_accounting import DpEvent, GaussianDpEvent, LaplaceDpEvent, pld
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import DPOptimizer, PrivacyAccountant, dp_compile, make_private
from dpcompile.errors import PrivacyError


class Own:
    """A user's accountant: dp-accounting's own, told of every event."""

    relation = "add_remove"

    def __init__(self, noise_multiplier: float, sample_rate: float) -> None:
        self.noise_multiplier, self.sample_rate = noise_multiplier, sample_rate
        self.history: list[Any] = []

    @property
    def steps(self) -> int:
        return sum(n for _, _, n in self.history)

    def step(self, n: int = 1, *, event: DpEvent | None = None) -> None:
        assert event is not None
        self.history.append((event.event.noise_multiplier, event.sampling_probability, n))  # type: ignore[attr-defined]

    def move_noise_multiplier(self, value: float) -> None:
        self.noise_multiplier = value

    def epsilon(self, delta: float) -> float:
        from dpcompile.accounting.events import sampled_gaussian

        accountant = pld.PLDAccountant()
        for sigma, q, n in self.history:
            accountant.compose(sampled_gaussian(sigma, q), n)
        return accountant.get_epsilon(delta)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.history = [tuple(run) for run in state_dict["history"]]


class ZeroOut(Own):
    relation = "zero_out"


def stepped(optimizer: Any, model: Any, loader: Any) -> None:
    for x, y in loader:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def private(accountant: Any, sigma: float = 1.0, **options: Any) -> Any:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(20, 4), torch.randint(0, 3, (20,)))
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return make_private(
        model, optimizer, DataLoader(data, batch_size=10), accountant=accountant, noise_multiplier=sigma,
        backend="eager", **options,
    )  # fmt: skip


def test_an_accountant_of_the_users_own_counts() -> None:
    model, optimizer, loader = private(ZeroOut(1.0, 0.5))
    stepped(optimizer, model, loader)
    assert optimizer.accountant.history == [(1.0, 0.5, 1)] * 2
    counted = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.5)
    counted.step(2)
    assert optimizer.accountant.epsilon(1e-5) == pytest.approx(counted.epsilon(1e-5))
    state = optimizer.state_dict()
    json.dumps(state["dpcompile"])
    _, again, _ = private(ZeroOut(1.0, 0.5))
    again.load_state_dict(state)
    assert again.accountant.steps == 2 and again.logical_step == 2


def test_the_accountant_counts_for_its_relation_and_rate() -> None:
    with pytest.raises(PrivacyError, match="sample rate comes from the size of the dataset"):
        private(Own(1.0, 0.5))
    with pytest.raises(PrivacyError, match=r"counts for relation 'add_remove', not 'replace_one'.*\n.*leave relation"):
        private(Own(1.0, 0.5), relation="replace_one")
    with pytest.raises(PrivacyError, match="the accountant assumes 0.4"):
        private(ZeroOut(1.0, 0.4))
    with pytest.raises(PrivacyError, match="adds noise of multiplier 2.0, its accountant counts 1.0"):
        private(ZeroOut(1.0, 0.5), sigma=2.0)
    with pytest.raises(PrivacyError, match=r"(?s)target_epsilon, and an accountant that is made.*what to do: give"):
        private(ZeroOut(1.0, 0.5), sigma=None, target_epsilon=1.0, target_delta=1e-5, steps=3)  # type: ignore[arg-type]


def broken(**changed: Any) -> Any:
    return type("Broken", (ZeroOut,), changed)(1.0, 0.5)


@pytest.mark.parametrize(
    ("accountant", "message"),
    [
        (object(), "a object, lacks noise_multiplier, sample_rate, relation, steps, history, step, move"),
        (ZeroOut, "is <class .*not an object that counts"),
        (broken(epsilon=3), "epsilon of the accountant cannot be called"),
        (broken(relation="swap"), "relation is 'swap'"),
        (broken(state_dict=lambda self: {"history": {1j}}), "not what JSON can hold"),
        (broken(state_dict=lambda self: {}), "no list 'history'"),
        (broken(steps=7), "counts 7 steps, its history 0 and its state 0"),
    ],
)
def test_what_is_no_accountant_is_refused(accountant: Any, message: str) -> None:
    model = dp_compile(nn.Linear(4, 3), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PrivacyError, match=rf"(?s){message}.*what to do: "):
        DPOptimizer(optimizer, model, noise_multiplier=1.0, expected_batch_size=10, accountant=accountant)
    with pytest.raises(PrivacyError, match=rf"(?s){message}.*what to do: "):
        private(accountant)
    _, working, _ = private(ZeroOut(1.0, 0.5))
    with pytest.raises(PrivacyError, match=rf"(?s){message}.*what to do: "):
        working.accountant = accountant


def test_a_name_is_an_accountant_for_make_private_alone() -> None:
    model = dp_compile(nn.Linear(4, 3), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PrivacyError, match="the accountant is 'pld', not an object that counts"):
        DPOptimizer(
            optimizer, model, noise_multiplier=1.0, expected_batch_size=10, accountant="pld",  # type: ignore[arg-type]
        )  # fmt: skip


def test_steps_that_an_accountant_does_not_count_are_refused() -> None:
    model, optimizer, loader = private(broken(step=lambda self, n=1, *, event=None: None))
    before = model.weight.detach().clone()
    with pytest.raises(PrivacyError, match=r"(?s)counted 0 steps, was told of 1 more and counts 0.*let its step"):
        stepped(optimizer, model, loader)
    assert torch.equal(model.weight, before)


def test_a_state_that_an_accountant_does_not_take_up_is_refused_before_anything_is_loaded() -> None:
    model, optimizer, loader = private(ZeroOut(1.0, 0.5))
    stepped(optimizer, model, loader)
    _, other, _ = private(broken(load_state_dict=lambda self, state: None))
    with pytest.raises(PrivacyError, match="counts 0 steps after loading the state of 2"):
        other.load_state_dict(optimizer.state_dict())
    assert other.logical_step == 0
    _, add_remove, _ = private("pld")
    add_remove.accountant._releases = (('{"event_class": "LaplaceDpEvent", "noise_multiplier": 1.0}', 1),)
    with pytest.raises(PrivacyError, match="load the state first"):
        add_remove.load_state_dict(optimizer.state_dict())
    assert add_remove.logical_step == 0


# ---- other releases


def releasing(*events: DpEvent) -> PrivacyAccountant:
    counted = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.5)
    for event in events:
        counted.compose(event)
    return counted


def test_releases_are_saved_and_go_on() -> None:
    model, optimizer, loader = private(releasing(LaplaceDpEvent(2.0)))
    stepped(optimizer, model, loader)
    optimizer.accountant.compose(GaussianDpEvent(5.0))
    assert optimizer.accountant.epsilon(1e-5) > releasing(LaplaceDpEvent(2.0), GaussianDpEvent(5.0)).epsilon(1e-5)
    state = json.loads(json.dumps(optimizer.state_dict()["dpcompile"]))
    inner = {k: v for k, v in optimizer.state_dict().items() if k != "dpcompile"}
    for begun in (releasing(), releasing(LaplaceDpEvent(2.0))):
        _, again, _ = private(begun)
        again.load_state_dict({**inner, "dpcompile": state})
        assert again.accountant.epsilon(1e-5) == optimizer.accountant.epsilon(1e-5)


def test_releases_do_not_disappear() -> None:
    model, optimizer, loader = private(releasing(LaplaceDpEvent(2.0)))
    stepped(optimizer, model, loader)
    other = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.5)
    other.step(2)
    with pytest.raises(PrivacyError, match=r"counts 0 releases LaplaceDpEvent.*counted 1"):
        optimizer.accountant = other
    other.load_state_dict(optimizer.accountant.state_dict())
    optimizer.accountant = other
    other._releases = ()
    with pytest.raises(PrivacyError, match=r"counts 0 releases LaplaceDpEvent.*counted 1"):
        stepped(optimizer, model, loader)
