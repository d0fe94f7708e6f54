"""Training without privacy: the measure of everything."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.engines.base import Engine
from benchmarks.problem import Problem

__all__ = ["Compiled", "Eager"]


class Eager(Engine):
    """PyTorch as it is."""

    private = False

    def __init__(self, problem: Problem, **options: Any) -> None:
        super().__init__(problem, **options)
        self.optimizer = self.adamw()

    def update(self) -> None:
        """AdamW."""
        self.optimizer.step()


class Compiled(Eager):
    """``torch.compile`` of model and loss.

    Args:
        problem: what to do.
        backend: of ``torch.compile``.
        dynamic: as in ``torch.compile``.
    """

    def __init__(self, problem: Problem, *, backend: str = "inductor", dynamic: bool | None = None) -> None:
        super().__init__(problem)
        backend = "aot_eager" if backend == "eager" else backend
        self.calls = torch.compile(self.calls, backend=backend, dynamic=dynamic)
