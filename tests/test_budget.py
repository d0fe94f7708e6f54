"""The promised budget is kept: what would void it in a loop is refused where it happens, or told."""

from __future__ import annotations

import copy
import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import PrivacyError, PrivacyWarning, make_private, plan_privacy

N = 64


class Run:
    """A model before and after it was made private."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.plain = nn.Linear(5, 3)
        self.old = DataLoader(TensorDataset(torch.randn(N, 5), torch.randint(0, 3, (N,))), batch_size=8, shuffle=True)
        self.before = torch.optim.SGD(self.plain.parameters(), lr=0.1)
        options = options or {"noise_multiplier": 1.0}
        self.model, self.optimizer, self.loader = make_private(
            self.plain, self.before, self.old, backend="eager", **options
        )

    def step(self, x: Any, y: Any, *, model: Any = None, optimizer: Any = None) -> None:
        optimizer = optimizer or self.optimizer
        F.cross_entropy((model or self.model)(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


target = functools.partial(Run, target_epsilon=3.0, target_delta=1e-3, epochs=1, accountant="rdp")


def before(run: Run) -> None:
    for x, y in run.loader:
        run.step(x, y, optimizer=run.before)


def after(run: Run) -> None:
    another = torch.optim.Adam(run.model.parameters())
    for x, y in run.loader:
        run.step(x, y, optimizer=another)


def on_the_plain_model(run: Run) -> None:
    for x, y in run.loader:
        run.step(x, y, model=run.plain)


def all_before(run: Run) -> None:
    for x, y in run.loader:
        run.step(x, y, model=run.plain, optimizer=run.before)


def both(run: Run) -> None:
    for x, y in run.loader:
        F.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
        run.before.step()


def by_hand(run: Run) -> None:
    for x, y in run.loader:
        F.cross_entropy(run.model(x), y).backward()
        for p in run.model.parameters():
            assert p.grad is not None
            p.data -= 0.1 * p.grad
        run.model.zero_grad()


def old_loader(run: Run) -> None:
    for x, y in run.old:
        run.step(x, y)


def old_loader_listed(run: Run) -> None:
    for x, y in list(run.old):
        run.step(x, y)


def validation(run: Run) -> None:
    for x, y in run.loader:
        run.step(x, y)
    for x, y in DataLoader(TensorDataset(torch.randn(16, 5), torch.randint(0, 3, (16,))), batch_size=16):
        run.step(x, y)


def whole_data(run: Run) -> None:
    for _ in run.loader:
        run.step(*run.loader.dataset.tensors)


def whole_data_without_a_loader(run: Run) -> None:
    run.step(*run.loader.dataset.tensors)


def a_draw_twice(run: Run) -> None:
    for x, y in run.loader:
        run.step(x, y)
        run.step(x, y)


def steps_twice(run: Run) -> None:
    for x, y in run.loader:
        F.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
        run.optimizer.step()


def draws_of_before(run: Run) -> None:
    kept = []
    for x, y in run.loader:
        kept.append((x.clone(), y))
        run.step(x, y)
    for x, y in kept:
        run.step(x, y)


def beyond(run: Run) -> None:
    for _ in range(2):
        for x, y in run.loader:
            run.step(x, y)


OUTSIDE = [
    (before, Run, "the wrapped optimizer|clipped sum of parameter 'weight': its update would have no noise"),
    (after, Run, "Adam.step.. on the clipped sum of parameter 'weight': its update would have no noise"),
    (on_the_plain_model, Run, "no clipped backward reached it, and something else set p.grad"),
    (all_before, Run, "the wrapped optimizer was stepped directly"),
    (both, Run, "the wrapped optimizer was stepped directly"),
    (by_hand, Run, "the optimizer was not stepped after the last draw"),
    (old_loader, Run, "what is no batch of the loader"),
    (old_loader_listed, Run, "what is no batch of the loader"),
    (validation, Run, "what is no batch of the loader"),
    (whole_data, Run, "has 16 rows, and the model was called with 64"),
    (whole_data_without_a_loader, Run, "what is no batch of the loader"),
    (a_draw_twice, Run, "a second backward on one batch of the loader"),
    (steps_twice, Run, "a second optimizer step on the same gradients"),
    (draws_of_before, Run, "what is no batch of the loader, or on one a second time"),
    (beyond, target, "step 9 of a run whose noise is calibrated for 8: epsilon is above the target"),
]


@pytest.mark.filterwarnings("ignore:all 8 planned steps are taken")
@pytest.mark.parametrize(("loop", "make", "message"), OUTSIDE, ids=[loop.__name__ for loop, _, _ in OUTSIDE])
def test_loops_outside_the_budget_are_refused_with_their_line(
    loop: Callable[[Run], None], make: Callable[[], Run], message: str
) -> None:
    run = make()
    with pytest.raises(PrivacyError, match=message) as caught:
        loop(run)
    where = re.fullmatch(rf"{re.escape(__file__)}:(\d+), in (\w+): (.+)", str(caught.value.where))
    assert where is not None and where[2] in (loop.__name__, "step")
    line = pathlib.Path(__file__).read_text().splitlines()[int(where[1]) - 1].strip()
    assert line == where[3] and re.search(r"step\(|backward\(|model\)?\(", line)
    assert run.optimizer.accountant is not None and run.optimizer.accountant.steps <= 8


@pytest.mark.parametrize("delta", [1 / N, 0.5])
def test_a_delta_that_promises_nothing_is_refused(delta: float) -> None:
    message = f"delta is {delta:g}, and there are 64 in the dataset"
    with pytest.raises(PrivacyError, match=message) as caught:
        target(target_delta=delta)
    assert "tests/test_budget.py" in str(caught.value)
    suggested = float(str(caught.value).rpartition("such as ")[2])
    assert target(target_delta=suggested).optimizer.noise_multiplier > 0
    with pytest.raises(PrivacyError, match=message):
        plan_privacy(
            dataset_size=N, expected_batch_sizes=[8], steps=[8], target_delta=delta, target_epsilon=3.0, method="rdp"
        )
    target(target_delta=1 / N - 1e-6)


def test_the_end_of_the_plan_is_told() -> None:
    run = target()
    for x, y in run.loader:
        run.step(x, y)
    with pytest.warns(PrivacyWarning, match="all 8 planned steps are taken, and another pass") as told:
        iter(run.loader)
    assert told[0].filename == __file__
    run = target(on_exceed="ignore")
    for _ in range(2):
        for x, y in run.loader:
            run.step(x, y)


def test_a_state_restored_twice_counts_what_it_counted() -> None:
    first = target(seed=3)
    it = iter(first.loader)
    for _ in range(6):
        first.step(*next(it))
    states = copy.deepcopy((first.optimizer.state_dict(), first.loader.state_dict()))
    for _ in range(2):
        run = target(seed=3)
        run.optimizer.load_state_dict(states[0])
        run.loader.load_state_dict(states[1])
        assert run.optimizer.accountant is not None and run.optimizer.accountant.steps == 6
    first.step(*next(it))
    with pytest.raises(PrivacyError, match="stands at logical step 6, this optimizer at 7 of the same seed"):
        first.optimizer.load_state_dict(states[0])
    with pytest.raises(PrivacyError, match="step"):
        first.loader.load_state_dict(states[1])


@pytest.mark.parametrize("again", ["the private model", "the plain one"])
def test_steps_before_are_counted_or_told(again: str) -> None:
    run = Run()
    for x, y in run.loader:
        run.step(x, y)

    def another(**options: Any) -> Any:
        model = run.model if again == "the private model" else run.plain
        options |= {} if model is run.model else {"backend": "eager"}
        made = make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), run.old, **options)
        x, y = next(iter(made[2]))
        F.cross_entropy(made[0](x), y).backward()
        made[1].step()
        made[1].zero_grad()
        return made[1].accountant

    with pytest.warns(PrivacyWarning, match=r"took 8 private step\(s\) before, with another DPOptimizer"):
        another(noise_multiplier=1.0)
    known = run.optimizer.accountant
    went_on = another(accountant=known, noise_multiplier=run.optimizer.noise_multiplier)
    assert went_on is known and went_on.steps == 9
