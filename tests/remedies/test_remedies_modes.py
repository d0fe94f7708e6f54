"""What sees a private model's operations, and what is asked of a machine: what the messages say to do, tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from private_steps import X
from remedies import Right, equals, plain, refused, right
from test_remedies_module import REBUILD
from test_remedies_surroundings import rebuilt
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from dpcompile import advise, dp_compile


@refused(REBUILD)
def test_a_trace_by_fx(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    traced = make_fx(rebuilt(model) if told else model)(X)
    return equals(torch.allclose(traced(X), model(X)), True)


@refused("use that mode with an ordinary model (model.state_dict() loads into one), or leave it for the call", ways=2)
def test_a_mode_that_counts(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    counter = FlopCounterMode(display=False)
    if told == 2:
        return right(model, X)
    with counter:
        (rebuilt(model) if told else model)(X)
    return equals(counter.get_total_flops(), 2 * X.numel() * 3)


@refused("give inputs= too, or leave it out", ways=2)
def test_measured_advice_without_inputs(told: int) -> Right:
    given: dict[str, Any] = ({"measure": True}, {"measure": True, "inputs": X}, {})[told]
    found = advise(1000, target_epsilon=3.0, model=plain(), accountant="rdp", **given)
    return equals((found.physical_batch is not None, found.batch_size > 0), (told == 1, True))


@refused("use one of 'a100', 'h100', 'h200'; without a name the rates are those of this machine", ways=2)
def test_rates_of_an_unknown_machine(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    model.trace(X, **({"rates": ("a101", "h100")[told]} if told < 2 else {}))
    return right(model, X)


@refused("set it to a folder that can be written to, or unset it", ways=2)
def test_a_trace_into_a_file(told: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Right:
    (tmp_path / "file").write_text("")
    if told < 2:
        monkeypatch.setenv("DPCOMPILE_TRACE", str(tmp_path / ("graphs" if told else "file")))
    return right(dp_compile(plain(), backend="eager"), X)


class Jittered(torch.autograd.Function):
    """Its backward reads numbers that count for nothing, or draws them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, drawn: Tensor | None) -> Tensor:  # noqa: D102
        ctx.drawn = drawn
        return x * 1

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:  # noqa: D102
        (cotangent,) = cotangents
        drawn = torch.rand_like(cotangent) if ctx.drawn is None else ctx.drawn
        return cotangent * (1 + 0 * drawn), None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor, drawn: Tensor | None) -> Tensor:
        return Jittered.apply(self.linear(x).tanh(), drawn)  # type: ignore[return-value]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, drawn: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, drawn)
        return x


@refused("use norm='auto' without memory_budget, or draw the numbers outside of the model and pass them to it", ways=2)
def test_numbers_drawn_in_a_backward_that_runs_twice(told: int) -> Right:
    norm: Any = "auto" if told == 1 else "two_pass"
    model = dp_compile(Layers(), norm=norm, regions="blocks", backend="eager")
    return right(model, X, torch.rand_like(X)) if told == 2 else right(model, X)
