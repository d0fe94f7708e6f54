"""The right answer: one backward per example, uncompiled; clipped sums and plain sums."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
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
        tolerance: what :func:`how_wrong` may be.
    """

    norms: Tensor
    max_grad_norm: float
    clipped: dict[str, Tensor]
    plain: dict[str, Tensor]
    tolerance: float = TOLERANCE

    def save(self, path: str) -> None:
        """To a file."""
        torch.save({f.name: getattr(self, f.name) for f in fields(self)}, path)

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
    truth = Truth(
        norms.float(), bound, {n: s.float() for n, s in clipped.items()}, {n: s.float() for n, s in plain.items()}
    )
    return replace(truth, tolerance=max(TOLERANCE, 2 * _jumps(problem, truth)))


def _jumps(problem: Problem, truth: Truth, times: int = 4) -> float:
    """How far the plain sums move when the weights change by 3e-7 of themselves, at most over some tries.

    At a kink (ReLU, max pooling) the gradient jumps: rounding decides the side, and one unit that flips for one example
    moves the sum of 256 examples by some 1e-3. That is no error of an engine.
    """
    generator = torch.Generator(problem.inputs.device).manual_seed(0)
    worst = 0.0
    for _ in range(times):
        moved = problem.again()
        with torch.no_grad():
            for p in moved.model.parameters():
                noise = torch.randn(p.shape, generator=generator, device=p.device)
                p.mul_(1 + 3e-7 * noise)
        moved.case.loss(moved.model(moved.inputs), moved.targets).sum().backward()
        found = {n: p.grad for n, p in trainable(moved.model).items() if p.grad is not None}
        worst = max(worst, how_wrong(found, truth, private=False))
    return worst


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
