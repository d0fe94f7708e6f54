"""Graph breaks: what the messages about what Python does between two graphs say to do, tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from block_models import D, rows
from broken_models import graph_break
from remedies import Right, refused, right
from torch import Tensor, nn

from dpcompile import dp_compile

hidden: Any = torch._dynamo.disable
MOVE = "move it into a function or module that is compiled (not in the body of a loop that breaks), or remove the break"


class Model(nn.Module):
    """Two layers, and a function of (model, x) that calls them."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        self.free, self.function = nn.Parameter(torch.randn(D)), function
        self.register_buffer("table", torch.ones(D))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def between(function: Callable[[Any, Tensor], Any], x: Tensor | None = None, **options: Any) -> Right:
    everything: Any = {"backend": "eager", "regions": "breaks", **options}
    return right(dp_compile(Model(function), **everything), rows() if x is None else x)


def compiled_here(h: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.linear(h, w)


@refused(MOVE, ways=2)
def test_a_weight_that_is_used_between_graphs(told: int) -> Right:
    product = compiled_here if told else hidden(compiled_here)

    def function(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        if told == 1:
            graph_break()
        return product(h, m.b.weight) + m.b.bias + m.free

    return between(function)


@refused(
    "leave them tensors: no .item(), .tolist(), .numpy() or float(); torch.where instead of branches on values", ways=2
)  # fmt: ski, slow=True)
def test_a_branch_on_values_between_graphs(told: int) -> Right:
    def function(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        graph_break()
        if told == 1:
            h = h * x[:, :1]
        elif told == 2:
            h = torch.where(h.sum(1, keepdim=True) > 0, 2 * h, h)
        else:
            h = 2 * h if h.sum() > 0 else h
        return m.b(h) * m.free

    return between(function)


def doubled(h: Tensor) -> Tensor:
    return 2 * h


@refused(MOVE, ways=2)
def test_arithmetic_between_graphs(told: int) -> Right:
    twice = doubled if told else hidden(doubled)

    def function(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        if told == 1:
            graph_break()
        return m.b(twice(h)) * m.free

    return between(function)


@hidden
def made_outside() -> Tensor:
    return torch.ones(D)


@refused("compute it where it is compiled; register constants as buffers", ways=2, slow=True)
def test_a_constant_that_is_made_between_graphs(told: int) -> Right:
    def function(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        graph_break()
        constant = (made_outside, lambda: torch.ones(D), lambda: m.table)[told]()
        return m.b(h * constant) * m.free

    return between(function)


class Halved(torch.autograd.Function):
    """The identity, with half the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g / 2


@hidden
def hooked(h: Tensor) -> None:
    h.register_hook(lambda g: g / 2)


@refused("do it in a torch.autograd.Function in forward")
def test_a_hook_on_a_value_between_graphs(told: int) -> Right:
    def function(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        if told:
            h = Halved.apply(h)  # type: ignore[assignment]
            graph_break()
        else:
            hooked(h)
        return m.b(h) * m.free

    return between(function)


@refused("compute it for every example by itself", slow=True)
def test_a_mean_over_examples_without_gradients(told: int) -> Right:
    def function(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = m.a(x).mean(1 if told else 0, keepdim=True)
            graph_break()
        return m.b(m.a(x) - h) * m.free

    return between(function)


@refused("use the parameters in one block only, or compile the model without regions", ways=2, slow=True)
def test_a_value_of_parameters_in_another_graph(told: int) -> Right:
    def function(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        if told == 1:
            graph_break()
            return m.b(h) * (m.free * 2)
        table = m.free * 2
        graph_break() if not told else None
        return m.b(h) * table

    return between(function, regions=None if told == 2 else "breaks")


@refused("give it a batch dimension, or pass batches of two and more examples", ways=2, slow=True)
def test_a_batch_of_one_that_is_squeezed(told: int) -> Right:
    def function(m: Any, x: Tensor) -> Tensor:
        gate = m.a(x)[:, :1]
        gate = gate.squeeze(1) if told == 1 else gate.squeeze()
        graph_break()
        return m.b(x) * gate[..., None] * m.free

    return between(function, rows()[: 2 if told == 2 else 1])


def fresh(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.ones(output.shape, requires_grad=True)


@refused("leave out hooks, and functions that are not compiled, that make what the module returns", slow=True)
def test_a_hook_that_returns_something_else(told: int) -> Right:
    def function(m: Any, x: Tensor) -> Tensor:
        h = m.a(x) * m.free
        graph_break()
        return m.b(h)

    model = Model(function)
    handle = model.register_forward_hook(fresh)
    if told:
        handle.remove()
    return right(dp_compile(model, backend="eager", regions="breaks"), rows())
