"""DPOptimizer and PoissonLoader with correlated noise: rows go with draws, and what is not proved is refused."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from fakes import PrivateModel, engine_of
from torch import Tensor
from torch.utils.data import TensorDataset

from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.data import loader as data
from dpcompile.data.loader import PoissonLoader
from dpcompile.errors import PrivacyError
from dpcompile.noise.banded import BandedMechanism
from dpcompile.noise.mechanism import GaussianMechanism, Release
from dpcompile.noise.strategy import optimal_coefficients
from dpcompile.optim import optimizer as optim
from dpcompile.optim import update
from dpcompile.optim.optimizer import DPOptimizer
from dpcompile.schedules import ClipSchedule, NoiseSchedule

N, BATCH, BANDS, SIGMA = 60, 6.0, 3, 1.5
RATE = BATCH * BANDS / N


@pytest.fixture(autouse=True)
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "engine_of", engine_of)
    monkeypatch.setattr(data, "engine_of", engine_of)
    gc.collect()  # optimizers of earlier tests, of the same seeds


def mechanism(bands: int = BANDS, seed: int = 5, **more: Any) -> BandedMechanism:
    return BandedMechanism(SIGMA, 1.0, BATCH, seed, coefficients=optimal_coefficients(bands, 20), **more)


def loader_of(bands: int = BANDS, seed: int = 2, n: int = N, **more: Any) -> PoissonLoader:
    x = torch.arange(1.0, n + 1)
    return PoissonLoader(TensorDataset(x), expected_batch_size=BATCH, bands=bands, seed=seed, steps=8, **more)


class Run:
    """A model of one number, its optimizer, and the loader that is attached to both."""

    def __init__(self, loader: PoissonLoader | None = None, own: Any = None, **accounted: Any) -> None:
        self.model = PrivateModel(1.0, a=torch.zeros(1))
        self.loader = loader_of() if loader is None else loader
        self.accountant = PrivacyAccountant(noise_multiplier=SIGMA, sample_rate=RATE, **accounted)
        inner = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.optimizer = DPOptimizer(inner, self.model, mechanism=own or mechanism(), accountant=self.accountant)
        self.loader.attach(self.model, self.optimizer)

    def train(self, batches: Any = None, stop: int = 10**9) -> list[float]:
        """Weights after every step."""
        found = []
        for (x,) in self.loader if batches is None else batches:
            self.backward(x)
            self.optimizer.step()
            self.optimizer.zero_grad()
            found.append(self.model.a.item())
            if len(found) == stop:
                break
        return found

    def backward(self, x: Tensor) -> None:
        self.model.engine.backward(x, torch.full_like(x, 0.1))


def expected(loader: PoissonLoader, steps: list[int]) -> list[float]:
    """The weights when these draws are stepped on, each with the row of its own number."""
    drawn: list[int] = []
    for batch in loader_of(seed=loader.seed).batches():
        assert batch.ends_step
        drawn.append(int(batch.mask.sum()))
    own, weight, found = mechanism(), torch.zeros(1), []
    for step in range(max(steps) + 1):
        total = torch.full((1,), 0.1) * drawn[step]
        own.release(Release([total], [0], step))
        if step in steps:
            weight = weight - total
            found.append(weight.item())
    return found


def test_rows_go_with_draws() -> None:
    run = Run()
    assert run.train() == pytest.approx(expected(run.loader, list(range(8))), abs=1e-5)


def test_the_accountant_is_right_at_every_step() -> None:
    run = Run()
    for step, (x,) in enumerate(run.loader):
        run.backward(x)
        run.optimizer.step()
        run.optimizer.zero_grad()
        assert run.accountant.history == [(SIGMA, RATE, -(-(step + 1) // BANDS))]
        state = copy.deepcopy(run.optimizer.state_dict())
        other = Run(loader_of(seed=9), mechanism(seed=6))
        other.optimizer.load_state_dict(state)
        assert other.accountant.history == run.accountant.history


def test_draws_that_are_left_out_take_their_rows_along() -> None:
    """A pass broken off, a batch given up: the rows are made, counted and not released."""
    run = Run()
    found = run.train(stop=2)
    batches = iter(run.loader)
    next(batches)
    run.optimizer.discard()  # draw 2
    found += run.train(batches, stop=1)
    (x,) = next(batches)
    run.backward(x)
    run.optimizer.discard()  # draw 4, after its backward
    found += run.train(batches, stop=1)
    assert found == pytest.approx(expected(run.loader, [0, 1, 3, 5]), abs=1e-5)
    assert run.optimizer.logical_step == 6 and run.accountant.history == [(SIGMA, RATE, 2)]


def test_resumed_it_goes_on_bit_by_bit() -> None:
    run = Run()
    run.train(stop=5)
    kept = [copy.deepcopy(x.state_dict()) for x in (run.model, run.optimizer, run.loader)]
    wanted = run.train(stop=3)
    del run
    gc.collect()
    other = Run(loader_of(seed=8), mechanism(seed=7))
    for part, state in zip((other.model, other.optimizer, other.loader), kept, strict=True):
        part.load_state_dict(state)
    found = [*other.train()]
    assert found == wanted
    assert other.accountant.history == [(SIGMA, RATE, 3)]


def test_a_fused_adam_steps_on_what_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients and moments too: Adam's weights do not show a divisor."""
    fused: list[bool] = []
    original = update.fused_adam.update_
    monkeypatch.setattr(update.fused_adam, "update_", lambda *a: fused.append(original(*a)) or fused[-1])
    runs = []
    for kind in (torch.optim.AdamW, type("Other", (torch.optim.AdamW,), {})):
        model, own = PrivateModel(1.0, a=torch.zeros(50), b=torch.zeros(3, 4)), mechanism()
        loader = loader_of()
        optimizer = DPOptimizer(kind(model.parameters(), lr=0.1), model, mechanism=own)
        loader.attach(model, optimizer)
        found: list[Tensor | None] = []
        for step in range(5):
            model.engine.feed.draws.last = step
            model.engine.deliver(a=torch.ones(50))
            optimizer.step()
            found += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            optimizer.zero_grad()
        found += [optimizer.state[p][n].clone() for p in model.parameters() for n in ("exp_avg", "exp_avg_sq")]
        runs.append(found + [p.detach().clone() for p in model.parameters()])
        del optimizer, model
        gc.collect()
    assert fused == [True] * 5 + [False] * 5
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# ---- refusals


def refused(match: str) -> Any:
    return pytest.raises(PrivacyError, match=f"(?s){match}")


def test_a_loader_of_other_parts() -> None:
    for bands in (1, 2, 4):
        with refused(f"noise is correlated over 3 steps, and the loader .*give PoissonLoader bands={BANDS}"):
            Run(PoissonLoader(TensorDataset(torch.ones(N)), expected_batch_size=BATCH, sample_rate=RATE, bands=bands))
    with refused("the noise is independent, and the loader draws from 3 parts by turns.*give PoissonLoader bands=1"):
        Run(own=GaussianMechanism(SIGMA, 1.0, BATCH, 5))


def test_no_loader() -> None:
    model = PrivateModel(1.0, a=torch.zeros(1))
    optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, mechanism=mechanism())
    model.engine.deliver(a=torch.ones(1))
    with refused("correlated over 3 steps, and the loader that feeds the model, if any, does not.*attach it to model"):
        optimizer.step()
    assert optimizer.logical_step == 0


def test_a_rate_that_is_not_that_of_the_part() -> None:
    model = PrivateModel(1.0, a=torch.zeros(1))
    accountant = PrivacyAccountant(noise_multiplier=SIGMA, sample_rate=BATCH / N)
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = DPOptimizer(inner, model, mechanism=mechanism(), accountant=accountant)
    with refused("the loader samples at rate 0.3, the accountant assumes 0.1"):
        loader_of().attach(model, optimizer)


def test_replaced_examples() -> None:
    run = Run(relation="replace_one")
    with refused("correlated over 3 steps, for relation 'replace_one'.*take relation='zero_out'"):
        run.train()
    assert run.optimizer.logical_step == 0


def test_steps_without_a_draw_or_out_of_order() -> None:
    run = Run()
    with refused("the step is on no draw of the loader.*step once after the backward of each batch"):
        run.model.engine.deliver(a=torch.ones(1))
        run.optimizer.step()
    run.optimizer.discard()
    batches = iter(run.loader)
    run.train(batches, stop=1)
    run.model.engine.deliver(a=torch.ones(1))
    with refused("the step is on draw 0 of the loader, and noise up to row 0 was used"):
        run.optimizer.step()
    run.optimizer.discard()
    (x,), (y,) = next(batches), next(batches)
    run.train([(y,)])
    run.backward(x)
    with refused("the step is on draw 1 of the loader, and noise up to row 2 was used"):
        run.optimizer.step()
    run.optimizer.discard()
    run.train(batches, stop=2)
    assert run.optimizer.logical_step == 5


def test_numbers_that_move() -> None:
    run = Run()
    NoiseSchedule(run.optimizer, lambda t: 1.0)
    run.optimizer.max_grad_norm = 1.0
    run.train(stop=2)
    with refused("noise_multiplier was to go from 1.5 to 3.0 after 2 steps of a run whose noise is correlated over 3"):
        NoiseSchedule(run.optimizer, lambda t: 2.0)
    with refused("max_grad_norm was to go from 1.0 to 0.5 after 2 steps.*leave it"):
        ClipSchedule(run.optimizer, lambda t: 0.5)
    with refused("max_grad_norm was to go from 1.0 to 2.0"):
        run.optimizer.max_grad_norm = 2.0
    assert run.accountant.noise_multiplier == SIGMA == run.optimizer.noise_multiplier
    own: Any = run.optimizer.mechanism
    own.coefficients = (0.8, 0.6, 0.0)
    with refused("the matrix of the BandedMechanism changed in a run"):
        run.train(stop=1)
    assert run.optimizer.logical_step == 2


def test_assigned_noise() -> None:
    run = Run()
    run.train(stop=2)
    run.optimizer.noise_multiplier = 2.0
    run.optimizer.discard()
    with refused("the optimizer adds noise of multiplier 2.0, its accountant counts 1.5"):
        run.train(stop=1)


def test_another_loader() -> None:
    run = Run()
    run.train(stop=2)
    other = loader_of(seed=3)
    with refused("another loader is attached after 2 steps.*go on with the loader of the first step"):
        other.attach(run.model, run.optimizer)
    run.loader.attach(run.model, run.optimizer)  # the same, again
    run.train(stop=1)
    run.loader = other
    gc.collect()
    other.attach(run.model, run.optimizer)  # the other one is gone
    with refused("the steps before were on draws of another loader.*load its state too"):
        run.train()


def test_a_loader_that_becomes_another() -> None:
    run = Run()
    run.train(stop=2)
    run.loader.load_state_dict({**loader_of(seed=4).state_dict(), "step": 6})
    with refused("the steps before were on draws of another loader"):
        run.train()


@pytest.mark.parametrize("other", [{"seed": 3}, {"n": N + 1}])
def test_resumed_on_another_loader(other: dict[str, int]) -> None:
    run = Run()
    run.train(stop=2)
    state = copy.deepcopy(run.optimizer.state_dict())
    del run
    gc.collect()
    loader = loader_of(**{"seed": 2, **other})
    loader.step = 2
    model = PrivateModel(1.0, a=torch.zeros(1))
    optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, mechanism=mechanism(seed=6))
    optimizer.load_state_dict({**state, "dpcompile": {**state["dpcompile"], "accountant": None}})
    loader.attach(model, optimizer)
    (x,) = next(iter(loader))
    model.engine.backward(x, torch.ones_like(x))
    with refused("the steps before were on draws of another loader"):
        optimizer.step()


def test_two_optimizers_of_one_seed() -> None:
    first, second = Run(), Run()
    first.train(stop=2)
    with refused("two DPOptimizers of one seed, and noise that is correlated.*leave the seed out"):
        second.train(stop=1)
    assert second.optimizer.logical_step == 0 == second.accountant.steps


def states() -> tuple[Run, dict[str, Any]]:
    run = Run()
    run.train(stop=4)
    state = copy.deepcopy(run.optimizer.state_dict())
    return Run(loader_of(seed=9), mechanism(seed=6)), state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bands": 4}, "bands was 4 in the saved run and is 3 here.*make the run with bands=4"),
        ({"bands": 0}, "'bands' of the DPOptimizer's state is 0, no integer above 0"),
        ({"bands": "3"}, "'bands' of the DPOptimizer's state is '3'"),
        ({"max_grad_norm": 2.0}, "max_grad_norm was 2.0 in the saved run and is 1.0 here"),
        ({"max_grad_norm": None}, "max_grad_norm was None .*mechanism of the saved run"),
        ({"coefficients": [1.0]}, "lacks its matrix: 'coefficients', as many as 'bands'"),
        ({"coefficients": [0.1, 1.0, 1.0]}, "the coefficients are"),
        ({"restart": 0}, "restart is 0"),
        ({"logical_step": 7}, "stands at logical step 7, and its accountant counted 2"),
    ],
)
def test_states_of_another_mechanism(change: dict[str, Any], message: str) -> None:
    run, state = states()
    with refused(message):
        run.optimizer.load_state_dict({**state, "dpcompile": {**state["dpcompile"], **change}})
    assert run.optimizer.logical_step == 0 and run.optimizer.seed == 6
    run.optimizer.load_state_dict({**state, "dpcompile": {**state["dpcompile"], "logical_step": 6}})


def test_states_of_independent_noise() -> None:
    run, state = states()
    model = PrivateModel(1.0, a=torch.zeros(1))
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    plain = DPOptimizer(inner, model, noise_multiplier=SIGMA, expected_batch_size=BATCH)
    with refused("bands was 3 in the saved run and is 1 here"):
        plain.load_state_dict(state)
    with refused("bands was 1 in the saved run and is 3 here"):
        run.optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))


def test_the_matrix_is_the_saved_one() -> None:
    _, state = states()
    own = BandedMechanism(SIGMA, 1.0, BATCH, 6, coefficients=(3.0, 2.0, 1.0), restart=40)
    run = Run(loader_of(seed=9), own)
    run.optimizer.load_state_dict(state)
    assert own.coefficients == mechanism().coefficients and own.restart == mechanism().restart
