"""Scores of canaries, from what the steps of a run released: the higher, the more likely it was in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpcompile.auditing.canaries import sign

__all__ = ["Attack", "ExampleAttack", "PlaceAttack"]

_BLOCKS = 32  # parts of the run that are looked at by themselves


class Attack(ABC):
    """What an attacker makes of one run, step by step."""

    @abstractmethod
    def before(self, model: nn.Module) -> None:
        """Look at the model that the step starts from."""

    @abstractmethod
    def after(self, step: int, released: Mapping[str, Tensor]) -> None:
        """Look at what the step released: for every parameter, by name, the private sum of gradients."""

    @abstractmethod
    def scores(self, model: nn.Module) -> dict[str, np.ndarray]:
        """``[m]`` for each way to look at the run, which ended with this model."""


class PlaceAttack(Attack):
    """On canaries whose gradients are single elements of parameters: add them up.

    It knows where each canary's gradient lies and with which sign, and not in which steps the canary was drawn: that is
    secret, and the accountant counts on it. Attacks are: the likelihood ratio of samples; the sum over all steps and
    places, each step over its noise squared, which is that ratio where every example is in every step; the sum over
    each parameter alone, and over each part of the run alone.

    Args:
        targets: names of parameters.
        places: ``[m, targets]``; -1: no place.
        numbers: sample rate, and noise multiplier that is counted, of every step.
        max_grad_norm: C.
    """

    def __init__(
        self, targets: Sequence[str], places: Tensor, numbers: Sequence[tuple[float, float]], *, max_grad_norm: float
    ) -> None:
        self.targets, self.places = targets, places
        self._numbers, self._bound = numbers, max_grad_norm
        self._least = min(noise for _, noise in numbers)
        steps = len(numbers)
        self._ratios = torch.zeros(len(places), dtype=torch.float64)
        held = (places >= 0).sum(1).clamp_min(1)
        self._share = held.double().rsqrt()
        self._parameters = torch.zeros(len(targets), len(places), dtype=torch.float64)
        self._parts = torch.zeros(min(steps, _BLOCKS), len(places), dtype=torch.float64)
        self._steps = steps

    def before(self, model: nn.Module) -> None:
        """See :class:`Attack`: these gradients do not go by the weights."""

    def after(self, step: int, released: Mapping[str, Tensor]) -> None:
        """See :class:`Attack`."""
        found = []
        for i, name in enumerate(self.targets):
            places = self.places[:, i]
            values = released[name].reshape(-1).cpu().double()[places.clamp_min(0)]
            found.append(torch.where(places >= 0, values, 0.0))
        rate, noise = self._numbers[step]
        values = torch.stack(found) * sign(step)
        together = values.sum(0) * self._share
        weight = (self._least / noise) ** 2 if noise > 0 else 1.0
        self._parameters += values * weight
        self._parts[step * len(self._parts) // self._steps] += together * weight
        if self._sampled:
            drawn = (together / self._bound - 0.5) / noise**2 + math.log(rate)
            left_out = torch.tensor(math.log1p(-rate) if rate < 1 else -math.inf, dtype=torch.float64)
            self._ratios += torch.logaddexp(drawn, left_out)

    @property
    def _sampled(self) -> bool:
        return any(rate < 1 for rate, _ in self._numbers) and self._least > 0

    def scores(self, model: nn.Module) -> dict[str, np.ndarray]:
        """See :class:`Attack`."""
        found = {"samples": self._ratios} if self._sampled else {}
        found["all"] = self._parameters.sum(0) * self._share
        if len(self.targets) > 1:
            found |= {f"parameter {name}": row for name, row in zip(self.targets, self._parameters, strict=True)}
        if len(self._parts) > 1:
            found |= {f"part {i} of the run": row for i, row in enumerate(self._parts)}
        return {name: values.numpy() for name, values in found.items()}


class ExampleAttack(Attack):
    """On canaries that are examples: inner products of the updates with the clipped gradients, and losses.

    Args:
        model: a copy of the user's, for this attack alone.
        losses: for each canary, from a model to its loss.
        max_grad_norm: C.
    """

    def __init__(self, model: nn.Module, losses: Sequence[Callable[[nn.Module], Tensor]], max_grad_norm: float) -> None:
        self.model, self.losses, self.bound = model, losses, max_grad_norm
        self._gradients: list[dict[str, Tensor]] = []
        self._products = torch.zeros(len(losses), dtype=torch.float64)
        self._squares = torch.zeros(len(losses), dtype=torch.float64)
        self._first: Tensor | None = None

    def before(self, model: nn.Module) -> None:
        """See :class:`Attack`."""
        self.model.load_state_dict(model.state_dict())
        if self._first is None:
            self._first = self._now()
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._gradients = []
        for loss in self.losses:
            with torch.enable_grad():
                found = torch.autograd.grad(loss(self.model), list(named.values()), allow_unused=True)
            kept = {name: g.double() for name, g in zip(named, found, strict=True) if g is not None}
            norm = torch.stack([g.square().sum() for g in kept.values()]).sum().sqrt()
            weight = (self.bound / norm).clamp_max(1.0)
            self._gradients.append({name: g * weight for name, g in kept.items()})

    def after(self, step: int, released: Mapping[str, Tensor]) -> None:
        """See :class:`Attack`."""
        for i, gradients in enumerate(self._gradients):
            for name, g in gradients.items():
                self._products[i] += (g * released[name].double()).sum().cpu()
                self._squares[i] += g.square().sum().cpu()

    def scores(self, model: nn.Module) -> dict[str, np.ndarray]:
        """See :class:`Attack`."""
        self.model.load_state_dict(model.state_dict())
        assert self._first is not None
        found: dict[str, Any] = {
            "update": self._products / self._squares.clamp_min(1e-300).sqrt(),
            "loss": self._first - self._now(),
        }
        return {name: values.numpy() for name, values in found.items()}

    @torch.no_grad()
    def _now(self) -> Tensor:
        return torch.stack([loss(self.model).double().cpu() for loss in self.losses])
