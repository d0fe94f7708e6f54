"""Saved states: torch's functions on optimizer states, and states that are not whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.utils.data import TensorDataset

import dpcompile
from dpcompile import DPOptimizer, PoissonLoader, PrivacyAccountant, PrivacyError

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have

INNER: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "groups": lambda p: torch.optim.Adam([{"params": q, "lr": 0.01 * i} for i, q in enumerate(p, 1)]),
}
OPTIONS = {
    "plain": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}


def fresh(kind: str = "AdamW", seed: int | None = 7, **options: Any) -> tuple[Any, DPOptimizer]:
    torch.manual_seed(0)
    model = dp_compile(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), backend="eager")
    accountant = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1, method="rdp")
    common: dict[str, Any] = {"noise_multiplier": 1.0, "expected_batch_size": 16, "accountant": accountant, **options}
    return model, DPOptimizer(INNER[kind](model.parameters()), model, seed=seed, **common)


def train(model: Any, optimizer: DPOptimizer, steps: int) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    for _ in range(steps):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(model: Any, other: Any) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.filterwarnings("ignore:.*torch.distributed is")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("AdamW", "plain"),
        ("AdamW", "flat"),
        ("AdamW", "full"),
        ("SGD", "flat"),
        ("momentum", "plain"),
        ("groups", "flat"),
    ],
)
def test_torchs_functions_keep_the_place_of_the_noise(kind: str, options: str) -> None:
    whole, optimizer = fresh(kind)
    train(whole, optimizer, 4)
    model, optimizer = fresh(kind)
    train(model, optimizer, 2)
    saved = copy.deepcopy(get_state_dict(model, optimizer, options=OPTIONS[options]))
    model, optimizer = fresh(kind, seed=None)
    set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=OPTIONS[options])
    assert (optimizer.seed, optimizer.logical_step, optimizer.accountant.steps) == (7, 2, 2)  # type: ignore[union-attr]
    train(model, optimizer, 2)
    assert_same(model, whole)


@pytest.mark.filterwarnings("ignore:.*torch.distributed is", "ignore::FutureWarning")
@pytest.mark.parametrize("options", ["flat"])
def test_through_a_distributed_checkpoint(tmp_path: Path, options: str) -> None:
    whole, optimizer = fresh()
    train(whole, optimizer, 4)
    model, optimizer = fresh()
    train(model, optimizer, 2)
    weights, state = get_state_dict(model, optimizer, options=OPTIONS[options])
    checkpoint.save({"model": weights, "optim": state}, checkpoint_id=tmp_path)  # type: ignore[attr-defined]
    model, optimizer = fresh(seed=None)
    weights, state = get_state_dict(model, optimizer, options=OPTIONS[options])
    loaded = {"model": weights, "optim": state}
    checkpoint.load(loaded, checkpoint_id=tmp_path)  # type: ignore[attr-defined]
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=loaded["optim"], options=OPTIONS[options]
    )
    train(model, optimizer, 2)
    assert_same(model, whole)


@pytest.mark.parametrize("kind", INNER)
def test_making_the_state_changes_nothing_else(kind: str) -> None:
    model, optimizer = fresh(kind)
    before = copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert optimizer.logical_step == 0 and optimizer.accountant.steps == 0  # type: ignore[union-attr]
    assert all(p.grad is None for p in model.parameters())
    assert all(group["lr"] > 0 for group in optimizer.param_groups)


def test_only_a_step_that_changes_nothing_makes_state() -> None:
    model, optimizer = fresh()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(PrivacyError, match="clipped backward"):
        optimizer.step()  # the rate is not 0
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(PrivacyError, match="clipped backward"):
        optimizer.step()  # the gradients are not 0


def test_groups_of_two_runs_are_refused() -> None:
    states = []
    for steps in (1, 2):
        model, optimizer = fresh("groups")
        train(model, optimizer, steps)
        states.append(get_optimizer_state_dict(model, optimizer))
    states[0]["param_groups"][1:] = states[1]["param_groups"][1:]  # type: ignore[index]
    model, optimizer = fresh("groups")
    with pytest.raises(PrivacyError, match="come from different runs or steps"):
        set_optimizer_state_dict(model, optimizer, states[0])


def test_a_plain_optimizers_state_is_refused_by_name() -> None:
    model, optimizer = fresh()
    plain = torch.optim.AdamW(model.parameters())
    with pytest.raises(PrivacyError, match=r"no 'dpcompile' entry(.|\n)*dpcompile.checkpoint.save_checkpoint"):
        set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, plain))
    with pytest.raises(PrivacyError, match="no 'dpcompile' entry"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())


WRONG: tuple[Any, ...] = (None, -1, 1.5, "3", [], {}, True, float("nan"), 10**80, (1, 2))


def paths(state: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys: Any = state.keys() if isinstance(state, dict) else range(len(state)) if isinstance(state, list) else ()
    return [p for k in keys for p in ((*at, k), *paths(state[k], (*at, k)))]


def changed(state: Any, path: tuple[Any, ...], *value: Any) -> Any:
    state = copy.deepcopy(state)
    inside = state
    for key in path[:-1]:
        inside = inside[key]
    if value:
        inside[path[-1]] = value[0]
    else:
        del inside[path[-1]]
    return state


def variants(state: Any, below: tuple[Any, ...] = ()) -> Any:
    for path in [p for p in paths(state) if p[: len(below)] == below and p]:
        yield path, changed(state, path)
        for value in WRONG:
            yield (*path, value), changed(state, path, value)


def test_an_optimizers_state_is_whole_or_refused() -> None:
    model, optimizer = fresh("SGD")
    train(model, optimizer, 3)
    state = {k: v for k, v in optimizer.state_dict().items()}
    _, target = fresh("SGD", seed=None)
    passed = []
    for path, broken in variants(state):
        try:
            target.load_state_dict(broken)
        except PrivacyError:
            continue
        passed.append(path)
        assert (target.seed, target.logical_step, target.accountant.steps) == (7, 3, 3) or path[:2] in (  # type: ignore[union-attr]
            ("dpcompile", "seed"),
            ("dpcompile", "accountant"),
        ), path
        _, target = fresh("SGD", seed=None)
    own = [p for p in passed if p[0] == "dpcompile" and p[1:2] not in (("seed",), ("accountant",))]
    # the first two are found again in the groups; the third is a run without a loader
    assert own == [("dpcompile",), ("dpcompile", None), ("dpcompile", "draws", None)], own


def test_a_loaders_state_is_whole_or_refused() -> None:
    def loader(seed: int | None) -> PoissonLoader:
        return PoissonLoader(TensorDataset(torch.randn(20, 2)), expected_batch_size=4, seed=seed)

    first = loader(5)
    next(iter(first.batches()))
    for path, broken in variants(first.state_dict()):
        target = loader(None)
        try:
            target.load_state_dict(broken)
        except PrivacyError:
            continue
        assert path[0] == "seed" and isinstance(path[1], int) or target.state_dict() == first.state_dict(), path


@pytest.mark.parametrize("entry", ["seed", "logical_step", "secure", "noise_multiplier", "accountant"])
def test_what_is_missing_is_named(entry: str) -> None:
    model, optimizer = fresh()
    state = optimizer.state_dict()
    del state["dpcompile"][entry]
    with pytest.raises(PrivacyError, match=f"state lacks '{entry}'"):
        optimizer.load_state_dict(state)


def test_an_accountant_that_missed_steps_is_refused() -> None:
    model, optimizer = fresh()
    train(model, optimizer, 3)
    state = optimizer.state_dict()
    state["dpcompile"]["accountant"]["history"][0][2] = 1
    with pytest.raises(PrivacyError, match="at logical step 3, and its accountant counted 1"):
        fresh(seed=None)[1].load_state_dict(state)
