"""dpcompile, in every mode."""

from __future__ import annotations

from typing import Any

from benchmarks.engines.base import Engine
from benchmarks.problem import Problem
from dpcompile import DPOptimizer, dp_compile
from dpcompile.kernels.workspace import kept_gradients

__all__ = ["Ours"]


class Ours(Engine):
    """``dp_compile`` of model and loss.

    Args:
        problem: what to do.
        options: of :func:`dpcompile.dp_compile`.
    """

    def __init__(self, problem: Problem, **options: Any) -> None:
        super().__init__(problem)
        self.calls = dp_compile(self.calls, max_grad_norm=problem.max_grad_norm, **options)
        self.optimizer: DPOptimizer | None = None

    def release(self) -> None:
        """No gradients, and nothing that is kept from step to step."""
        super().release()
        kept_gradients.release()

    def update(self) -> None:
        """Noise and AdamW."""
        if self.optimizer is None:
            self.optimizer = DPOptimizer(
                self.adamw(), self.calls, noise_multiplier=1.0, expected_batch_size=self.problem.batch
            )
        self.optimizer.step()
