"""What runs a private model from outside, and what it returns: what the messages say to do, tried."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from private_steps import X, Y, parts
from remedies import Right, equals, plain, refused, right, stepped
from test_remedies_module import REBUILD
from torch import Tensor, nn
from wrapped import Wrapper

from dpcompile import compile_step, dp_compile, set_mask


def rebuilt(model: Any) -> nn.Module:
    ordinary = plain()
    ordinary.load_state_dict(model.state_dict())
    return ordinary


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@refused(REBUILD)
def test_a_trace_by_jit(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    traced: Any = torch.jit.trace(rebuilt(model) if told else model, X)
    return equals(torch.equal(traced(X), model(X)), True)


@refused(REBUILD)
def test_an_export(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    exported = torch.export.export(rebuilt(model) if told else model, (X,))
    return equals(torch.equal(exported.module()(X), model(X)), True)


class Sensitivity(nn.Module):
    """Returns its own derivative with respect to the inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda a: self.net(a).sum())(x)


@refused(f"use the transform inside forward, where it is part of the proof; otherwise {REBUILD}", ways=2)
def test_a_transform(told: int) -> Right:
    if told == 1:
        return right(dp_compile(Sensitivity(), backend="eager"), X)
    model: Any = dp_compile(Sensitivity().net, backend="eager")
    ordinary = Sensitivity().net
    ordinary.load_state_dict(model.state_dict())
    slope = torch.func.grad(lambda x: (ordinary if told else model)(x).sum())(X)
    return equals(torch.equal(slope, Sensitivity()(X)), True)


@refused(
    "compute the penalty in forward, g = torch.func.grad(lambda x: self.net(x).sum())(x), and return each example's "
    "loss with it; then one backward suffices"
)
def test_a_gradient_penalty(told: int) -> Right:
    class Penalised(Sensitivity):
        def forward(self, x: Tensor) -> Tensor:
            g = torch.func.grad(lambda x: self.net(x).sum())(x)
            return self.net(x).squeeze(1) + 10 * (g.norm(dim=1) - 1) ** 2

    if told:  # the loss of an example is what it returns
        model: Any = dp_compile(Penalised(), backend="eager", loss_reduction="sum")
        return right(model, X, loss=lambda output, rows: output)
    model, x = dp_compile(Sensitivity().net, backend="eager"), X.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (model(X).mean() + 10 * ((g.norm(dim=1) - 1) ** 2).mean()).backward()
    return equals(0, 1)


@refused("pad an empty draw to a physical batch and mask it, as PoissonLoader does")
def test_a_compiled_step_of_an_empty_draw(told: int) -> Right:
    model, optimizer = parts()
    step = compile_step(model, F.cross_entropy, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    if told:
        set_mask(model, torch.zeros(8, dtype=torch.bool))
        step(X, Y)
    else:
        step(X[:0], Y[:0])
    return stepped(model, optimizer, before, 1)


@refused("return plain tensors: no tensor subclasses, no views of inputs that are written to", ways=2)
def test_a_subclass_returned(told: int) -> Right:
    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = plain()

        def forward(self, x: Tensor) -> Any:
            return Wrapper(self.layer(x)) if told == 0 else self.layer(x)

    return right(dp_compile(Wraps(), backend="eager"), X)


class Flat(nn.Module):
    """Blocks that are given examples flattened into one dimension with their positions."""

    def __init__(self, flat: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks, self.flat = nn.ModuleList(Scaled() for _ in range(2)), flat

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        b, t, d = x.shape
        h = x.reshape(b * t, d) if self.flat else x
        for block in self.blocks:
            h = block(h, scale)
        return h.reshape(b, t, d)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return (self.layer(x).reshape(len(scale), -1, 5) * scale[:, None, None]).reshape(x.shape)


@refused("compile with dynamic=False, or pass the tensor between blocks with a batch dimension of its own", ways=2)
def test_examples_flattened_between_blocks(told: int) -> Right:
    model = Flat(flat=told < 2)
    private: Any = dp_compile(model, regions="blocks", dynamic=told != 1, backend="eager")
    return right(private, torch.randn(4, 3, 5), torch.rand(4) + 0.5)
