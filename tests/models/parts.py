"""Small models without a class each: layers by name, and a forward that is a function of them and the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.case import ALL, Call, Case, D

__all__ = ["Function", "Parts", "Sum", "behind", "layer", "net", "shaped", "two"]

THOROUGH = ("layers", "uses")  # families that CI runs under every rule, but for what is marked slow
Make = Callable[[], nn.Module]


class Parts(nn.Module):
    """Modules, parameters and constants by name, and a forward made of them."""

    def __init__(self, function: Callable[..., Any], parts: Mapping[str, Any]) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def shaped(*shape: int, more: tuple[tuple[int, ...], ...] = ()) -> Callable[[int], Call]:
    """A call on random numbers: one tensor of this shape per example, and one for each shape in ``more``."""
    return lambda n: (tuple(torch.randn(n, *s) for s in (shape, *more)), {})


def net(
    name: str,
    inputs: Callable[[int], Call],
    function: Callable[..., Any],
    parts: Callable[[], Mapping[str, Any]],
    **options: Any,
) -> None:
    """Put a model into the suite: ``function(model, *inputs)`` on the parts that ``parts()`` makes."""
    _add(name, function, lambda: Parts(function, parts()), inputs, options)


def layer(name: str, inputs: Callable[[int], Call], make: Make, **options: Any) -> None:
    """Put a layer into the suite, as it is."""
    _add(name, make, make, inputs, options)


def _add(name: str, owner: Any, make: Make, inputs: Callable[[int], Call], options: dict[str, Any]) -> None:
    family = owner.__module__.rpartition(".")[2]
    options = {"slow": family not in THOROUGH, **options}
    ALL.append(Case(name, family, make, inputs, **options))


class Function(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Sum(nn.Module):
    """The sum of all means over the last dimension of what layers make of one input."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x).mean(-1) for layer in self.layers], -1)


def after(make: Callable[[], nn.Module], width: int = 4) -> Callable[[], dict[str, Any]]:
    """A pointwise convolution (whose gradient goes through the layer) and the layer."""

    def parts() -> dict[str, Any]:
        return {
            "scale": nn.Parameter(torch.rand(width, 1) + 0.5),
            "shift": nn.Parameter(torch.randn(width, 1)),
            "layer": make(),
        }

    return parts


def then(m: Any, x: Tensor) -> Any:
    """The layer, on channels that are scaled and shifted."""
    extra = (1,) * (x.ndim - 2)
    return m.layer(torch.tanh(x * m.scale.view(-1, *extra) + m.shift.view(-1, *extra)))


def behind(name: str, shape: tuple[int, ...], make: Callable[[], nn.Module], **options: Any) -> None:
    """Put a layer into the suite, behind one that has parameters."""
    _add(name, make, lambda: Parts(then, after(make, shape[0])()), shaped(*shape), {"slow": True, **options})


def two(width: int = D) -> Callable[[], dict[str, Any]]:
    """Two linear layers, ``a`` and ``b``."""
    return lambda: {"a": nn.Linear(D, width), "b": nn.Linear(width, 3)}
