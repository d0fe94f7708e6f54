"""Batch size and noise by the step, on real compiled models, against one backward per example."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import (
    AdaptiveClip,
    DPOptimizer,
    PoissonLoader,
    PrivacyAccountant,
    PrivacyError,
    PrivacyWarning,
    calibrate_noise,
    compile_step,
    dp_compile,
    make_private,
    schedules,
)
from dpcompile.accounting.truncation import TruncatedRate
from dpcompile.checkpoint import load_checkpoint, save_checkpoint
from dpcompile.data.sampling import kept, poisson_draw
from dpcompile.noise.adaptive import AdaptiveGaussianMechanism
from dpcompile.noise.normal import gaussian

prepared: Any = make_private
N, C, SIGMA, SEED, DELTA = 40, 0.3, 0.7, 3, 1e-5


def size_of(step: int) -> float:
    return 4.0 + 3 * step


def factor_of(step: int) -> float:
    return 1.0 / (1 + step)


def parts() -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    dataset = TensorDataset(torch.randn(N, 4), torch.randint(0, 3, (N,)))
    return model, torch.optim.SGD(model.parameters(), lr=0.5), DataLoader(dataset, 4)


def private(sizes: Callable[[int], float] | None = size_of, **options: Any) -> tuple[Any, Any, PoissonLoader]:
    model, optimizer, loader = parts()
    of_loader = {k: options.pop(k) for k in ("max_batch_size", "num_workers", "steps_of_pass") if k in options}
    if "steps_of_pass" in of_loader:
        of_loader["steps"] = of_loader.pop("steps_of_pass")
    drawn: Any = loader
    if sizes is not None:
        drawn = PoissonLoader(loader.dataset, expected_batch_size=sizes, seed=SEED, **of_loader)
    given = {"noise_multiplier": SIGMA, "max_grad_norm": C, "seed": SEED, "backend": "eager"}
    return prepared(model, optimizer, drawn, **{**given, **options})


def train(model: Any, optimizer: Any, batches: Any) -> None:
    for x, y in batches:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def by_hand(
    draws: list[int],
    sigma: Callable[[int], float] = lambda t: SIGMA,
    sizes: Callable[[int], float] = size_of,
    cap: int | None = None,
    optimizer_of: Any = None,
) -> nn.Module:
    """The same training on these draws, one example at a time."""
    model, optimizer, loader = parts()
    optimizer = optimizer if optimizer_of is None else optimizer_of(model.parameters())
    xs, ys = loader.dataset.tensors  # type: ignore[attr-defined]
    params = list(model.parameters())
    for step, draw in enumerate(draws):
        total = [torch.zeros_like(p) for p in params]
        found = poisson_draw(SEED, step=draw, size=N, sample_rate=sizes(draw) / N)
        found = found if cap is None else kept(found, cap, seed=SEED, step=draw)
        for i in found:
            grads = torch.autograd.grad(nn.functional.cross_entropy(model(xs[i : i + 1]), ys[i : i + 1]), params)
            norm = torch.sqrt(sum((g**2).sum() for g in grads))  # type: ignore[arg-type]
            for t, g in zip(total, grads, strict=True):
                t += g * torch.clamp(C / norm, max=1.0)
        for k, (p, t) in enumerate(zip(params, total, strict=True)):
            noise = gaussian(SEED, step=step, parameter=k, numel=p.numel()).view(p.shape)
            p.grad = (t + sigma(draw) * C * noise) / sizes(draw)
        optimizer.step()
    return model


def same(model: Any, wanted: nn.Module) -> None:
    for got, want in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def counts(draws: list[int], sigma: Callable[[int], float] = lambda t: SIGMA) -> list[tuple[float, float, int]]:
    return [(sigma(t), size_of(t) / N, 1) for t in draws]


def ahead(batches: Any, count: int) -> Iterator[Any]:
    """A prefetcher that holds so many batches."""
    batches, held = iter(batches), []
    held += itertools.islice(batches, count)
    while held:
        yield held.pop(0)
        held += itertools.islice(batches, 1)


# ---- batch size by the step


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("physical", [None, 3])
def test_each_draw_has_its_size_and_its_divisor(physical: int | None, backend: str) -> None:
    model, optimizer, loader = private(backend=backend, physical_batch_size=None)
    if physical:
        dataset = loader.dataset
        drawn = PoissonLoader(dataset, expected_batch_size=size_of, seed=SEED, physical_batch_size=physical)
        plain, inner, _ = parts()
        model, optimizer, loader = prepared(
            plain, inner, drawn, noise_multiplier=SIGMA, max_grad_norm=C, seed=SEED, backend=backend
        )
    assert len(loader) == 5  # 4 + 7 + 10 + 13 + 16 is the first sum of 40 or more
    train(model, optimizer, loader)
    same(model, by_hand(list(range(5))))
    assert optimizer.accountant.history == counts(list(range(5)))
    assert optimizer.accountant.epsilon(DELTA) > 0
    train(model, optimizer, itertools.islice(loader.parts() if physical else loader, 1))  # the next pass goes on


def test_the_physical_batch_is_for_the_largest_draws() -> None:
    constant = PoissonLoader(parts()[2].dataset, expected_batch_size=16.0)
    _, _, loader = private()
    assert loader.physical_batch_size == constant.physical_batch_size
    assert "expected_batch_size=4 to 16 by the step" in repr(loader)
    assert (loader.sample_rate, loader.expected_batch_size) == (4 / N, 4.0)


def test_adam_in_one_pass() -> None:
    plain, _, dataset = parts()
    loader = PoissonLoader(dataset.dataset, expected_batch_size=size_of, seed=SEED)
    inner = torch.optim.Adam(plain.parameters(), lr=0.05)
    model, optimizer, loader = prepared(
        plain, inner, loader, noise_multiplier=SIGMA, max_grad_norm=C, seed=SEED, backend="eager"
    )
    train(model, optimizer, loader)
    same(model, by_hand(list(range(5)), optimizer_of=lambda p: torch.optim.Adam(p, lr=0.05)))


@pytest.mark.parametrize(("workers", "held"), [(0, 3), (2, 1)])
def test_draws_that_are_taken_ahead_keep_their_numbers(workers: int, held: int) -> None:
    model, optimizer, loader = private(num_workers=workers)
    train(model, optimizer, ahead(loader, held))
    same(model, by_hand(list(range(5))))
    assert optimizer.accountant.history == counts(list(range(5)))


def test_draws_that_are_left_out_cost_nothing_and_move_no_other() -> None:
    model, optimizer, loader = private()
    for i, (x, y) in enumerate(loader):
        if i == 1:
            optimizer.discard()
            continue
        nn.functional.cross_entropy(model(x), y).backward()
        if i == 2:
            optimizer.discard()
            continue
        optimizer.step()
        optimizer.zero_grad()
    same(model, by_hand([0, 3, 4]))
    assert optimizer.accountant.history == counts([0, 3, 4])


def test_a_batch_size_of_prepared() -> None:
    model, optimizer, loader = private(None, batch_size_schedule=lambda t: 1 + 0.75 * t)
    train(model, optimizer, loader)
    same(model, by_hand(list(range(5))))
    assert optimizer.accountant.history == counts(list(range(5)))


def test_a_constant_function_is_a_constant() -> None:
    models = []
    for sizes in (lambda t: 8.0, None):
        if sizes is None:
            model, optimizer, loader = private(lambda t: 8.0)
        else:
            plain, inner, dataset = parts()
            loader = PoissonLoader(dataset.dataset, expected_batch_size=8.0, seed=SEED)
            model, optimizer, loader = prepared(
                plain, inner, loader, noise_multiplier=SIGMA, max_grad_norm=C, seed=SEED, backend="eager"
            )
        assert len(loader) == 5
        train(model, optimizer, loader)
        models.append((model, optimizer.accountant.history))
    same(models[0][0], models[1][0])
    assert models[0][1] == models[1][1] == [(SIGMA, 0.2, 5)]


def test_a_compiled_step_goes_by_the_draw() -> None:
    for batches in ("whole", "parts"):
        model, optimizer, loader = private()
        step = compile_step(model, nn.functional.cross_entropy, optimizer)
        for x, y in loader if batches == "whole" else loader.parts():
            step(x, y)
        same(model, by_hand(list(range(5))))
        assert optimizer.accountant.history == counts(list(range(5)))


def test_a_cap_and_a_batch_size_by_the_step() -> None:
    model, optimizer, loader = private(max_batch_size=9)
    train(model, optimizer, loader)
    same(model, by_hand(list(range(5)), cap=9))
    assert optimizer.accountant.history == [(SIGMA, TruncatedRate(size_of(t) / N, N, 9), 1) for t in range(5)]


def test_a_c_that_follows_a_quantile_takes_the_size_of_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float, float]] = []
    moved = AdaptiveGaussianMechanism.next_bounds

    def noted(self: Any, votes: Any, step: int) -> Any:
        seen.append((self.expected_batch_size, self.noise_multiplier, self.count_std))
        return moved(self, votes, step)

    monkeypatch.setattr(AdaptiveGaussianMechanism, "next_bounds", noted)
    model, optimizer, loader = private(max_grad_norm=AdaptiveClip(), noise_schedule=factor_of)
    train(model, optimizer, loader)
    sigmas = [SIGMA * factor_of(t) for t in range(5)]
    assert seen == [(size_of(t), s, max(size_of(t) / 20, 2 * s)) for t, s in zip(range(5), sigmas, strict=True)]
    assert optimizer.accountant.history == counts(list(range(5)), lambda t: sigmas[t])
    assert optimizer.expected_batch_size == 4.0 and optimizer.noise_multiplier == SIGMA


def test_exact_noise_has_a_grid_for_the_largest_draws() -> None:
    plain, inner, dataset = parts()
    loader = PoissonLoader(dataset.dataset, expected_batch_size=size_of, seed=SEED, secure=True)
    model, optimizer, loader = prepared(
        plain, inner, loader, noise_multiplier=SIGMA, max_grad_norm=C, seed=SEED, exact=True, backend="eager"
    )
    train(model, optimizer, loader)
    assert optimizer.accountant.history == counts(list(range(5)))
    plain, inner, dataset = parts()
    many = PoissonLoader(
        dataset.dataset, expected_batch_size=lambda t: 2.0 ** (3 + 3 * t), sample_rate=0.1, steps=5, secure=True
    )
    _, optimizer, _ = prepared(plain, inner, many, noise_multiplier=SIGMA, exact=True, backend="eager")
    assert optimizer.mechanism.bits == 49 - 15 and optimizer.expected_batch_size == 8


def test_users_are_drawn_by_the_step() -> None:
    plain, inner, dataset = parts()
    model, optimizer, loader = prepared(
        plain, inner, dataset, noise_multiplier=SIGMA, max_grad_norm=C, seed=SEED, backend="eager",
        groups=[i // 2 for i in range(N)], examples_per_user=2, batch_size_schedule=lambda t: 1 + t,
    )  # fmt: skip
    assert len(loader) == 3  # 4 + 8 + 12 users of 20
    train(model, optimizer, loader)
    assert optimizer.accountant.history == [(SIGMA, q, 1) for q in (0.2, 0.4, 0.6)]


def test_rates_that_do_not_come_from_the_size() -> None:
    plain, inner, dataset = parts()
    loader = PoissonLoader(
        dataset.dataset, expected_batch_size=lambda t: 4.0 * (1 + t), sample_rate=lambda t: 0.1 * (1 + t), seed=SEED
    )
    assert len(loader) == 4 and not loader.from_size
    model, optimizer, loader = prepared(
        plain, inner, loader, noise_multiplier=SIGMA, relation="add_remove", backend="eager"
    )
    train(model, optimizer, loader)
    assert [q for _, q, _ in optimizer.accountant.history] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    only = PoissonLoader(dataset.dataset, sample_rate=lambda t: 0.5)
    assert (only.expected_batch_size, only.from_size, len(only)) == (20.0, True, 2)
    with pytest.raises(PrivacyError, match="comes from the size of the dataset"):
        prepared(*parts(), noise_multiplier=1.0, relation="add_remove", batch_size_schedule=lambda t: 1.0)


def test_a_run_is_resumed_with_the_same_numbers() -> None:
    whole = private(noise_schedule=factor_of)
    train(whole[0], whole[1], whole[2])
    model, optimizer, loader = private(noise_schedule=factor_of)
    train(model, optimizer, itertools.islice(loader, 2))
    states = [x.state_dict() for x in (model, optimizer, loader)]
    again = private(noise_schedule=factor_of)
    for x, state in zip(again, states, strict=True):
        x.load_state_dict(state)
    assert again[2].expected_batch_size == size_of(2) and again[2].sample_rate == size_of(2) / N
    train(again[0], again[1], again[2])
    same(again[0], whole[0])
    assert again[1].accountant.history == whole[1].accountant.history
    assert again[1].accountant.history == counts(list(range(5)), lambda t: SIGMA * factor_of(t))
    assert whole[2].state_dict() == again[2].state_dict()


def test_a_checkpoint_holds_the_schedules(tmp_path: Path) -> None:
    whole = private(noise_schedule=factor_of)
    train(*whole)
    model, optimizer, loader = private(noise_schedule=factor_of)
    train(model, optimizer, itertools.islice(loader, 2))
    save_checkpoint(tmp_path / "saved", model, optimizer, loader)
    again = private(noise_schedule=factor_of)
    load_checkpoint(tmp_path / "saved", *again)
    train(*again)
    same(again[0], whole[0])
    assert again[1].accountant.history == whole[1].accountant.history
    with pytest.raises(PrivacyError, match="noise_schedule is another function"):
        load_checkpoint(tmp_path / "saved", *private(noise_schedule=lambda t: 2.0 - factor_of(t)))


def test_a_state_of_another_function_is_refused() -> None:
    _, _, loader = private()
    state = loader.state_dict()
    with pytest.raises(PrivacyError, match=r"(?s)another function of the step .* first 5 steps.*with the same"):
        private(lambda t: 4.0 + 3 * t + (t == 4))[2].load_state_dict(state)
    constant = PoissonLoader(loader.dataset, expected_batch_size=4.0)
    with pytest.raises(PrivacyError, match=r"was a function of the step in the saved run and is a number here"):
        constant.load_state_dict(state)
    with pytest.raises(PrivacyError, match=r"was a number in the saved run and is a function of the step here"):
        loader.load_state_dict(constant.state_dict())
    with pytest.raises(PrivacyError, match=r"not a finite number above 0, or of batch sizes by the step their digest"):
        loader.load_state_dict({**state, "expected_batch_size": {"first": 4.0}})
    assert set(constant.state_dict()) == set(state) and constant.state_dict()["expected_batch_size"] == 4.0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            lambda t: 8.0 if t < 3 else 0.0,
            r"(?s)expected_batch_size of step 3 is 0.0, not in \(0, 40\].*of the dataset",
        ),
        (lambda t: 8.0 if t < 3 else 41.0, r"(?s)expected_batch_size of step 3 is 41.0, not in \(0, 40\]"),
        (lambda t: float("nan"), r"expected_batch_size of step 0 is nan"),
        (lambda t: True, r"expected_batch_size of step 0 is True"),
        (lambda t: [8.0][t], r"(?s)of step 1 is not known: its function raised IndexError.*for every step from 0"),
        (lambda t: 1e-9, r"(?s)it is not known how long a pass is.*give PoissonLoader steps="),
    ],
)
def test_sizes_that_are_none_are_refused(sizes: Any, message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        PoissonLoader(parts()[2].dataset, expected_batch_size=sizes)


def test_a_size_beyond_the_pass_is_refused_before_its_draw() -> None:
    model, optimizer, loader = private(lambda t: 8.0 if t < 6 else 80.0)
    train(model, optimizer, loader)
    with pytest.raises(PrivacyError, match=r"expected_batch_size of step 6 is 80.0"):
        train(model, optimizer, loader)
    assert optimizer.logical_step == 6 == optimizer.accountant.steps


def test_what_does_not_go_together_is_refused() -> None:
    dataset = parts()[2].dataset
    with pytest.raises(PrivacyError, match=r"(?s)a batch size by the step, and noise .* over 2 steps.*leave bands out"):
        PoissonLoader(dataset, expected_batch_size=size_of, bands=2)
    with pytest.raises(PrivacyError, match=r"(?s)have 33 sample rates.*32 values at most"):
        PoissonLoader(dataset, expected_batch_size=lambda t: 4 + t / 40, max_batch_size=9, steps=33)
    PoissonLoader(dataset, expected_batch_size=lambda t: 4 + t / 40, max_batch_size=9, steps=32)
    with pytest.raises(PrivacyError, match=r"(?s)batch_size_schedule, and a PoissonLoader.*as expected_batch_size"):
        private(batch_size_schedule=factor_of)
    for options in ({"batch_size_schedule": factor_of}, {"noise_schedule": factor_of}):
        with pytest.raises(PrivacyError, match=r"(?s)'auto', and noise or batch size go by the step"):
            prepared(*parts(), noise_multiplier=1.0, max_batch_size="auto", backend="eager", **options)
    with pytest.raises(PrivacyError, match=r"(?s)noise or batch size by the step, and .* over 2 steps.*bands=1"):
        prepared(*parts(), noise_multiplier=1.0, noise_schedule=factor_of, bands=2, backend="eager")
    model, optimizer, loader = private()
    with pytest.raises(PrivacyError, match=r"(?s)batches\(\) gives draws to a loop of its own.*loader.parts\(\)"):
        loader.batches()
    with pytest.raises(PrivacyError, match=r"(?s)whose loader has one for every step.*leave it"):
        optimizer.expected_batch_size = 3.0


class OwnAccountant:
    """Counts every step at the rate that it was made for."""

    def __init__(self, goes_by_events: bool) -> None:
        self._inner, self._by_events = PrivacyAccountant(noise_multiplier=SIGMA, sample_rate=0.1), goes_by_events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def noise_multiplier(self) -> float:
        return SIGMA

    def step(self, n: int = 1, *, event: Any = None) -> None:
        self._inner.step(n, event=event if self._by_events else None)


@pytest.mark.parametrize("by", [{}, {"noise_schedule": factor_of, "sizes": lambda t: 4.0}])
def test_an_accountant_that_does_not_go_by_events_is_refused(by: Any) -> None:
    for goes in (True, False):
        accountant = OwnAccountant(goes)
        model, optimizer, loader = private(accountant=accountant, **by)
        before = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, itertools.islice(loader, 1))
        assert not all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        before = [p.detach().clone() for p in model.parameters()]
        if goes:
            train(model, optimizer, itertools.islice(loader, 1))
            continue
        with pytest.raises(
            PrivacyError, match=r"(?s)counts 0 of these more: it does not go by the event.*history show"
        ):
            train(model, optimizer, itertools.islice(loader, 1))
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_an_optimizer_of_ones_own_and_an_attached_loader() -> None:
    plain, inner, dataset = parts()
    model = dp_compile(plain, max_grad_norm=C, backend="eager")
    loader = PoissonLoader(dataset.dataset, expected_batch_size=size_of, seed=SEED)
    accountant = PrivacyAccountant(noise_multiplier=SIGMA, sample_rate=loader.sample_rate)
    optimizer = DPOptimizer(
        inner, model, noise_multiplier=SIGMA, expected_batch_size=loader.expected_batch_size, seed=SEED,
        accountant=accountant,
    )  # fmt: skip
    loader.attach(model, optimizer)
    noise = schedules.NoiseSchedule(optimizer, factor_of)
    for batch in loader:
        train(model, optimizer, [batch])
        noise.step()
    same(model, by_hand(list(range(5)), lambda t: SIGMA * factor_of(t)))
    assert accountant.history == counts(list(range(5)), lambda t: SIGMA * factor_of(t))
    optimizer.mechanism.expected_batch_size = 3.0
    with pytest.raises(PrivacyError, match="give both the same expected_batch_size"):
        loader.attach(model, optimizer)


# ---- noise by the step, and both


def test_a_target_calibrates_the_scale_of_a_schedule() -> None:
    target: dict[str, Any] = {"target_epsilon": 6.0, "target_delta": DELTA}
    model, optimizer, loader = private(None, noise_multiplier=None, **target, steps=10, noise_schedule=factor_of)
    scale = calibrate_noise(**target, sample_rate=0.1, steps=10, schedule=factor_of)
    assert optimizer.noise_multiplier == scale
    train(model, optimizer, loader)
    assert optimizer.accountant.history == [(scale * factor_of(t), 0.1, 1) for t in range(10)]
    assert 5.9 < optimizer.accountant.epsilon(DELTA) <= 6.0
    same(model, by_hand(list(range(10)), lambda t: scale * factor_of(t), lambda t: 4.0))
    with (
        pytest.warns(PrivacyWarning, match="all 10 planned steps are taken"),
        pytest.raises(PrivacyError, match=r"step 11 of a run whose noise is calibrated for 10"),
    ):
        train(model, optimizer, loader)


@pytest.mark.full
def test_a_target_for_noise_and_batch_size_by_the_step() -> None:
    target: dict[str, Any] = {"target_epsilon": 8.0, "target_delta": DELTA}
    options = {"noise_multiplier": None, **target, "steps": 4, "noise_schedule": factor_of}
    model, optimizer, loader = private(**options)
    train(model, optimizer, itertools.islice(loader, 4))
    assert 7.9 < optimizer.accountant.epsilon(DELTA) <= 8.0
    scale = optimizer.noise_multiplier
    assert optimizer.accountant.history == counts(list(range(4)), lambda t: scale * factor_of(t))
    # a draw that is left out takes its noise with it, and none beyond the planned ones is stepped on
    model, optimizer, loader = private(**options)
    next(iter(loader))
    optimizer.discard()
    batches = iter(loader)
    train(model, optimizer, itertools.islice(batches, 3))
    assert optimizer.accountant.history == counts([1, 2, 3], lambda t: scale * factor_of(t))
    with pytest.raises(PrivacyError, match=r"step 5 of a run whose noise is calibrated for 4"):
        train(model, optimizer, batches)
    assert optimizer.accountant.steps == 3


def test_draws_that_were_planned_once_are_not_counted_from_0_again() -> None:
    """By a second loader, or after a state without that of the loader: rates that fall would be high again."""
    given = {"noise_multiplier": None, "target_epsilon": 8.0, "target_delta": DELTA, "steps": 4, "accountant": "rdp"}

    def falling(t: int) -> float:
        return 16.0 if t < 2 else 4.0

    model, optimizer, loader = private(falling, **given)
    train(model, optimizer, itertools.islice(loader, 2))
    state = optimizer.state_dict()
    other = PoissonLoader(loader.dataset, expected_batch_size=falling, seed=SEED + 1)
    other.attach(model, optimizer)
    with pytest.raises(PrivacyError, match=r"(?s)draw 0 of the loader, and .* stepped on draw 1.*loader's state too"):
        train(model, optimizer, other)
    assert optimizer.accountant.steps == 2
    plain, inner, _ = parts()
    again = PoissonLoader(loader.dataset, expected_batch_size=falling, seed=SEED + 1)
    model, resumed, again = prepared(plain, inner, again, **given, max_grad_norm=C, seed=SEED, backend="eager")
    resumed.load_state_dict(state)
    with pytest.raises(PrivacyError, match=r"draw 0 of the loader, and the run has stepped on draw 1"):
        train(model, resumed, again)
    assert resumed.accountant.steps == 2


def test_the_noise_of_a_schedule_is_moved_by_nothing_else() -> None:
    _, optimizer, _ = private(None, noise_schedule=lambda t: 0.5)
    with pytest.raises(PrivacyError, match=r"(?s)scale of make_private's noise_schedule.*leave one of them out"):
        schedules.NoiseSchedule(optimizer, lambda t: 0.9)
    with pytest.raises(PrivacyError, match=r"noise_schedule of step 0 is -1.0, not in \(0, inf\)"):
        model, optimizer, loader = private(None, noise_schedule=lambda t: -1.0)
        train(model, optimizer, loader)
    assert optimizer.accountant.steps == 0


def test_a_state_of_another_noise_schedule_is_refused() -> None:
    _, optimizer, loader = private(None, noise_schedule=factor_of)
    train(_, optimizer, itertools.islice(loader, 3))
    state = optimizer.state_dict()
    with pytest.raises(PrivacyError, match=r"made with noise_schedule, and this one without"):
        private(None)[1].load_state_dict(state)
    with pytest.raises(PrivacyError, match=r"made without noise_schedule, and this one with"):
        optimizer.load_state_dict(
            {**state, "dpcompile": {k: v for k, v in state["dpcompile"].items() if k[:7] != "noise_s"}}
        )
    with pytest.raises(PrivacyError, match=r"(?s)noise_schedule is another function.*noise_schedule of the saved run"):
        private(None, noise_schedule=lambda t: 1.0)[1].load_state_dict(state)


def test_a_report_says_what_was_done() -> None:
    model, optimizer, loader = private(noise_schedule=factor_of)
    train(model, optimizer, loader)
    page = str(optimizer.report(DELTA))
    assert "0.1 to 0.4, a public function of the step" in page and "noise by the step" in page
