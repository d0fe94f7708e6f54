"""``advise``: every number is what the accountant says, training with it reaches the target, and nothing warns."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measure import peak_allocated
from dpcompile import DPCompileError, PrivacyAccountant, PrivacyError, advise, calibrate_noise, dp_compile, make_private
from dpcompile.accounting.batch_sizes import better_batch_size
from dpcompile.accounting.sweeps import sweep_cost
from dpcompile.advising.choosing import choose_run
from dpcompile.advising.physical import largest_physical_batch
from dpcompile.kernels.workspace import kept_gradients

N = 120


def spent(sigma: float, q: float, steps: int, delta: float, method: Any = "pld") -> float:
    counted = PrivacyAccountant(noise_multiplier=sigma, sample_rate=q, method=method)
    counted.step(steps)
    return counted.epsilon(delta)


def net(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


def train(advice: Any) -> Any:
    """The loop of README with what was advised, and a different seed each time."""
    model, data = net(), TensorDataset(torch.randn(N, 6), torch.randint(0, 3, (N,)))
    plain = torch.optim.Adam(model.parameters(), lr=advice.learning_rate)
    loader = DataLoader(data, batch_size=advice.batch_size)
    private, optimizer, batches = make_private(model, plain, loader, backend="eager", **advice.settings)
    for _ in range(advice.epochs):
        for x, y in batches:
            F.cross_entropy(private(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("method", ["rdp", pytest.param("pld", marks=pytest.mark.slow)])
def test_training_reaches_the_epsilon_that_was_said(method: Any) -> None:
    """Warnings are errors: none is given."""
    advice = advise(N, target_epsilon=2.0, model=net(), epochs=4, accountant=method)
    assert ("accountant" in advice.settings) == (method == "rdp")
    optimizer = train(advice)
    assert optimizer.accountant.steps == advice.steps == advice.epochs * math.ceil(N / advice.batch_size)
    assert 0.999 * 2.0 < optimizer.accountant.epsilon(advice.target_delta) <= 2.0
    assert optimizer.noise_multiplier == pytest.approx(advice.noise_multiplier, rel=1e-3)


def test_a_model_that_is_private_keeps_its_bound() -> None:
    model: Any = dp_compile(net(), max_grad_norm=0.3, backend="eager")
    advice = advise(N, target_epsilon=2.0, model=model, epochs=4, accountant="rdp")
    assert advice.max_grad_norm == advice.settings["max_grad_norm"] == 0.3 and "C: 0.3\n" in str(advice)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.randn(N, 6), torch.randint(0, 3, (N,)))
    make_private(model, sgd, DataLoader(data, batch_size=advice.batch_size), **advice.settings)


def test_several_runs_together_cost_the_target() -> None:
    advice = advise(N, target_epsilon=2.0, model=net(), epochs=4, runs=3, accountant="rdp")
    one = train(advice).accountant
    ((sigma, rate, steps),) = one.history
    assert advice.epsilon < 2.0 and one.epsilon(advice.target_delta) <= advice.epsilon
    assert 0.995 * 2.0 < spent(sigma, rate, 3 * steps, advice.target_delta, "rdp") <= 2.0
    assert next(c for c in advice.sweep if c.runs == 3).composed <= 2.0
    assert "epsilon 2 at delta 0.0008 for 3 runs together" in str(advice)


SETTINGS = [  # n, epsilon, trainable, epochs, runs
    (60_000, 8.0, 10**9, 1, 1),
    (60_000, 1.0, 100, None, 4),
    (1, 5.0, 5, None, 1),
]
MORE_SETTINGS = [
    (1437, 3.0, 65_000, None, 1),
    (50_000, 8.0, 2_700_000, None, 1),
    (10**8, 1.0, 10**8, None, 1),
    (1000, 0.05, 15, 5, 1),
    (1000, 50.0, 100, 5, 1),
    (100, 1.0, 15, None, 1),
    (3, 1.0, 4_000_000, None, 1),
]


@pytest.mark.parametrize("method", ["rdp", pytest.param("pld", marks=pytest.mark.slow)])
@pytest.mark.parametrize("setting", SETTINGS + [pytest.param(s, marks=pytest.mark.slow) for s in MORE_SETTINGS])
def test_every_number_is_what_the_accountant_says(setting: Any, method: Any) -> None:
    n, epsilon, numel, epochs, runs = setting
    advice = advise(n, target_epsilon=epsilon, trainable=numel, epochs=epochs, runs=runs, accountant=method)
    delta, rate, sigma = advice.target_delta, advice.batch_size / n, advice.noise_multiplier
    assert 0.05 / n < delta <= 0.1 / n * (1 + 1e-9) and 1 <= advice.batch_size <= n
    assert advice.steps == advice.epochs * math.ceil(n / advice.batch_size)
    assert epochs is None or advice.epochs == epochs
    together = spent(sigma, rate, runs * advice.steps, delta, method)
    assert 0.995 * epsilon < together <= epsilon
    assert spent(sigma, rate, advice.steps, delta, method) >= advice.epsilon * 0.995
    for cost in advice.sweep:
        known = {"noise_multiplier": sigma, "sample_rate": rate, "steps": advice.steps, "target_delta": delta}
        assert cost == sweep_cost(runs=cost.runs, method=method, **known)
    run: Any = {"target_epsilon": advice.epsilon, "target_delta": delta, "sample_rate": rate, "steps": advice.steps}
    run |= {"method": method}
    assert better_batch_size(**run, noise_multiplier=sigma, expected_batch_size=advice.batch_size, numel=numel) is None
    for text in (f"{n:,} examples", f"batch size: {advice.batch_size}\n", f"{advice.steps:,} steps", f"{sigma:.4g}"):
        assert text in str(advice)
    assert all(len(line) <= 100 for line in str(advice).splitlines())


@pytest.mark.slow
def test_none_that_make_private_would_warn_of() -> None:
    for n in (50, 400, 3000, 10**5):
        for epsilon in (0.1, 1.0, 10.0, 30.0):
            for numel in (10, 10**4, 10**7):
                for epochs in (1, 10, None, 200):
                    choose_run(n, epsilon, 0.1 / n, numel, epochs, 1, "rdp")  # raises where it finds none


def test_noise_is_near_its_least_where_steps_allow() -> None:
    """Against the length that is given, with every power of two tried."""
    n, delta = 50_000, 1e-6
    advice = advise(n, target_epsilon=3.0, target_delta=delta, trainable=10**6, epochs=20, accountant="rdp")

    def error(batch: int) -> float:
        steps = 20 * math.ceil(n / batch)
        known = {"target_epsilon": 3.0, "target_delta": delta, "sample_rate": batch / n, "steps": steps}
        return calibrate_noise(**known, method="rdp") / batch / math.sqrt(steps)

    least = min(error(2**k) for k in range(8, 14))
    assert least < error(advice.batch_size) < 1.35 * least and error(advice.batch_size // 4) > 1.5 * least


def test_the_physical_batch_is_where_plans_begin_not_to_fit() -> None:
    model, x = net(2048), torch.randn(4, 6)
    before = copy.deepcopy(model.state_dict())

    def peak(rows: int) -> float:
        private: Any = dp_compile(net(2048), backend="eager", dynamic=False, memory_budget=2**40)
        private.trace(x[torch.arange(rows) % 4])
        return private.plan.prediction.peak + 3 * 4 * sum(p.numel() for p in model.parameters())

    memory = 10 * 2**20
    found = largest_physical_batch(model, x, memory, 10**6)
    assert found.rows % 8 == 0 and found.rows > 100
    assert found.peak == peak(found.rows) <= 0.9 * memory < peak(round(found.rows * 1.3))
    advice = advise(10**6, target_epsilon=3.0, model=model, inputs=(x,), memory=memory, accountant="rdp")
    assert advice.settings["physical_batch_size"] == found.rows and "several forwards behind one call" in str(advice)
    assert advice.settings["memory_budget"] == found.budget <= 0.9 * memory and str(found.budget) in str(advice)
    private = dp_compile(model, backend="eager")
    advice = advise(N, target_epsilon=3.0, model=private, inputs={"input": x}, accountant="rdp")
    assert "physical_batch_size" not in advice.settings and advice.physical_batch is not None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(DPCompileError, match="not one example fits"):
        largest_physical_batch(model, x, 2**16, 100)


def test_what_is_said_to_fit_does() -> None:
    """Without the budget that the advice holds, the quickest plan of this network needs more than there is."""

    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
            self.head = nn.Linear(32, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))

    model, memory = Pictures(), 2**25
    advice = advise(
        10**6, target_epsilon=3.0, model=model, inputs=torch.randn(2, 3, 16, 16), memory=memory, accountant="rdp"
    )
    rows, budget = (advice.settings[name] for name in ("physical_batch_size", "memory_budget"))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())

    def needed(**options: Any) -> float:
        private = dp_compile(copy.deepcopy(model), backend="eager", verify=False, **options)
        x, y = torch.randn(rows, 3, 16, 16), torch.randint(0, 3, (rows,))

        def step() -> None:
            nn.functional.cross_entropy(private(x), y).backward()
            private.zero_grad()

        step()
        kept_gradients.release()
        return 3 * weights + peak_allocated(step)  # weights, and two moments of Adam's; gradients are of the step

    assert needed(memory_budget=budget) <= memory < needed()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset_size": 0}, "dataset_size is 0"),
        ({"target_epsilon": -1.0}, "target_epsilon is -1.0"),
        ({"target_delta": 0.5}, "delta is 0.5, and there are 120"),
        ({"epochs": 0}, "epochs is 0"),
        ({"runs": 1.5}, "runs is 1.5"),
        ({"trainable": True}, "trainable is True"),
        ({"accountant": "gdp"}, "accounting method 'gdp'"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"inputs": torch.zeros(2, 3)}, "inputs or memory without a model"),
        ({"model": nn.Linear(6, 3), "memory": 0}, "memory is 0"),
        ({"memory": 2**30}, "inputs or memory without a model"),
        ({"model": nn.Linear(6, 3).requires_grad_(False)}, "no trainable parameter"),
        ({"model": nn.Linear(6, 3), "inputs": ()}, "inputs hold no tensor"),
        ({"model": nn.Linear(6, 3), "inputs": torch.zeros(0, 6)}, "a tensor without examples"),
    ],
)
def test_what_makes_no_sense(change: dict[str, Any], said: str) -> None:
    with pytest.raises(PrivacyError, match=said):
        advise(**{"dataset_size": N, "target_epsilon": 2.0, "epochs": 2, **change})
