"""``advise(measure=True)``: the largest step that ran is the largest that fits, and the run leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import DPCompileError, PrivacyError, advise, dp_compile, make_private
from dpcompile.advising.measured import measured_physical_batch, peak_of
from dpcompile.kernels.workspace import kept_gradients
from dpcompile.module import engine_of

CPU = torch.device("cpu")
MIB = 2**20


class Pictures(nn.Module):
    """With a buffer that each call writes, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head, self.drop = nn.Linear(16, 3), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, scale: Any = None) -> Tensor:
        self.calls += 1
        y = self.drop(self.second(self.first(x).relu()).relu()).mean((2, 3))
        return self.head(y if scale is None else y * scale)


def test_the_largest_that_ran_is_the_largest_that_fits() -> None:
    """Seen from outside: a step of a new model with the advised rows and budget stays within the memory."""
    model: Any = dp_compile(Pictures(), backend="eager")
    memory, x = 8 * MIB, torch.randn(4, 3, 16, 16)
    found = measured_physical_batch(model, x, memory, 10**6)
    assert found.measured and found.rows % 8 == 0 and 16 < found.rows < 10**4
    assert 0.6 * memory < found.peak <= 0.9 * memory

    def needed(rows: int) -> float:
        private = dp_compile(Pictures(), backend="eager", verify=False, dynamic=False, memory_budget=found.budget)
        batch, labels = torch.randn(rows, 3, 16, 16), torch.zeros(rows, dtype=torch.long)

        def step() -> None:
            F.cross_entropy(private(batch), labels).backward()
            private.zero_grad()

        step()
        kept_gradients.release()
        return 3 * sum(p.numel() * 4 for p in private.parameters()) + peak_of(step, CPU)

    assert needed(found.rows) <= memory
    assert needed(found.rows) == pytest.approx(found.peak, rel=0.1)


@pytest.mark.parametrize(("base", "each"), [(1000, 10), (5000, 1000), (0, 3000), (100, 1)])
@pytest.mark.parametrize("bend", [1.0, 1.5, 0.5])
@pytest.mark.parametrize("out_of_memory", [False, True])
def test_the_search_ends_at_the_border(base: int, each: int, bend: float, out_of_memory: bool) -> None:
    """Also where memory grows faster or slower than by the row; and nothing far beyond what is foretold is tried."""
    tried: dict[int, float] = {}
    model, x, limit = nn.Linear(2, 1), torch.zeros(1, 2), 0.9 * 20000

    def run(rows: int) -> float:
        tried[rows] = base + each * rows**bend
        if out_of_memory and tried[rows] > limit:
            raise torch.OutOfMemoryError("out of memory")
        return tried[rows]

    for at_most in (1, 7, 100, 10**6):
        tried.clear()
        found = measured_physical_batch(model, x, 20000, at_most, run=run)
        assert len(tried) == len(set(tried)) <= 14 and found.peak == tried[found.rows] <= limit
        assert found.rows <= at_most
        border = found.rows + max(8, found.rows // 2)
        assert found.rows == at_most or base + each * border**bend > limit
        assert max([*tried.values()][1:], default=0.0) < 2.1 * limit
    with pytest.raises(DPCompileError, match="not one example fits"):
        measured_physical_batch(model, x, 20000, 100, run=lambda rows: 10**9)


def test_nothing_is_touched() -> None:
    """Model, gradients, optimizer, random state, accountant, loader, and hooks: in the middle of a run."""
    plain, data = Pictures(), TensorDataset(torch.randn(40, 3, 8, 8), torch.randint(0, 3, (40,)))
    private: Any = make_private(
        plain,
        torch.optim.Adam(plain.parameters()),
        DataLoader(data, batch_size=8),
        noise_multiplier=1.0,
        backend="eager",
    )
    model, optimizer, loader = private
    batches, accountant = iter(loader), optimizer.accountant
    x, y = next(batches)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    x, y = next(batches)
    F.cross_entropy(model(x), y).backward()
    engine: Any = engine_of(model)
    called: list[int] = []
    handle = plain.register_forward_hook(lambda *_: called.append(1))
    before = {
        "state": copy.deepcopy(plain.state_dict()),
        "gradients": [(id(p.grad), p.grad.clone()) for p in plain.parameters() if p.grad is not None],
        "versions": [(p._version, id(p)) for p in (*plain.parameters(), *plain.buffers())],
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "random": torch.get_rng_state(),
        "accountant": copy.deepcopy(accountant.state_dict()),
        "loader": copy.deepcopy(loader.state_dict()),
        "norms": engine.grad_norms,
        "transformed": engine.transformed,
    }
    advice = advise(
        3000, target_epsilon=3.0, model=model, inputs=torch.ones(2, 3, 8, 8), memory=MIB, measure=True,
        accountant="rdp",
    )  # fmt: skip
    handle.remove()
    assert advice.physical_batch is not None and advice.physical_batch.measured
    assert "was run and seen to fit" in str(advice)
    after = copy.deepcopy(plain.state_dict())
    assert all(torch.equal(after[k], v) for k, v in before["state"].items())
    gradients = [(id(p.grad), p.grad) for p in plain.parameters() if p.grad is not None]
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(gradients, before["gradients"], strict=True))
    assert before["versions"] == [(p._version, id(p)) for p in (*plain.parameters(), *plain.buffers())]
    assert str(before["optimizer"]) == str(optimizer.state_dict())
    assert torch.equal(before["random"], torch.get_rng_state())
    assert before["accountant"] == accountant.state_dict()
    assert str(before["loader"]) == str(loader.state_dict())
    assert engine.transformed is before["transformed"] and torch.equal(engine.grad_norms, before["norms"])
    optimizer.step()
    x, y = next(batches)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.logical_step == 3


def test_the_options_of_the_model_are_taken() -> None:
    """In which dimension examples lie, and what all share; memory that it has been given."""
    model: Any = dp_compile(Pictures(), backend="eager", in_dims={"x": 0, "scale": None}, memory_budget=MIB)
    found = measured_physical_batch(model, {"x": torch.randn(2, 3, 8, 8), "scale": torch.ones(16)}, 4 * MIB, 12)
    assert found.rows == 12


@pytest.mark.slow
def test_a_model_that_is_not_private_yet() -> None:
    """It runs as it will: by Inductor."""
    ordinary = measured_physical_batch(Small(), torch.randn(3, 4), 4 * MIB, 8)
    assert ordinary.rows == 8 and ordinary.peak < MIB


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_what_is_refused() -> None:
    known: dict[str, Any] = {"target_epsilon": 3.0, "accountant": "rdp"}
    with pytest.raises(PrivacyError, match="measure=True without inputs"):
        advise(1000, model=Small(), measure=True, **known)
    with pytest.raises(DPCompileError, match="not one example fits"):
        measured_physical_batch(dp_compile(Small(), backend="eager"), torch.randn(2, 4), 100, 10)
    decorated: Any = dp_compile(backend="eager")(Small)
    with pytest.raises(PrivacyError, match="is a class that dp_compile decorates"):
        measured_physical_batch(decorated(), torch.randn(2, 4), MIB, 10)
    users: Any = dp_compile(Small(), backend="eager", examples_per_user=2)
    with pytest.raises(PrivacyError, match="on several ranks, or of users"):
        measured_physical_batch(users, torch.randn(2, 4), MIB, 10)
