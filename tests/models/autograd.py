"""Autograd inside of models: functions with their own backward, gradients as values, checkpoints; and dtypes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from models.case import D, T
from models.parts import net, shaped, two
from models.uses import Sign

# --- autograd ---------------------------------------------------------------------------------------------------------


class Reverse(torch.autograd.Function):
    """Gradient reversal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return -ctx.scale * grad, None


class OwnLinear(torch.autograd.Function):
    """A linear layer whose gradients are written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return grad @ w, grad.flatten(0, -2).T @ x.flatten(0, -2)


class NormalisedGradient(torch.autograd.Function):
    """A backward that divides the cotangent by its norm over the whole batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad / grad.norm()


net("StraightThrough", shaped(D), lambda m, x: m.b(Sign.apply(m.a(x))), two())
net("GradientReversal", shaped(D), lambda m, x: (m.b(m.a(x)), m.b(Reverse.apply(m.a(x), 0.3))), two())
net("LinearByHand", shaped(T, D), lambda m, x: OwnLinear.apply(m.a(x), m.b.weight), two())
net(
    "NormalisedGradient",
    shaped(D),
    lambda m, x: m.b(NormalisedGradient.apply(m.a(x))),
    two(),
    refused="norm",
    reason="its backward takes a norm over the batch",
)
net("GradientOfInputs", shaped(D), lambda m, x: torch.func.grad(lambda z: m.b(m.a(z).tanh()).sum())(x), two())
net("PerExampleJacobian", shaped(D), lambda m, x: torch.vmap(torch.func.jacrev(lambda z: m.b(m.a(z).tanh())))(x), two())
net(
    "AutogradGrad",
    shaped(D),
    lambda m, x: _penalty(m, x),
    two(),
    refused="captured as one graph|requires_grad",
    reason="autograd.grad inside forward (torch.func.grad is right)",
)
net(
    "GumbelStraightThrough",
    shaped(D, more=((3,),)),
    lambda m, x, g: m.c(
        F.one_hot((m.b(m.a(x)) + g).argmax(-1), 3).float() + (y := (m.b(m.a(x)) + g).softmax(-1)) - y.detach()
    ),
    lambda: {**two()(), "c": nn.Linear(3, 2)},
)
net("BackwardHook", shaped(D), lambda m, x: m.b(_hooked(m.a(x))), two(), slow=True)


def _penalty(m: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    y = m.b(m.a(x).tanh())
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return torch.cat([y, g], 1)


def _hooked(x: Tensor) -> Tensor:
    x.register_hook(lambda grad: grad * 0.5)
    return x


net("Checkpoint", shaped(T, D), lambda m, x: m.b(checkpoint(lambda z: m.a(z).relu(), x, use_reentrant=False)), two())
net(
    "CheckpointSequential",
    shaped(D),
    lambda m, x: checkpoint_sequential(m.seq, 2, x, use_reentrant=False),
    lambda: {"seq": nn.Sequential(nn.Linear(D, D), nn.Tanh())},
    refused="checkpoint_sequential",
    reason="Dynamo does not trace it (use checkpoint)",
)

# --- dtypes -----------------------------------------------------------------------------------------------------------


def autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.b(m.a(x).relu()).float()


def partly(m: Any, x: Tensor) -> Tensor:
    """Autocast, and a part in it that is not."""
    with torch.autocast("cpu", torch.bfloat16):
        y = m.a(x)
        with torch.autocast("cpu", enabled=False):
            y = m.b(y.float())
    return y


ROUNDED = {"tolerance": 5e-2}
net("AutocastInside", shaped(T, D), autocast, two(), **ROUNDED)
net("AutocastInPart", shaped(T, D), partly, two(), slow=True, **ROUNDED)
net(
    "AutocastConv",
    shaped(2, 6, 6),
    lambda m, x: autocast(m, x),
    lambda: {"a": nn.Conv2d(2, 3, 3), "b": nn.Conv2d(3, 2, 2)},
    slow=True,
    **ROUNDED,
)
net(
    "AutocastTransformer",
    shaped(T, D),
    autocast,
    lambda: {"a": nn.TransformerEncoderLayer(D, 2, 8, 0.0, batch_first=True), "b": nn.Linear(D, 2)},
    slow=True,
    **ROUNDED,
)
net(
    "BFloat16",
    shaped(T, D),
    lambda m, x: m.b(m.a(x.bfloat16()).relu()).float(),
    lambda: {k: v.bfloat16() for k, v in two()().items()},
    **ROUNDED,
)
net(
    "BFloat16WithFloatNorm",
    shaped(T, D),
    lambda m, x: m.b(m.n(m.a(x.bfloat16()).float()).bfloat16()).float(),
    lambda: {**{k: v.bfloat16() for k, v in two()().items()}, "n": nn.LayerNorm(D)},
    **ROUNDED,
)
net(
    "Float16",
    shaped(T, D),
    lambda m, x: m.b(m.a(x.half()).relu()).float(),
    lambda: {k: v.half() for k, v in two()().items()},
    **ROUNDED,
)
net(
    "MixedDtypes",
    shaped(D),
    lambda m, x: m.b(m.a(x.double()).float()).bfloat16() * m.c,
    lambda: {"a": nn.Linear(D, D).double(), "b": nn.Linear(D, 3), "c": nn.Parameter(torch.randn(3).bfloat16())},
    **ROUNDED,
)
net(
    "Float64",
    shaped(D),
    lambda m, x: m.b(m.a(x.double()).tanh()),
    lambda: {k: v.double() for k, v in two()().items()},
    tolerance=1e-6,
)
net(
    "IntegerInputs",
    lambda n: ((torch.randint(-3, 4, (n, D)), torch.rand(n, D) > 0.5), {}),
    lambda m, x, mask: m.b(m.a(x.float()) * mask + x),
    two(),
)
net(
    "Uint8Images",
    lambda n: ((torch.randint(0, 256, (n, 2, 4, 4), dtype=torch.uint8),), {}),
    lambda m, x: m.conv(x / 255),
    lambda: {"conv": nn.Conv2d(2, 3, 2)},
    slow=True,
)
