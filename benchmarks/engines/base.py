"""What an engine is: a gradient step in sections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.problem import Problem, WithLoss, trainable

__all__ = ["Engine"]


class Engine:
    """One way to make the gradients of a step.

    A step is ``zero``, ``forward``, ``backward`` and ``clip``, in this order; after it ``gradients()`` are there. What
    an engine does in which section is its own matter; the total is what is compared.

    Attributes:
        private: whether the gradients are sums of clipped per-example gradients, or the plain mean.
        calls: the module or function that :meth:`forward` calls with inputs and targets.
    """

    private = True
    calls: Any

    def __init__(self, problem: Problem, **options: Any) -> None:
        if options:
            raise TypeError(f"{type(self).__name__} has no options {', '.join(options)}")
        self.problem = problem
        self.parameters: dict[str, nn.Parameter] = trainable(problem.model)
        self.calls = WithLoss(problem.model, problem.case.loss)

    def zero(self) -> None:
        """Forget the gradients of the last step."""
        for p in self.parameters.values():
            p.grad = None

    def forward(self) -> Any:
        """The mean loss, with a graph behind it."""
        return self.calls(self.problem.inputs, self.problem.targets).mean()

    def backward(self, loss: Any) -> None:
        """Through the graph."""
        loss.backward()

    def clip(self) -> None:
        """What is still to be done for the clipped sums, for engines that do it after the backward."""

    def step(self) -> None:
        """The gradient step that is timed."""
        self.zero()
        self.backward(self.forward())
        self.clip()

    def gradients(self) -> dict[str, Tensor]:
        """Sums of (clipped) per-example gradients by parameter; missing ones count as zero."""
        factor = 1 if self.private else self.problem.batch
        return {n: p.grad.detach() * factor for n, p in self.parameters.items() if p.grad is not None}

    def release(self) -> None:
        """Give back what one step leaves for the next, before memory is measured."""
        self.zero()

    def update(self) -> None:
        """Noise and optimizer step, after a gradient step.

        Raises:
            NotImplementedError: the engine has none.
        """
        raise NotImplementedError

    def adamw(self) -> torch.optim.Optimizer:
        """The optimizer of :meth:`update`, for engines that have one."""
        return torch.optim.AdamW(list(self.parameters.values()), lr=1e-6)
