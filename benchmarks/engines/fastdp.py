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

    The first supported layer is the origin of ghost differentiation, so that no plain gradients are made. FastDP draws
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
                origin_params=[_first(problem.model)],
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


def _first(model: nn.Module) -> str:
    """The name of the first parameter of a layer that is asked for a gradient."""
    kinds: tuple[Any, ...] = (nn.Linear, nn.Conv2d, nn.Embedding)
    for name, layer in model.named_modules():
        if type(layer) in kinds and any(p.requires_grad for p in layer.parameters()):
            last = [n for n, p in layer.named_parameters() if p.requires_grad][-1]
            return f"{name}.{last}"
    raise ValueError("no layer that FastDP supports")
