"""FastDP (book-keeping, MixOpt), from a source folder that the user names."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import torch
from torch import nn

from benchmarks.engines.base import Engine
from benchmarks.problem import Problem

__all__ = ["FastDP"]


class FastDP(Engine):
    """Its ``PrivacyEngine`` with ``clipping_mode="MixOpt"`` and flat clipping.

    The first layers are the origin of ghost differentiation, so that hardly any plain gradients are made. FastDP draws
    its noise in the backward, when it makes ``p.private_grad``; here that is made beforehand, of zeros, so that no
    noise is drawn inside the gradient step, as with the other engines.

    Args:
        problem: what to do.
        path: the folder that holds the package ``fastDP``.
    """

    def __init__(self, problem: Problem, *, path: str | None = None) -> None:
        super().__init__(problem)
        if path is None:
            raise ImportError("no source path given (--fastdp)")
        sys.path.insert(0, os.path.abspath(path))
        with contextlib.redirect_stdout(None):
            from fastDP import PrivacyEngine  # type: ignore[import-not-found]

            self.optimizer = self.adamw()
            engine = PrivacyEngine(
                problem.model,
                batch_size=problem.batch,
                sample_size=100 * problem.batch,
                epochs=1,
                noise_multiplier=0.0,
                max_grad_norm=problem.max_grad_norm,
                clipping_mode="MixOpt",
                clipping_fn="Abadi",
                loss_reduction="mean",
                origin_params=_origins(problem),
            )
            engine.attach(self.optimizer)

    def zero(self) -> None:
        """``p.private_grad`` starts at zero."""
        super().zero()
        for p in self.parameters.values():
            p.private_grad = torch.zeros_like(p)  # type: ignore[attr-defined]

    def clip(self) -> None:
        """Nothing is left to do: the backward ends in clipped sums."""
        for p in self.parameters.values():
            p.grad = p.private_grad  # type: ignore[attr-defined]


def _origins(problem: Problem) -> list[str]:
    """The last parameter of every layer whose input carries no gradient: from there on autograd has to start.

    FastDP's hooks do not run in layers before which nothing asks for a gradient.
    """
    model = problem.model
    names: list[str] = []
    kinds: tuple[Any, ...] = (nn.Linear, nn.Conv2d, nn.Embedding)

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not inputs[0].requires_grad:
            names.append(f"{paths[layer]}.{[n for n, p in layer.named_parameters() if p.requires_grad][-1]}")

    layers = [(n, m) for n, m in model.named_modules() if type(m) in kinds]
    paths = {m: n for n, m in layers if any(p.requires_grad for p in m.parameters())}
    hooks = [layer.register_forward_pre_hook(note) for layer in paths]
    model(problem.inputs[:1])
    for hook in hooks:
        hook.remove()
    if not names:
        raise ValueError("no layer that FastDP supports")
    return names
