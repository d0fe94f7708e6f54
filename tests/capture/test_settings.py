"""Dynamo's settings of a private compilation hold while Dynamo compiles for us, whoever calls it, and no longer."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config

import dpcompile
from dpcompile.errors import DPCompileError
from dpcompile.module import engine_of
from dpcompile.runtime.engine import GraphEngine

dp_compile: Any = dpcompile.dp_compile


class Recurrent(nn.Module):
    """Which Dynamo refuses under its own settings."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def norms_of(private: Any, x: Tensor) -> Tensor:
    private.zero_grad()
    private(x).square().mean(1).mean().backward()
    return private.grad_norms


def test_they_are_entered_to_compile_and_left_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Any]] = {"compiling": [], "running": []}
    compiles, ran = GraphEngine._backend, GraphEngine.ran
    lstm = vars(torch._VF).get("lstm")

    def note(when: str) -> None:
        seen[when].append((config.allow_rnn, config.skip_nnmodule_hook_guards, vars(torch._VF).get("lstm") is lstm))

    def backend(self: Any, *graph: Any) -> Any:
        note("compiling")
        return compiles(self, *graph)

    def has_run(self: Any, *found: Any) -> None:
        note("running")
        ran(self, *found)

    monkeypatch.setattr(GraphEngine, "_backend", backend)
    monkeypatch.setattr(GraphEngine, "ran", has_run)
    private, usual = (
        dp_compile(Recurrent(), backend="eager"),
        (config.allow_rnn, config.skip_nnmodule_hook_guards, False),  # guards look for what stands in
    )
    for size in (3, 3, 5):
        norms_of(private, torch.randn(size, 4, 3))
    assert set(seen["compiling"]) == {(True, False, False)}
    assert seen["running"] == [usual] * 3
    with pytest.raises(DPCompileError):
        private(torch.randn(3, 4, 7))
    assert (config.allow_rnn, config.skip_nnmodule_hook_guards, vars(torch._VF).get("lstm") is lstm) == (
        *usual[:2],
        True,
    )


def test_what_stands_in_is_found_by_the_guards_of_every_call() -> None:
    private = dp_compile(Recurrent(), backend="eager")
    norms_of(private, torch.randn(3, 4, 3))
    compiled = engine_of(private).transformed
    for _ in range(12):  # more than a function may be compiled
        norms_of(private, torch.randn(3, 4, 3))
        nn.LSTM(3, 4)(torch.randn(2, 3))  # torch's own, between
    assert engine_of(private).transformed is compiled


@pytest.mark.parametrize("stance", ["default", "eager_then_compile", "aot_eager_then_compile", "fail_on_recompile"])
def test_a_hook_that_comes_later_is_seen_under_every_stance(stance: Any) -> None:
    """Without our settings a graph is not guarded against it, and would go on without the hook."""
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    private, x = dp_compile(plain, backend="eager", max_grad_norm=1e6), torch.randn(6, 4)
    with torch.compiler.set_stance(stance):
        for hooked in (False, True):
            reference = copy.deepcopy(plain)
            try:
                found = norms_of(private, x)
                norms_of(private, torch.randn(6, 4))
                found = norms_of(private, x)
            except (DPCompileError, RuntimeError):
                found = None  # not compiled, and refused
            if found is not None:
                reference(x[:1]).square().mean(1).sum().backward()
                own = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()
                torch.testing.assert_close(found[0], own)
            if not hooked:
                plain[0].register_forward_hook(doubled)


def test_threads_do_not_take_them_from_each_other() -> None:
    """Of settings entered and left at every call, one thread's end left those of another that still compiled."""
    errors: list[BaseException] = []

    def train(kind: Any, shape: tuple[int, ...]) -> None:
        try:
            torch.manual_seed(0)
            plain = kind()
            private = dp_compile(plain, backend="eager")
            for size in (2, 5):
                norms_of(private, torch.randn(size, *shape))
            assert engine_of(private).transformed is not None
        except BaseException as error:
            errors.append(error)

    linear = lambda: nn.Sequential(nn.Linear(3, 2))  # noqa: E731
    threads = [threading.Thread(target=train, args=of) for of in [(Recurrent, (4, 3)), (linear, (3,))] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_a_compiled_call_goes_on_where_dynamo_is_switched_off_between() -> None:
    private, x = dp_compile(nn.Linear(4, 3), backend="eager"), torch.randn(6, 4)
    before = norms_of(private, x)
    with config.patch(disable=True), pytest.raises(DPCompileError, match="switch torch.compile on again"):
        norms_of(dp_compile(nn.Linear(4, 3), backend="eager"), x)
    torch.testing.assert_close(norms_of(private, x), before)
