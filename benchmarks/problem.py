"""What every engine is given: a model of its own, a batch, a loss and a clipping bound; the same for all."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import find_case
from benchmarks.models import Case

__all__ = ["Problem", "WithLoss", "build", "trainable"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One gradient step to be done.

    Attributes:
        case: model, loss and data by name.
        model: the parameters; an engine may change this copy as it likes.
        inputs: ``[B, ...]``.
        targets: ``[B, ...]``.
        max_grad_norm: C.
    """

    case: Case
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    max_grad_norm: float

    @property
    def batch(self) -> int:
        """B."""
        return len(self.inputs)

    def again(self) -> Problem:
        """The same problem with another copy of the model."""
        return replace(self, model=copy.deepcopy(self.model))


class WithLoss(nn.Module):
    """The model and its loss as one module, so that a compiler sees both: ``(inputs, targets) -> losses [B]``."""

    def __init__(self, model: nn.Module, loss: Any) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One loss per example, ``[B]``."""
        return self.loss(self.model(inputs), targets)


def build(
    name: str, *, batch: int | None = None, max_grad_norm: float = 1.0, seed: int = 0, device: str = "cpu"
) -> Problem:
    """The problem of a model by name; the same seed makes the same weights and data in every process."""
    case = find_case(name)
    torch.manual_seed(seed)
    model = case.make().to(device)
    inputs, targets = case.data(batch or case.batch)
    return Problem(case, model, inputs.to(device), targets.to(device), max_grad_norm)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that need gradients, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}
