"""A stand-in for a compiled model's engine: real ledger, clipped sums given by the test."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dpcompile.batches.draws import Draws
from dpcompile.clipping.groups import Bounds
from dpcompile.errors import PrivacyError
from dpcompile.runtime.ledger import GradientLedger

_tasks = itertools.count(-(10**9), -1)  # no numbers of backwards of autograd, which may have been scaled


class FakeEngine:
    sharded = distributed = False
    stage = None
    options = SimpleNamespace(examples_per_user=1, clipping="flat")

    def __init__(self, model: nn.Module, max_grad_norm: float = 1.0) -> None:
        self.model = self.module = model
        self.clip = SimpleNamespace(now=Bounds(max_grad_norm))
        self.ledger = GradientLedger(self.parameters())
        self.feed: Any = None
        self.steps: int | None = None
        self.numbers = 0
        self.replicas = SimpleNamespace(rounding=None)

    @property
    def max_grad_norm(self) -> float:
        return self.clip.now.total

    def move_bounds(self, bounds: Bounds) -> None:
        self.clip.now = bounds

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def trainable(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def backward(self, x: Tensor, value: Tensor) -> None:
        """As the compiled model does with a batch of the loader: the sum of the values of its examples, into ``a``."""
        draws: Draws = self.feed.draws
        claim = draws.claim([(x, 0)])
        if claim.batch is None or claim.mask is None:
            assert claim.refused is not None
            raise claim.refused
        draws.begin(claim.batch)
        self.deliver(a=(value * claim.mask).sum().view(1))
        draws.delivered(claim.batch)

    def deliver(self, **sums: Tensor) -> None:
        """One clipped backward; zeros for the trainable parameters not named."""
        parameters = self.parameters()
        full = {n: torch.zeros_like(parameters[n], dtype=torch.float32) for n in self.trainable()}
        self.ledger.deliver((full | sums).items(), graph_task=next(_tasks))


class PrivateModel(nn.Module):
    """Holds its engine, as a compiled model does."""

    a: nn.Parameter
    b: nn.Parameter
    w: nn.Parameter
    engine: FakeEngine

    def __init__(self, max_grad_norm: float = 1.0, **parameters: Tensor) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))
        self.engine = FakeEngine(self, max_grad_norm)


def engine_of(model: nn.Module) -> FakeEngine:
    if not isinstance(model, PrivateModel):
        raise PrivacyError(f"{type(model).__name__} is not a dpcompile model", remedy="call dp_compile(model) first")
    return model.engine
