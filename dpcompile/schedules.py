"""Schedules of the noise multiplier and of C, in the manner of ``torch.optim.lr_scheduler``.

The learning rate's schedulers are torch's own. A schedule is a function of the number of its :meth:`Schedule.step`
calls alone, not of the data: what it does is public. The accountant counts every step with the noise that it had. For a
target give the function itself, ``make_private(noise_schedule=)``: it is calibrated, and the optimizer goes along it by
itself. So does the expected batch size, ``make_private(batch_size_schedule=)`` and :class:`dpcompile.PoissonLoader`, as
a function of the draw, which may have been taken long before its step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from dpcompile.errors import PrivacyError
from dpcompile.noise.adaptive import AdaptiveGaussianMechanism
from dpcompile.optim.optimizer import DPOptimizer

__all__ = ["ClipSchedule", "Factor", "NoiseSchedule", "Schedule", "cosine", "exponential", "steps"]

Factor: TypeAlias = Callable[[int], float]


def exponential(gamma: float) -> Factor:
    """``gamma ** t``."""
    return lambda t: gamma**t


def steps(size: int, gamma: float) -> Factor:
    """``gamma`` once more after every ``size`` steps."""
    return lambda t: gamma ** (t // size)


def cosine(length: int, last: float = 0.0) -> Factor:
    """From 1 to ``last`` along half a wave of ``length`` steps, and ``last`` from there on."""
    return lambda t: last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(t, length) / length))


class Schedule:
    """Sets a number of an optimizer to its first value times ``factor(t)``; ``t`` counts :meth:`step`, from 0.

    Args:
        optimizer: of the numbers.
        factor: of t, which is 0 until the first :meth:`step`.

    Attributes:
        base: what is multiplied.
        last_step: t.
    """

    number: str
    setter: Callable[[DPOptimizer, float], None]

    def __init__(self, optimizer: DPOptimizer, factor: Factor) -> None:
        if not isinstance(optimizer, DPOptimizer):
            raise PrivacyError(
                f"{type(self).__name__} was given a {type(optimizer).__name__}, not a DPOptimizer",
                remedy="give it what DPOptimizer or make_private returned",
            )
        self._optimizer, self._factor = optimizer, factor
        self.base: float = getattr(optimizer, self.number)
        self.last_step = 0
        self._set()

    @property
    def value(self) -> float:
        """What the number is now."""
        return self.base * float(self._factor(self.last_step))

    def step(self) -> None:
        """After ``optimizer.step()``: take the next value."""
        self.last_step += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes."""
        return {"base": self.base, "last_step": self.last_step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the saved schedule was, with the factor of this one."""
        self.base, self.last_step = float(state_dict["base"]), int(state_dict["last_step"])
        self._set()

    def _set(self) -> None:
        type(self).setter(self._optimizer, self.value)


class NoiseSchedule(Schedule):
    """Of sigma, ``optimizer.noise_multiplier``."""

    number = "noise_multiplier"
    setter = DPOptimizer.move_noise_multiplier


class ClipSchedule(Schedule):
    """Of C, ``optimizer.max_grad_norm``; nothing is compiled anew. For "flat", "per_layer" and "per_block" clipping."""

    number = "max_grad_norm"
    setter = DPOptimizer.move_max_grad_norm

    def __init__(self, optimizer: DPOptimizer, factor: Factor) -> None:
        if isinstance(getattr(optimizer, "mechanism", None), AdaptiveGaussianMechanism):
            raise PrivacyError(
                "a schedule of a C that follows a quantile: each would undo what the other one did",
                remedy="leave out the schedule or AdaptiveClip",
            )
        super().__init__(optimizer, factor)
