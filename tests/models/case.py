"""What every model of the suite is: a way to make it, a call of it, and what is special about the call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["ALL", "B", "Call", "Case", "D", "T", "V", "register"]

B, T, D, V = 5, 3, 6, 11  # examples, positions, features, tokens

Model = TypeVar("Model", bound="Callable[[], nn.Module]")
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and how to call it.

    Attributes:
        name: for test ids and the table.
        family: the file it stands in.
        make: the model.
        inputs: the arguments of a call on ``n`` examples.
        in_dims: where the examples lie in the inputs.
        out_dim: where they lie in the outputs.
        static_only: whether symbolic sizes make no sense for it.
        refused: where it must be refused, what the message says (a regular expression).
        reason: why, in words, for the table.
        slow: whether only ``pytest tests -m slow`` runs it under every rule; else CI runs it under "auto" alone.
        rare: whether only ``pytest tests -m slow`` runs it at all.
        tolerance: the largest relative error.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Call]
    in_dims: Any = 0
    out_dim: int = 0
    static_only: bool = False
    refused: str | None = None
    reason: str = ""
    slow: bool = False
    rare: bool = False
    tolerance: float = 1e-4

    @property
    def id(self) -> str:
        """The family and the name."""
        return f"{self.family}/{self.name}"

    def call(self, batch: int = B, dtype: torch.dtype = torch.float32) -> Call:
        """Arguments with floating tensors in ``dtype``."""
        args, kwargs = self.inputs(batch)

        def cast(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(dtype) if value.is_floating_point() else value
            if isinstance(value, dict):
                return {k: cast(v) for k, v in value.items()}
            return type(value)(map(cast, value)) if isinstance(value, (list, tuple)) else value

        return tuple(map(cast, args)), {k: cast(v) for k, v in kwargs.items()}


ALL: list[Case] = []


def register(inputs: Callable[[int], Call], name: str | None = None, **options: Any) -> Callable[[Model], Model]:
    """Put a model class (or a function that makes one) into the suite."""

    def add(make: Model) -> Model:
        ALL.append(Case(name or make.__name__, make.__module__.rpartition(".")[2], make, inputs, **options))
        return make

    return add
