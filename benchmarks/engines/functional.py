"""``torch.compile`` of ``vmap(grad)``: per-example gradients, clipped and summed in one compiled function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.engines.base import Engine
from benchmarks.problem import Problem

__all__ = ["VmapGrad"]


class VmapGrad(Engine):
    """What a user would write with ``torch.func``.

    Args:
        problem: what to do.
        backend: of ``torch.compile``.
        dynamic: as in ``torch.compile``.
    """

    def __init__(self, problem: Problem, *, backend: str = "inductor", dynamic: bool | None = None) -> None:
        super().__init__(problem)
        model, loss, bound = problem.model, problem.case.loss, problem.max_grad_norm
        fixed = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if n not in self.parameters}
        fixed = {n: t.detach() for n, t in fixed.items()}

        def loss_of_one(trained: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return loss(functional_call(model, (trained, fixed), (x.unsqueeze(0),)), y.unsqueeze(0)).sum()

        def clipped_sums(trained: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
            each = vmap(grad(loss_of_one), (None, 0, 0))(trained, inputs, targets)
            norms = torch.stack([g.flatten(1).square().sum(1) for g in each.values()]).sum(0).sqrt()
            weights = (bound / norms.clamp_min(1e-12)).clamp(max=1.0)
            return {n: torch.einsum("b,b...->...", weights, g) for n, g in each.items()}

        backend = "aot_eager" if backend == "eager" else backend
        self.calls = torch.compile(clipped_sums, backend=backend, dynamic=dynamic)
        self.detached = {n: p.detach() for n, p in self.parameters.items()}

    def forward(self) -> None:
        """Nothing by itself: :meth:`backward` is forward and backward in one."""

    def backward(self, loss: Any) -> None:
        """The whole step."""
        for name, g in self.calls(self.detached, self.problem.inputs, self.problem.targets).items():
            self.parameters[name].grad = g
