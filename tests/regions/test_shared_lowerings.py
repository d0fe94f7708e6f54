"""Parameters that several regions use, and graph breaks, where a backward is clipped at once or runs in two passes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from block_models import Around, D, dp_compile, ids, right, rows
from broken_models import BrokenGPT
from oracle import PseudoLoss, train_step
from shared_models import USES, Peeking, Tied, private
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dpcompile import UnsupportedGraphError
from dpcompile.module import engine_of
from dpcompile.regions.backward import RegionRun
from dpcompile.regions.runner import RegionRunner

TWICE = {"norm": "two_pass"}


def gradients(compiled: Any, x: Tensor) -> dict[str, Tensor]:
    compiled.zero_grad()
    train_step(compiled, (x,), {}, PseudoLoss(len(x)))
    return {n: p.grad.clone() for n, p in compiled.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def as_one_graph(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    return gradients(dp_compile(model, max_grad_norm=0.5, backend="eager", **options), x)


def kinds(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Fills with the lowerings of every parameter's regions."""
    found: dict[str, set[str]] = {}
    original = RegionRunner._started

    def started(self: Any, *args: Any) -> RegionRun:
        run = original(self, *args)
        for name in run.names:
            found.setdefault(name, set()).add(run.lowering.kind)
        return run

    monkeypatch.setattr(RegionRunner, "_started", started)
    return found


# --- clipped at once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipping", ["per_layer", "per_block"])
@pytest.mark.parametrize("function", USES, ids=lambda f: f.__name__)
def test_groups_over_two_regions_agree_with_one_graph(function: Any, clipping: str) -> None:
    model, x = Around(function), rows()
    wanted = as_one_graph(model, x, clipping=clipping)
    compiled = private(model, clipping=clipping)
    for _ in range(2):
        same(gradients(compiled, x), wanted)


@pytest.mark.parametrize("clipping", ["per_layer", "per_block"])
def test_a_tied_head_waits_and_the_blocks_are_clipped_at_once(clipping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Tied(), ids()
    wanted, found = as_one_graph(model, x, clipping=clipping), kinds(monkeypatch)
    same(gradients(private(model, clipping=clipping), x), wanted)
    assert found["tokens.weight"] == {"deferred"}
    assert all(kind == {"at once"} for name, kind in found.items() if name.startswith("blocks"))


def test_a_use_that_is_seen_too_late() -> None:
    """The first of the regions clips the parameter by itself: that call fails, and the next is compiled for it."""
    shared = nn.Linear(D, D)
    model, x = nn.Sequential(shared, nn.Tanh(), Peeking([shared]), Peeking([shared])), rows()
    compiled = private(model, clipping="per_layer")
    with pytest.raises(
        UnsupportedGraphError, match="'0.weight' turned out to be used in two regions [^!]*call the model"
    ):
        compiled(x)
    assert all(p.grad is None for p in model.parameters())
    wanted = as_one_graph(model, x, clipping="per_layer")
    for _ in range(2):
        same(gradients(compiled, x), wanted)


# --- two passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Tied, *(lambda f=f: Around(f) for f in USES[:3])])
def test_two_passes_are_refused(make: Any) -> None:
    model: Any = make()
    compiled = private(model, **TWICE)
    with pytest.raises(UnsupportedGraphError, match="is used in two regions of one forward, and the backward has two"):
        compiled(ids() if isinstance(model, Tied) else rows())


def test_two_passes_are_refused_where_a_use_is_seen_only_as_it_runs() -> None:
    shared = nn.Linear(D, D)
    compiled = private(nn.Sequential(shared, nn.Tanh(), Peeking([shared]), Peeking([shared])), **TWICE)
    with pytest.raises(
        UnsupportedGraphError, match="'0.weight' is used in two regions of one forward, and the backward"
    ):
        compiled(rows())


def test_a_budget_does_not_choose_two_passes() -> None:
    model = Tied()
    compiled = private(model, memory_budget=1)
    right(model, compiled, ids())
    right(model, compiled, ids())
    last = str(compiled.plan).splitlines()[-1]
    assert last.startswith("lowering: one backward; ") and last.endswith(
        "no two passes: 'tokens.weight' is used in several regions"
    )


def test_a_frozen_parameter_may_be_in_many_regions() -> None:
    model = Tied()
    model.tokens.weight.requires_grad_(False)
    compiled = private(model, memory_budget=1)
    right(model, compiled, ids())
    assert str(compiled.plan).splitlines()[-1].startswith("lowering: two passes; ")


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpointed_blocks_and_a_tied_head() -> None:
    model, x = Tied(), ids()
    wanted = as_one_graph(model, x)
    model.blocks = nn.ModuleList(checkpoint_wrapper(b) for b in model.blocks)
    found = gradients(private(model), x)
    same({n.replace("_checkpoint_wrapped_module.", ""): g for n, g in found.items()}, wanted)


def test_a_checkpointed_block_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.blocks
            return second(first(first(x).tanh()).tanh())

    model, x = Twice(), rows()
    wanted = as_one_graph(model, x)
    model.blocks = nn.ModuleList(checkpoint_wrapper(b) for b in model.blocks)
    found = gradients(private(model), x)
    same({n.replace("_checkpoint_wrapped_module.", ""): g for n, g in found.items()}, wanted)


# --- graph breaks ----------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """Three layers with breaks between them; the first weight is read again behind them if asked."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.first, self.third = nn.Linear(D, D), nn.Linear(D, D)
        self.second: nn.Module = nn.Linear(D, D)
        self.again, self.broken, self.calls = again, True, 0

    def _break(self) -> None:
        if self.broken:
            torch._dynamo.graph_break()
            self.calls += 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        self._break()
        x = self.second(x).tanh()
        self._break()
        return self.third(x) @ self.first.weight if self.again else self.third(x)


def without_breaks(model: Broken, x: Tensor, **options: Any) -> dict[str, Tensor]:
    model.broken = False
    try:
        return as_one_graph(model, x, **options)
    finally:
        model.broken = True


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "per_block"])
@pytest.mark.parametrize("again", [False, True])
def test_groups_between_breaks_agree_with_one_graph(again: bool, clipping: str) -> None:
    """Uses are found as they run: nothing is clipped at once."""
    model, x = Broken(again), rows()
    wanted = without_breaks(model, x, clipping=clipping)
    compiled = private(model, regions="breaks", clipping=clipping)
    for _ in range(2):
        same(gradients(compiled, x), wanted)


def test_two_passes_between_breaks() -> None:
    model, x = Broken(False), rows()
    wanted = without_breaks(model, x)
    compiled = private(model, regions="breaks", **TWICE)
    for _ in range(2):
        same(gradients(compiled, x), wanted)
    compiled = private(Broken(True), regions="breaks", **TWICE)
    with pytest.raises(UnsupportedGraphError, match="'first.weight' is used in two regions of one forward, and the"):
        compiled(x)


def test_a_budget_does_not_run_a_model_with_breaks_twice() -> None:
    model, x = Broken(False), rows()
    wanted = without_breaks(model, x)
    compiled = private(model, regions="breaks", memory_budget=1)
    same(gradients(compiled, x), wanted)
    assert model.calls == 2 and str(compiled.plan).endswith("no two passes: graph breaks")


def test_a_checkpoint_between_breaks() -> None:
    model, x = Broken(False), rows()
    wanted = without_breaks(model, x)
    model.second = checkpoint_wrapper(model.second)
    found = gradients(private(model, regions="breaks"), x)
    same({n.replace("_checkpoint_wrapped_module.", ""): g for n, g in found.items()}, wanted)


@pytest.mark.parametrize("regions", [None, "blocks", "breaks"])
def test_nothing_of_a_call_is_held_on_to(regions: str | None) -> None:
    broken = regions == "breaks"
    batch = ids if broken else rows
    compiled = private(BrokenGPT() if broken else nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)), regions=regions)
    compiled(batch())
    gc.collect()
    gc.disable()  # no cycle holds it either
    try:
        for grad in (True, False):
            x = batch()
            given = weakref.ref(x)
            with torch.set_grad_enabled(grad):
                compiled(x)
            del x
            assert given() is None and not engine_of(compiled).running  # type: ignore[attr-defined]
    finally:
        gc.enable()
