"""DPOptimizer with a mechanism that is not ours: another file adds it, and none of ours changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from dp_accounting import DpEvent, NonPrivateDpEvent
from fakes import PrivateModel, engine_of
from torch import Tensor

from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.errors import PrivacyError
from dpcompile.noise.mechanism import GaussianMechanism, Release
from dpcompile.noise.normal import gaussian
from dpcompile.optim import optimizer as optim
from dpcompile.optim.optimizer import DPOptimizer


@pytest.fixture(autouse=True)
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "engine_of", engine_of)


@dataclass
class Differences:
    """The noise of a step less half of that of the step before: a state that has to be resumed."""

    noise_multiplier: float = 1.0
    max_grad_norm: float = 1.0
    expected_batch_size: float = 2.0
    seed: int = 3
    secure: bool = False
    before: int | None = None
    bands: int = 1  # nothing is counted

    def noise(self, step: int | None, parameter: int, like: Tensor) -> Tensor:
        if step is None:
            return torch.zeros_like(like)
        return gaussian(self.seed, step=step, parameter=parameter, numel=like.numel(), dtype=like.dtype).view_as(like)

    def release(self, release: Release) -> None:
        for total, parameter in zip(release.totals, release.parameters, strict=True):
            total += self.noise(release.step, parameter, total) - self.noise(self.before, parameter, total) / 2
            total /= self.expected_batch_size
        self.before = release.step

    def event(self, sample_rate: float) -> DpEvent:
        return NonPrivateDpEvent()

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seed, self.before = state["seed"], state["before"]


def stepped(optimizer: DPOptimizer, model: PrivateModel, n: int) -> list[Tensor]:
    for _ in range(n):
        model.engine.deliver(a=torch.ones(5))
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def made(kind: Any = torch.optim.Adam, **options: Any) -> tuple[PrivateModel, DPOptimizer]:
    model = PrivateModel(1.0, a=torch.zeros(5), b=torch.zeros(2, 3))
    return model, DPOptimizer(kind(model.parameters(), lr=0.1), model, **options)


def test_an_update_is_what_the_mechanism_released() -> None:
    model, optimizer = made(torch.optim.SGD, mechanism=Differences())
    found = stepped(optimizer, model, 3)
    for i, sums in enumerate((torch.ones(5), torch.zeros(2, 3))):
        own = Differences()
        noise = [own.noise(step, i, sums) for step in range(3)]
        wanted = -0.1 * (3 * sums + noise[2] + noise[1] / 2 + noise[0] / 2) / 2
        torch.testing.assert_close(found[i], wanted)


def test_its_state_is_resumed() -> None:
    model, optimizer = made(mechanism=Differences())
    stepped(optimizer, model, 2)
    state, weights = copy.deepcopy(optimizer.state_dict()), {n: p.detach().clone() for n, p in model.named_parameters()}
    wanted = stepped(optimizer, model, 2)
    model, optimizer = made(mechanism=Differences(seed=4))
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    for found, value in zip(stepped(optimizer, model, 2), wanted, strict=True):
        assert torch.equal(found, value)


def test_the_gaussian_one_is_what_its_numbers_make() -> None:
    numbers = {"noise_multiplier": 1.5, "expected_batch_size": 3.0, "seed": 7}
    one, other = made(**numbers), made(mechanism=GaussianMechanism(1.5, 1.0, 3.0, 7))
    runs = [stepped(optimizer, model, 3) for model, optimizer in (one, other)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    assert (other[1].noise_multiplier, other[1].expected_batch_size, other[1].seed) == (1.5, 3.0, 7)


def test_numbers_given_twice_or_not_at_all() -> None:
    for more in ({"noise_multiplier": 0.0}, {"expected_batch_size": 1.0}, {"seed": 0}, {"secure": True}):
        with pytest.raises(PrivacyError, match="(?s)a mechanism was given, and noise_multiplier.*mechanism alone"):
            made(mechanism=Differences(), **more)
    for less in ({}, {"noise_multiplier": 1.0}, {"expected_batch_size": 1.0}):
        with pytest.raises(
            PrivacyError, match="(?s)no noise_multiplier or no expected_batch_size.*give both, or a mech"
        ):
            made(**less)


def test_another_bound_than_the_models() -> None:
    with pytest.raises(PrivacyError, match=r"(?s)sums clipped to 0\.5, the model clips to 1\.0.*same max_grad_norm"):
        made(mechanism=Differences(max_grad_norm=0.5))
    mechanism = Differences()
    model, optimizer = made(mechanism=mechanism)
    mechanism.max_grad_norm = 0.5
    with pytest.raises(PrivacyError, match="the model clips to"):
        stepped(optimizer, model, 1)


def test_steps_that_the_accountant_cannot_count() -> None:
    model, optimizer = made(
        mechanism=Differences(), accountant=PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1)
    )
    with pytest.raises(PrivacyError, match="cannot be counted: it is no Gaussian mechanism on a Poisson sample"):
        stepped(optimizer, model, 1)
    assert all((p == 0).all() for p in model.parameters())


def test_what_lacks_something_is_no_mechanism() -> None:
    class Half(Differences):
        def __getattribute__(self, name: str) -> Any:
            if name == "bands":
                raise AttributeError(name)
            return super().__getattribute__(name)

    with pytest.raises(PrivacyError, match=r"(?s)the mechanism, a Half, lacks bands.*noise.mechanism.Mechanism names"):
        made(mechanism=Half())
