"""Accelerate: prepared before or after, the weights of the plain loop; states that go on exactly."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launching import launch, passed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import dpcompile
from dpcompile import PrivacyError

accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402

from dpcompile.integrations.accelerate import make_private  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore:two DPOptimizers of one seed")]

OPTIONS: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "seed": 5, "backend": "eager"}


@pytest.fixture(autouse=True)
def _fresh():
    """Accelerate keeps its settings in singletons."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def accelerator(**options: Any) -> Any:
    return accelerate.Accelerator(cpu=True, **options)


def parts(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(48, 6), torch.randint(0, 3, (48,)))
    loader = DataLoader(data, **{"batch_size": 8, "shuffle": True, **options})
    return net, torch.optim.Adam(net.parameters(), lr=0.05), loader


def train(model, optimizer, loader, accelerator=None, *, epochs: int = 2, scheduler=None, skip: int = 0) -> None:
    for _ in range(epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            if accelerator is None:
                loss.backward()
            else:
                accelerator.backward(loss)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def plain(epochs: int = 2, **options: Any) -> nn.Module:
    net, optimizer, loader = parts()
    train(*dpcompile.make_private(net, optimizer, loader, **OPTIONS, **options), epochs=epochs)
    return net


@pytest.mark.parametrize("physical", [24, 3])
@pytest.mark.parametrize("order", ["prepared before", "prepared after", "in one call"])
def test_weights_are_those_of_the_plain_loop(order, physical):
    own, (net, optimizer, loader) = accelerator(), parts()
    options: dict[str, Any] = {**OPTIONS, "physical_batch_size": physical}
    if order == "prepared after":
        private: Any = own.prepare(*dpcompile.make_private(net, optimizer, loader, **options))
    else:
        if order == "prepared before":
            net_too, optimizer, loader = own.prepare(net, optimizer, loader)
            assert net_too is net
        private = make_private(own, net, optimizer, loader, **options)
    model, optimizer, loader = private
    train(model, optimizer, loader, own)
    assert optimizer.optimizer.accountant.steps == 12
    assert same(net, plain(physical_batch_size=physical))
    assert list(own.unwrap_model(model).state_dict()) == list(net.state_dict())


@pytest.mark.full  # a launch of two ranks
def test_two_processes():
    """DistributedDataParallel by Accelerate: weights and states are those of one process."""
    assert passed(launch(2, "accelerated_worker.py")) == {"weights", "states"}


@pytest.mark.full  # a launch of two ranks
def test_two_processes_by_fsdp():
    """FSDP2 by Accelerate: weights and states are those of one process."""
    done = passed(launch(2, "accelerated_fsdp_worker.py"))
    assert done == {"weights", "states", "transformers", "refused"}


def test_a_scheduler_and_accumulate():
    """``accumulate`` around every batch, one batch a step; the scheduler goes with the steps."""
    own, (net, optimizer, loader) = accelerator(), parts()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    model, private, draws = make_private(own, net, optimizer, loader, **OPTIONS)
    schedule = own.prepare(schedule)
    for x, y in draws:
        with own.accumulate(model):
            own.backward(F.cross_entropy(model(x), y))
            private.step()
            schedule.step()
            private.zero_grad()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 4)
    assert private.optimizer.accountant.steps == 6


def test_a_saved_state_goes_on_exactly(tmp_path):
    options = {"noise_multiplier": 1.0, "backend": "eager", "physical_batch_size": 5}
    first, (net, optimizer, loader) = accelerator(), parts()
    model, private, draws = make_private(first, net, optimizer, loader, seed=5, **options)
    for number, (x, y) in enumerate(draws):
        first.backward(F.cross_entropy(model(x), y))
        private.step()
        private.zero_grad()
        if number == 3:
            first.save_state(tmp_path / "state")
    train(model, private, draws, first, epochs=1)
    second, (other, optimizer, loader) = accelerator(), parts()
    model, private, draws = make_private(second, other, optimizer, loader, **options)
    second.load_state(tmp_path / "state")
    assert private.optimizer.accountant.steps == 4
    train(model, private, draws, second, epochs=2)  # the rest of the first, and the second
    assert same(net, other) and private.optimizer.accountant.steps == 12


def test_a_state_without_the_draws_is_refused(tmp_path):
    """Prepared after, the loader is registered by hand: the message says so, and that helps."""
    own, given = accelerator(), parts()
    model, optimizer, loader = own.prepare(*dpcompile.make_private(*given, **OPTIONS))
    train(model, optimizer, loader, own, epochs=1)
    own.save_state(tmp_path / "without")
    own.register_for_checkpointing(loader)
    own.save_state(tmp_path / "with")
    for folder in ("without", "with"):
        _reset()
        own, given = accelerator(), parts()
        model, optimizer, loader = own.prepare(*dpcompile.make_private(*given, **OPTIONS))
        if folder == "with":
            own.register_for_checkpointing(loader)
        own.load_state(tmp_path / folder)
        if folder == "without":
            with pytest.raises(PrivacyError, match="load the loader's state too"):
                train(model, optimizer, loader, own, epochs=1)
        else:
            train(model, optimizer, loader, own, epochs=1)
            assert same(given[0], plain())


def _reset() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_mixed_precision():
    own, (net, optimizer, loader) = accelerator(mixed_precision="bf16"), parts()
    model, private, draws = make_private(own, net, optimizer, loader, **OPTIONS)
    train(model, private, draws, own)
    expected, inner, loader = parts()
    other, private_too, draws = dpcompile.make_private(expected, inner, loader, **OPTIONS)
    for _ in range(2):
        for x, y in draws:
            with torch.autocast("cpu", torch.bfloat16):
                out = other(x)
            F.cross_entropy(out.float(), y).backward()
            private_too.step()
            private_too.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(net.parameters(), expected.parameters(), strict=True))
    assert private.optimizer.accountant.steps == 12


def test_what_is_refused():
    with pytest.raises(PrivacyError, match="gradient_accumulation_steps is 4"):
        make_private(accelerator(gradient_accumulation_steps=4), *parts(), **OPTIONS)
    _reset()
    with pytest.raises(PrivacyError, match="the accelerator compiles with INDUCTOR"):
        make_private(accelerator(dynamo_backend="inductor"), *parts(), **OPTIONS)
    _reset()
    own = accelerator()
    with pytest.raises(PrivacyError, match="AcceleratedOptimizer around another one") as refused:
        dpcompile.make_private(*own.prepare(*parts()), **OPTIONS)
    assert "dpcompile.integrations.accelerate.make_private(accelerator" in str(refused.value)
    net, optimizer, loader = parts()
    odd = DataLoader(loader.dataset, 8, sampler=WeightedRandomSampler([1.0] * 48, 48))
    with pytest.raises(PrivacyError, match="sampler is WeightedRandomSampler"):
        make_private(own, *own.prepare(net, optimizer, odd), **OPTIONS)


def test_clipping_by_hand_is_refused():
    own = accelerator()
    model, optimizer, loader = make_private(own, *parts(), **OPTIONS)
    x, y = next(iter(loader))
    own.backward(F.cross_entropy(model(x), y))
    own.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(PrivacyError, match=r"changed in place(.*\n)+.*leave out what changed it: clip_grad_norm_"):
        optimizer.step()


def test_the_page():
    """What the page says runs."""
    page = (pathlib.Path(__file__).parents[2] / "docs/frameworks.md").read_text()
    (block,) = re.findall(r"```py\n(.*?)```", page.partition("## Accelerate")[2].partition("\n## ")[0], re.DOTALL)
    net, optimizer, loader = parts()
    given = {"model": net, "optimizer": optimizer, "loader": loader}
    given["scheduler"] = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    exec(
        block.replace("Accelerator()", "Accelerator(cpu=True)").replace("epochs=20", "epochs=20, backend='eager'"),
        given,
    )
    train(given["model"], given["optimizer"], given["loader"], given["accelerator"], epochs=1)
