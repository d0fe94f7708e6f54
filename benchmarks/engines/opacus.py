"""Opacus: module hooks, ExpandedWeights, functorch and ghost clipping, through its own classes."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from benchmarks.engines.base import Engine
from benchmarks.problem import Problem

__all__ = ["Ghost", "PerSample"]


class PerSample(Engine):
    """Per-sample gradients in ``p.grad_sample``; the optimizer's ``clip_and_accumulate`` is :meth:`clip`.

    Args:
        problem: what to do.
        mode: "hooks", "ew" or "functorch", as in ``GradSampleModule``.
    """

    def __init__(self, problem: Problem, *, mode: str) -> None:
        super().__init__(problem)
        from opacus.grad_sample import wrap_model  # type: ignore[import-not-found]
        from opacus.optimizers import DPOptimizer  # type: ignore[import-not-found]

        warnings.filterwarnings("ignore", message="Full backward hook")
        wrapped = wrap_model(problem.model, grad_sample_mode=mode, batch_first=True, loss_reduction="mean")
        self.calls = _with_loss(wrapped, problem)
        bound: Any = problem.max_grad_norm  # an int by its annotation there
        self.optimizer = DPOptimizer(
            self.adamw(), noise_multiplier=1.0, max_grad_norm=bound, expected_batch_size=problem.batch
        )

    def zero(self) -> None:
        """Also per-sample gradients."""
        super().zero()
        for p in self.parameters.values():
            p.grad_sample = None  # type: ignore[attr-defined]
            p.summed_grad = None  # type: ignore[attr-defined]

    def clip(self) -> None:
        """From per-sample gradients to clipped sums; the former stay until ``zero_grad``, as Opacus has it."""
        self.optimizer.clip_and_accumulate()
        for p in self.parameters.values():
            p.grad = p.summed_grad  # type: ignore[attr-defined]

    def update(self) -> None:
        """Noise, division and AdamW."""
        self.optimizer.add_noise()
        self.optimizer.scale_grad()
        self.optimizer.original_optimizer.step()


class Ghost(Engine):
    """Ghost clipping: a backward for the norms, and one for the sums."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        from opacus.grad_sample import GradSampleModuleFastGradientClipping  # type: ignore[import-not-found]
        from opacus.optimizers import DPOptimizerFastGradientClipping  # type: ignore[import-not-found]
        from opacus.utils.fast_gradient_clipping_utils import (  # type: ignore[import-not-found]
            DPTensorFastGradientClipping,
        )

        warnings.filterwarnings("ignore", message="Full backward hook")
        bound: Any = problem.max_grad_norm  # an int by its annotation there
        self.wrapped = GradSampleModuleFastGradientClipping(problem.model, max_grad_norm=bound)
        self.calls = _with_loss(self.wrapped, problem)
        self.optimizer = DPOptimizerFastGradientClipping(
            self.adamw(), noise_multiplier=1.0, max_grad_norm=bound, expected_batch_size=problem.batch
        )
        self.kind = DPTensorFastGradientClipping

    def zero(self) -> None:
        """Also the sums that the optimizer keeps."""
        super().zero()
        for p in self.parameters.values():
            p.summed_grad = None  # type: ignore[attr-defined]

    def forward(self) -> Any:
        """Losses in Opacus' own wrapper, whose backward is both passes."""
        losses = self.calls(self.problem.inputs, self.problem.targets)
        return self.kind(self.wrapped, self.optimizer, losses, "mean")

    def update(self) -> None:
        """Noise, division and AdamW."""
        self.optimizer.step()


def _with_loss(wrapped: Any, problem: Problem) -> Any:
    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        return problem.case.loss(wrapped(inputs), targets)

    return losses
