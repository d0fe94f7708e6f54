"""``make_private(max_batch_size=...)`` on real compiled models, against one backward per example."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import AdaptiveClip, PoissonLoader, PrivacyAccountant, compile_step, make_private
from dpcompile.accounting.caps import smallest_cap
from dpcompile.accounting.truncation import TruncatedRate
from dpcompile.data.sampling import kept, poisson_draw
from dpcompile.errors import PrivacyError, PrivacyWarning
from dpcompile.module import engine_of
from dpcompile.noise.normal import gaussian
from dpcompile.schedules import NoiseSchedule

N, BATCH, CAP, C, SIGMA, SEED = 40, 8, 9, 0.3, 0.7, 3
RATE = TruncatedRate(BATCH / N, N, CAP)


def parts() -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    dataset = TensorDataset(torch.randn(N, 4), torch.randint(0, 3, (N,)))
    return model, torch.optim.SGD(model.parameters(), lr=0.5), DataLoader(dataset, BATCH)


def private(**options: Any) -> tuple[Any, Any, PoissonLoader]:
    given = {"noise_multiplier": SIGMA, "max_batch_size": CAP, "max_grad_norm": C, "seed": SEED, "backend": "eager"}
    return make_private(*parts(), **{**given, **options})


def train(model: Any, optimizer: Any, batches: Any) -> None:
    for x, y in batches:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def by_hand(steps: int) -> nn.Module:
    """The same training, one example at a time."""
    model, optimizer, loader = parts()
    xs, ys = loader.dataset.tensors  # type: ignore[attr-defined]
    params = list(model.parameters())
    cut = 0
    for step in range(steps):
        total = [torch.zeros_like(p) for p in params]
        drawn = poisson_draw(SEED, step=step, size=N, sample_rate=BATCH / N)
        found = kept(drawn, CAP, seed=SEED, step=step)
        cut += len(drawn) - len(found)
        for i in found:
            grads = torch.autograd.grad(nn.functional.cross_entropy(model(xs[i : i + 1]), ys[i : i + 1]), params)
            norm = torch.sqrt(sum((g**2).sum() for g in grads))  # type: ignore[arg-type]
            for t, g in zip(total, grads, strict=True):
                t += g * torch.clamp(C / norm, max=1.0)
        for k, (p, t) in enumerate(zip(params, total, strict=True)):
            noise = gaussian(SEED, step=step, parameter=k, numel=p.numel()).view(p.shape)
            p.grad = (t + SIGMA * C * noise) / BATCH
        optimizer.step()
    assert cut > 5
    return model


def same(model: Any, wanted: nn.Module) -> None:
    for got, want in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("physical", [None, 2])
def test_the_loop_is_dp_sgd_on_truncated_draws(physical: int | None, whole: bool, backend: str) -> None:
    model, optimizer, loader = private(physical_batch_size=physical, backend=backend)
    for _ in range(2):
        train(model, optimizer, loader if whole else loader.parts())
    same(model, by_hand(10))
    assert loader.physical_batch_size == (physical or CAP)
    assert optimizer.logical_step == loader.step == 10 and optimizer.accountant.history == [(SIGMA, RATE, 10)]


def test_a_compiled_step() -> None:
    for batches in ("whole", "parts"):
        model, optimizer, loader = private(physical_batch_size=4)
        step = compile_step(model, nn.functional.cross_entropy, optimizer)
        for _ in range(2):
            for x, y in loader if batches == "whole" else loader.parts():
                step(x, y)
        same(model, by_hand(10))


@pytest.mark.parametrize("whole", [True, False])
def test_every_step_runs_as_many_forwards(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a draw without an example, and of one that is larger than the cap; on as many rows."""
    model, optimizer, loader = private(physical_batch_size=4)
    rows: list[int] = []
    engine, run = engine_of(model), type(engine_of(model))._run_once  # type: ignore[attr-defined]
    monkeypatch.setattr(type(engine), "_run_once", lambda self, f: (rows.append(len(f.args[0])), run(self, f))[1])
    drawn = (0, 9, 1, 5, 0)
    monkeypatch.setattr(loader._sampler, "draw", lambda seed, step: list(range(drawn[step])))
    counts, before = [], 0
    for batch in loader if whole else loader.parts():
        assert len(batch[0]) == (12 if whole else 4)
        train(model, optimizer, [batch])
        counts.append(len(rows) - before)
        before = len(rows)
    assert counts == ([6] * 5 if whole else [1] * 15) and set(rows) == {4}  # whole: forward again in the backward
    assert optimizer.logical_step == 5


def test_one_empty_draw_is_a_step_of_noise() -> None:
    model, optimizer, loader = private(physical_batch_size=4)
    loader._sampler.draw = lambda seed, step: []  # type: ignore[method-assign]
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, itertools.islice(loader, 1))
    for k, (p, old) in enumerate(zip(model.parameters(), before, strict=True)):
        noise = gaussian(SEED, step=0, parameter=k, numel=p.numel()).view(p.shape)
        torch.testing.assert_close(p.detach(), old - 0.5 * SIGMA * C * noise / BATCH, rtol=1e-4, atol=1e-6)


# ---- what goes with it


@pytest.mark.full
def test_a_target() -> None:
    target: dict[str, Any] = {"target_epsilon": 3.0, "target_delta": 1e-3, "steps": 10}
    model, optimizer, loader = private(noise_multiplier=None, **target)
    for _ in range(2):
        train(model, optimizer, loader)
    assert 2.9 < optimizer.accountant.epsilon(1e-3) <= 3.0
    whole = private(noise_multiplier=None, max_batch_size=None, **target)[1]
    assert optimizer.noise_multiplier > whole.noise_multiplier
    with (
        pytest.warns(PrivacyWarning, match="all 10 planned steps are taken"),
        pytest.raises(PrivacyError, match="step 11 of a run whose noise is calibrated for 10"),
    ):
        train(model, optimizer, loader)


@pytest.mark.full
def test_auto() -> None:
    known: dict[str, Any] = {"sample_rate": BATCH / N, "dataset_size": N}
    _, optimizer, loader = private(max_batch_size="auto", steps=7, target_delta=1e-4)
    cap = smallest_cap(noise_multiplier=SIGMA, **known, steps=7, target_delta=1e-4, multiple=8)
    assert loader.max_batch_size == cap and optimizer.accountant.truncation == (N, cap) == loader.truncation
    _, optimizer, loader = private(max_batch_size="auto", physical_batch_size=5)
    cap = smallest_cap(noise_multiplier=SIGMA, **known, steps=5, target_delta=0.1 / N, multiple=5)
    assert loader.max_batch_size == cap and cap % 5 == 0
    _, optimizer, loader = private(
        noise_multiplier=None, max_batch_size="auto", target_epsilon=3.0, target_delta=1e-3, epochs=2
    )
    assert loader.truncation is not None and loader.truncation[1] < N
    whole = private(noise_multiplier=None, max_batch_size=None, target_epsilon=3.0, target_delta=1e-3, epochs=2)[1]
    assert whole.noise_multiplier <= optimizer.noise_multiplier <= whole.noise_multiplier * 1.002


def test_an_accountant_that_is_made_already() -> None:
    own = PrivacyAccountant(noise_multiplier=SIGMA, sample_rate=BATCH / N, truncation=(N, CAP))
    model, optimizer, loader = private(accountant=own)
    train(model, optimizer, loader)
    assert own.history == [(SIGMA, RATE, 5)]
    with pytest.raises(PrivacyError, match="the accountant assumes at most 9 of a draw from 40"):
        private(accountant=own, max_batch_size=None)
    with pytest.raises(PrivacyError, match="(?s)'auto', and the accountant is made already.*number that accountant.tr"):
        private(accountant=own, max_batch_size="auto")


def test_the_loader_s_own_cap() -> None:
    model, inner, plain = parts()
    loader = PoissonLoader.from_dataloader(plain, max_batch_size=CAP)
    _, optimizer, found = make_private(model, inner, loader, noise_multiplier=1.0, backend="eager")
    assert found is loader and optimizer.accountant is not None
    assert getattr(optimizer.accountant, "truncation", None) == (N, CAP)
    with pytest.raises(PrivacyError, match="(?s)max_batch_size is 8, and the PoissonLoader has 9.*leave it out"):
        make_private(*parts()[:2], loader, noise_multiplier=1.0, max_batch_size=8, backend="eager")


@pytest.mark.parametrize("cap", [CAP, "auto"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accountant": "rdp"}, "no Rényi bound is known for truncated Poisson samples.*accountant='pld'"),
        ({"accountant": "rdp", "noise_multiplier": None, "target_epsilon": 1.0, "target_delta": 1e-3, "epochs": 1},
         "no Rényi bound is known"),
        ({"bands": 2}, "draws from 2 parts by turns.*leave out max_batch_size, or take bands=1"),
    ],
)  # fmt: skip
def test_what_has_no_bound_is_refused(options: dict[str, Any], message: str, cap: Any) -> None:
    with pytest.raises(PrivacyError, match=f"(?s){message}"):
        private(max_batch_size=cap, **options)


def test_a_protected_size_is_refused() -> None:
    model, inner, plain = parts()
    for cap in (CAP, None):
        loader = PoissonLoader(
            plain.dataset, expected_batch_size=BATCH, sample_rate=0.2, steps=5, max_batch_size=cap, seed=SEED
        )
        given: dict[str, Any] = {"noise_multiplier": 1.0, "relation": "add_remove", "backend": "eager"}
        with pytest.raises(PrivacyError, match="(?s)which that relation protects.*take relation='zero_out'"):
            make_private(model, inner, loader, **given, max_batch_size="auto" if cap is None else None)


@pytest.mark.full
def test_a_replaced_example() -> None:
    _, optimizer, loader = private(relation="replace_one")
    train(*private(relation="replace_one"))
    optimizer.accountant.step(5)
    zero = private()[1].accountant
    zero.step(5)
    assert optimizer.accountant.epsilon(1e-3) > zero.epsilon(1e-3) and loader.truncation == (N, CAP)


def test_schedules_and_a_c_that_moves() -> None:
    model, optimizer, loader = private()
    schedule = NoiseSchedule(optimizer, lambda t: 0.9**t)
    for batch in itertools.islice(loader, 2):
        train(model, optimizer, [batch])
        schedule.step()
    assert optimizer.accountant.history == [(SIGMA, RATE, 1), (SIGMA * 0.9, RATE, 1)]
    model, optimizer, loader = private(max_grad_norm=AdaptiveClip())
    train(model, optimizer, loader)
    assert optimizer.accountant.history == [(SIGMA, RATE, 5)] and optimizer.max_grad_norm != 1.0


def test_a_run_that_is_resumed() -> None:
    model, optimizer, loader = private(physical_batch_size=4)
    train(model, optimizer, itertools.islice(loader, 4))
    states = [x.state_dict() for x in (model, optimizer, loader)]
    again = private(physical_batch_size=3, seed=8)
    for x, state in zip(again, states, strict=True):
        x.load_state_dict(state)
    train(*again)
    train(*again)
    same(again[0], by_hand(10))
    assert again[1].accountant.history == [(SIGMA, RATE, 10)]
    with pytest.raises(PrivacyError, match="max_batch_size was 9 in the saved run and is None here"):
        private(max_batch_size=None)[2].load_state_dict(states[2])


@pytest.mark.full
def test_the_report_says_so() -> None:
    model, optimizer, loader = private(physical_batch_size=4)
    train(model, optimizer, loader)
    report = optimizer.report(1e-4)
    assert report.sections["Privacy"][f"noise multiplier {SIGMA}, sample rate 0.2 of 40, 9 at most"] == "5 steps"
    assert report.sections["Data"]["truncation"] == "of a larger draw 9 examples are kept, chosen at random"
    for i in range(9):
        optimizer.accountant.move_noise_multiplier(1.0 + i)
        optimizer.accountant.step()
    optimizer.accountant.move_noise_multiplier(SIGMA)
    assert "of 10 kinds" in str(optimizer.report(1e-4))
