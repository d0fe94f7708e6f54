"""Ways to use parameters: shared, frozen, adapted, and functions of parameters in the place of weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from models.case import D, T, V
from models.parts import layer, net, shaped, two

# --- the same parameter in several places ---------------------------------------------------------------------------

net(
    "Triplet",
    shaped(D, more=((D,), (D,))),
    lambda m, *xs: F.triplet_margin_loss(*(m.a(x).tanh() for x in xs), reduction="none"),
    two(),
)
net(
    "Autoencoder-tied",
    shaped(D),
    lambda m, x: F.linear(F.linear(x, m.w, m.b).tanh(), m.w.T),
    lambda: {"w": nn.Parameter(torch.randn(3, D)), "b": nn.Parameter(torch.randn(3))},
)
net(
    "TiedConvs",
    shaped(2, 5, 5),
    lambda m, x: F.conv_transpose2d(F.conv2d(x, m.w).relu(), m.w),
    lambda: {"w": nn.Parameter(torch.randn(3, 2, 2, 2))},
)
net(
    "TiedAcrossKinds",
    shaped(2, 6),
    lambda m, x: F.conv1d(x, m.w).mean(-1) + F.linear(x[..., 0], m.w.sum(-1)) + m.w.square().mean(),
    lambda: {"w": nn.Parameter(torch.randn(3, 2, 2))},
)
net(
    "OneLayerTwoNames",
    shaped(D),
    lambda m, x: m.first(x).tanh() + m.second(x),
    lambda: (lambda layer: {"first": layer, "second": layer})(nn.Linear(D, 3)),
)
net(
    "OneBiasForAll",
    shaped(D),
    lambda m, x: m.b(m.a(x).relu()),
    lambda: (lambda a, b: setattr(b, "bias", a.bias) or {"a": a, "b": b})(nn.Linear(D, 4), nn.Linear(4, 4)),
)
net(
    "ALBERT",
    shaped(T, D),
    lambda m, x: m.block(m.block(m.block(x))),
    lambda: {"block": nn.TransformerEncoderLayer(D, 2, 8, 0.0, batch_first=True)},
)
net(
    "DifferentLengths",
    shaped(T, D, more=((2, D),)),
    lambda m, x, y: m.a(x).sum(1) + m.a(y).square().sum(1) + m.a(y[:, 0]),
    two(),
)
net(
    "LayerNormReused",
    shaped(T, D),
    lambda m, x: m.norm(m.a(m.norm(x))),
    lambda: {"norm": nn.LayerNorm(D), "a": nn.Linear(D, D)},
    slow=True,
)
net(
    "EmbeddingReused",
    lambda n: ((torch.randint(0, V, (n, T)), torch.randint(0, V, (n,))), {}),
    lambda m, i, j: (m.t(i) * m.t(j)[:, None]).sum(-1),
    lambda: {"t": nn.Embedding(V, D)},
)
net(
    "DotOfEmbeddings",
    lambda n: ((torch.randint(0, V, (n,)), torch.randint(0, 4, (n,))), {}),
    lambda m, u, i: (m.u(u) * m.i(i)).sum(-1) + m.bias[u] + m.mean,
    lambda: {
        "u": nn.Embedding(V, 3),
        "i": nn.Embedding(4, 3),
        "bias": nn.Parameter(torch.randn(V)),
        "mean": nn.Parameter(torch.zeros(())),
    },
)
net("NoGradientPath", shaped(D), lambda m, x: m.b(m.a(x).detach()), two(), slow=True)
net(
    "NoGrad",
    shaped(D),
    lambda m, x: m.b(x * _without_gradient(m, x)),
    lambda: {"a": nn.Linear(D, D), "b": nn.Linear(D, 3)},
    slow=True,
)
net(
    "ZeroTimesParameter",
    shaped(D),
    lambda m, x: m.b(x) + 0 * m.a.weight.sum(),
    lambda: {"a": nn.Linear(D, 2), "b": nn.Linear(D, 3)},
    slow=True,
)
net(
    "OnlyBiases",
    shaped(D),
    lambda m, x: m.b(m.a(x).relu()),
    lambda: {"a": _frozen_weight(nn.Linear(D, 4)), "b": _frozen_weight(nn.Linear(4, 3))},
)


def _without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.a(x).sigmoid()


def _frozen_weight(linear: nn.Linear) -> nn.Linear:
    linear.weight.requires_grad_(False)
    return linear


class DoRA(nn.Module):
    """A frozen weight and a low-rank update, normalised by columns, with a trained magnitude."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(D, 4).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(4, 2))
        self.magnitude = nn.Parameter(self.base.weight.norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        w = self.base.weight + self.b @ self.a
        return F.linear(x, w * (self.magnitude / w.norm(dim=1).detach())[:, None], self.base.bias)


layer("DoRA", shaped(T, D), DoRA)

# --- weights that are functions of parameters -------------------------------------------------------------------------


class Sign(torch.autograd.Function):
    """Straight through, with a window."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < 1)


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


def hooked(module: Any) -> nn.Module:
    """A layer whose weight a hook sets before every call, copyable: the first weight is no result of autograd."""
    module.weight = module.weight.detach()
    return module


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hooked(nn.utils.weight_norm(nn.Linear(D, 4)))


def _parametrized(parametrization: Callable[[], nn.Module], base: nn.Module) -> nn.Module:
    parametrize.register_parametrization(base, "weight", parametrization())
    return base


layer("WeightNorm-old", shaped(D), lambda: old_weight_norm())
layer("WeightNorm-dim1", shaped(2, 6), lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 2), dim=1), slow=True)
layer("SpectralNorm-train", shaped(D), lambda: parametrizations.spectral_norm(nn.Linear(D, 4), n_power_iterations=25))
layer("SpectralNorm-eval", shaped(D), lambda: parametrizations.spectral_norm(nn.Linear(D, 4)).eval(), slow=True)
layer(
    "SpectralNorm-conv", shaped(2, 5, 5), lambda: parametrizations.spectral_norm(nn.Conv2d(2, 3, 2)).eval(), slow=True
)
layer("SpectralNorm-old", shaped(D), lambda: nn.utils.spectral_norm(nn.Linear(D, 4)).eval(), slow=True)
for how in ("matrix_exp", "cayley", "householder"):
    layer(
        f"Orthogonal-{how}", shaped(D), lambda how=how: parametrizations.orthogonal(nn.Linear(D, D), orthogonal_map=how)
    )
layer("Orthogonal-wide", shaped(D), lambda: parametrizations.orthogonal(nn.Linear(D, 4)), slow=True)
layer("Parametrized-symmetric", shaped(D), lambda: _parametrized(Symmetric, nn.Linear(D, D)))
layer(
    "Parametrized-twice",
    shaped(D),
    lambda: _parametrized(lambda: nn.Softplus(), _parametrized(Symmetric, nn.Linear(D, D))),
    slow=True,
)
layer("Pruned", shaped(D), lambda: hooked(prune.random_unstructured(nn.Linear(D, 4), "weight", 0.5)))
net(
    "PositiveWeights",
    shaped(D),
    lambda m, x: F.linear(x, m.w.exp(), m.w[:, 0].abs()) + F.linear(x, F.normalize(m.w, dim=1)),
    lambda: {"w": nn.Parameter(torch.randn(3, D))},
)
net(
    "QuantisedWeights",
    shaped(D),
    lambda m, x: F.linear(x, m.w + ((m.w * 8).round() / 8 - m.w).detach()),
    lambda: {"w": nn.Parameter(torch.randn(3, D))},
)
net(
    "BinaryWeights",
    shaped(D),
    lambda m, x: F.linear(x, Sign.apply(m.w)) * m.w.abs().mean(),
    lambda: {"w": nn.Parameter(torch.randn(3, D))},
)
net(
    "FunctionalCallScaled",
    shaped(D),
    lambda m, x: torch.func.functional_call(m.net, {k: v * 0.9 for k, v in m.net.named_parameters()}, (x,)),
    lambda: {"net": nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 2))},
)
net(
    "InnerStep",
    shaped(D),
    lambda m, x: F.linear(x, m.w - 0.1 * torch.func.grad(lambda w: w.square().sum().sin())(m.w)),
    lambda: {"w": nn.Parameter(torch.randn(3, D))},
)
net(
    "FastWeights",
    shaped(T, D),
    lambda m, x: torch.vmap(lambda one: one @ (m.w - torch.func.grad(lambda w: (one @ w).square().sum())(m.w)))(x),
    lambda: {"w": nn.Parameter(torch.randn(D, 3) / 9)},
)
net(
    "Ensemble",
    shaped(D),
    lambda m, x: torch.vmap(lambda w, b: F.linear(x, w, b).tanh(), out_dims=1)(m.w, m.b),
    lambda: {"w": nn.Parameter(torch.randn(3, 4, D)), "b": nn.Parameter(torch.randn(3, 4))},
)
