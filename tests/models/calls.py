"""Ways to call a model: arguments and outputs of all kinds, example axes elsewhere, memory formats, hooks, buffers."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.case import Call, D, T
from models.parts import layer, net, shaped, two


def channels_last(module: Any) -> nn.Module:
    return module.to(memory_format=torch.channels_last)


class Pair(NamedTuple):
    """Two tensors by name."""

    left: Tensor
    right: Tensor


class Configured(nn.Module):
    """Python control flow on flags, types, counts and optional arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, D), nn.Identity(), nn.Linear(D, D), nn.ReLU()])
        self.head, self.depth, self.config = nn.Linear(D, 3), 3, {"residual": True, "act": "tanh"}

    def forward(self, x: Tensor, mask: Tensor | None = None, *, output_hidden: bool = False, **rest: Any) -> Any:
        hidden = ()
        for i, each in enumerate(self.layers):
            if i >= self.depth and not self.training:
                break
            if isinstance(each, nn.Identity):
                continue
            y = getattr(torch, self.config["act"])(each(x))
            x = x + y if self.config.get("residual") else y
            hidden += (x,)
        if mask is not None:
            x = x * mask
        assert not rest.get("unknown")
        return {"logits": self.head(x), "hidden": hidden if output_hidden else None, "loss": None}


net("NamedTuples", shaped(D, more=((D,),)), lambda m, x, y: Pair(m.a(x), m.b(m.a(Pair(x, y).right))), two())
layer(
    "Configured",
    lambda n: ((torch.randn(n, D),), {"mask": torch.rand(n, D) > 0.5, "output_hidden": True, "unknown": 0}),
    lambda: Configured(),
)
layer("Configured-eval", lambda n: ((torch.randn(n, D), None), {}), lambda: Configured().eval(), slow=True)
net(
    "OrderedOutputs",
    shaped(D),
    lambda m, x: collections.OrderedDict(y=m.a(x), none=None, more=[m.b(m.a(x)), (x, 3)]),
    two(),
)
net(
    "SharedMatrixInput",
    lambda n: ((torch.randn(n, D), torch.randn(D, D)), {}),
    lambda m, x, w: m.b(m.a(x @ w)),
    two(),
    in_dims=(0, None),
)
net(
    "SecondDim",
    lambda n: ((torch.randn(T, n, D), torch.randn(D, n)), {}),
    lambda m, x, y: m.b(m.a(x) + y.T),
    two(),
    in_dims=(1, 1),
    out_dim=1,
)
net(
    "NestedDims",
    lambda n: (([torch.randn(n, D), {"k": (torch.randn(D), torch.randn(2, n))}], 2), {}),
    lambda m, x, k: m.b(m.a(x[0] * x[1]["k"][0])) * x[1]["k"][1].sum(0)[:, None] * k,
    two(),
    in_dims=([0, {"k": (None, 1)}], None),
)
net(
    "UnusedInput",
    lambda n: ((torch.randn(n, D), torch.randn(n, 2), "text", None, 3.5), {}),
    lambda m, x, y, *rest: m.b(m.a(x)) * rest[2],
    two(),
    slow=True,
)
net(
    "ChannelsLast",
    lambda n: ((torch.randn(n, 2, 5, 5).to(memory_format=torch.channels_last),), {}),
    lambda m, x: m.head(m.conv(x).relu().flatten(1)),
    lambda: {"conv": channels_last(nn.Conv2d(2, 3, 3)), "head": nn.Linear(27, 2)},
)
net(
    "NotContiguous",
    lambda n: (
        (torch.randn(D, T, n).permute(2, 1, 0), torch.randn(1, D).expand(n, -1), torch.randn(n, 2 * D)[:, ::2]),
        {},
    ),
    lambda m, x, y, z: m.b(m.a(x) + y[:, None] * z[:, None]),
    two(),
)
net(
    "ZeroSize",
    lambda n: ((torch.randn(n, D), torch.randn(n, 0, D), torch.randn(n, 0)), {}),
    lambda m, x, y, z: m.b(m.a(torch.cat([x[:, None], y], 1)).sum(1)) + m.none(z),
    lambda: {**two()(), "none": nn.Linear(0, 3)},
)
net(
    "NothingInput",
    lambda n: ((torch.randn(n, 0, D),), {}),
    lambda m, x: m.b(m.a(x)).sum(1) + m.c,
    lambda: {**two()(), "c": nn.Parameter(torch.randn(3))},
)
net("ForwardHooks", shaped(D), lambda m, x: m.b(m.a(x)), lambda: _with_hooks(two()()))
net(
    "Buffers",
    shaped(D),
    lambda m, x: m.b((m.a(x) - m.mean) / m.std.sqrt() + m.steps),
    lambda: {
        **two()(),
        "mean": nn.Buffer(torch.randn(D)),
        "std": nn.Buffer(torch.rand(D) + 1),
        "steps": nn.Buffer(torch.tensor(3)),
    },
)
net(
    "MovingAverageCopy",
    shaped(D),
    lambda m, x: F.cosine_similarity(m.b(m.a(x)), m.teacher(x).detach(), dim=-1),
    lambda: {**two()(), "teacher": nn.Linear(D, 3).requires_grad_(False)},
    slow=True,
)
net(
    "PlainTensors",
    shaped(D),
    lambda m, x: m.b(m.a(x) * m.scale[0] + m.shift["x"]),
    lambda: {**two()(), "scale": [torch.rand(D)], "shift": {"x": torch.randn(D)}},
    slow=True,
)


def _with_hooks(parts: dict[str, Any]) -> dict[str, Any]:
    parts["a"].register_forward_hook(lambda module, args, out: out.tanh())
    parts["b"].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return parts


def positions(n: int) -> Call:
    return (torch.randn(n, T, D), torch.arange(T).expand(n, -1)), {}


net(
    "PositionsOfEach",
    positions,
    lambda m, x, where: m.b(m.a(x) + m.table(where)),
    lambda: {**two()(), "table": nn.Embedding(T, D)},
)
