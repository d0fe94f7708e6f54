"""The right answer: one backward per example, uncompiled; clipped sums and plain sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import Problem, trainable

__all__ = ["TOLERANCE", "Truth", "find_truth", "how_wrong"]

TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Truth:
    """What a right step has to give.

    Attributes:
        norms: of every example's gradient, ``[B]``.
        max_grad_norm: C.
        clipped: clipped sums by parameter.
        plain: sums by parameter.
    """

    norms: Tensor
    max_grad_norm: float
    clipped: dict[str, Tensor]
    plain: dict[str, Tensor]

    def save(self, path: str) -> None:
        """To a file."""
        torch.save({n: getattr(self, n) for n in ("norms", "max_grad_norm", "clipped", "plain")}, path)

    @classmethod
    def load(cls, path: str) -> Truth:
        """From a file."""
        return cls(**torch.load(path))


def find_truth(problem: Problem, max_grad_norm: float | None = None) -> Truth:
    """One forward and backward for every example by itself; sums in float64, rounded to float32 at the end.

    Args:
        problem: its own bound is not used.
        max_grad_norm: C; None takes the median of the norms, so that about half of the examples are clipped.
    """
    parameters = trainable(problem.model)

    def gradients(i: int) -> list[Tensor]:
        rows = slice(i, i + 1)
        loss = problem.case.loss(problem.model(problem.inputs[rows]), problem.targets[rows]).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return [g.detach().double() for g in found]

    # Norms first, then the gradients once more: they are never all in memory.
    squares = [sum(g.square().sum() for g in gradients(i)) for i in range(problem.batch)]
    norms = torch.stack([torch.as_tensor(s) for s in squares]).sqrt()
    bound = norms.median().item() if max_grad_norm is None else max_grad_norm
    plain = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
    clipped = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
    for i, norm in enumerate(norms.tolist()):
        weight = min(1.0, bound / norm) if norm else 1.0
        for name, g in zip(parameters, gradients(i), strict=True):
            plain[name] += g
            clipped[name] += weight * g
    return Truth(
        norms.float(), bound, {n: s.float() for n, s in clipped.items()}, {n: s.float() for n, s in plain.items()}
    )


def how_wrong(gradients: dict[str, Tensor], truth: Truth, *, private: bool) -> float:
    """The largest error of a parameter's gradient, relative to the largest gradient of a parameter (2-norms).

    A parameter without a gradient counts as zero; anything that is not finite is infinitely wrong.
    """
    wanted: dict[str, Any] = truth.clipped if private else truth.plain
    scale = max(w.norm().item() for w in wanted.values())
    worst = 0.0
    for name, w in wanted.items():
        got = gradients.get(name)
        error = (w if got is None else got.float().reshape(w.shape) - w).norm().item()
        worst = max(worst, error if error == error else float("inf"))
    return worst / max(scale, 1e-30)
