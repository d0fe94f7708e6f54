"""Numbers that are public functions of the step: asked for once, checked, and told apart by a digest."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpcompile.accounting.arguments import number
from dpcompile.errors import PrivacyError

__all__ = ["ByStep", "RateSchedule", "Sampled"]


class ByStep:
    """A function of the step, of which every step has one value: it is asked for once, however often it is read.

    Args:
        function: from the step, 0 or more, to a number; not of the data, as its values are public.
        name: of the number, for messages.
        largest: the values lie in (0, ``largest``], and are finite.
        whose: what ``largest`` is, for messages.

    **Guarantee.** What is drawn, divided, added and counted at a step goes by the same value, also of a function that
    would give another one when it is asked again.

    ==================================================  ===================================================
    edge case                                           outcome
    ==================================================  ===================================================
    a value that is none, 0, below, or not finite       refused, and the step named
    a function that raises                              likewise
    a function of more than the step                    a run that is resumed is refused where values differ
                                                        that were asked for before; else not seen
    ==================================================  ===================================================
    """

    def __init__(
        self, function: Callable[[int], float], name: str, *, largest: float = math.inf, whose: str = ""
    ) -> None:
        self._function, self._name, self._largest, self._whose = function, name, largest, whose
        self._values: dict[int, float] = {}

    def __call__(self, step: int) -> float:
        """The value of a step.

        Raises:
            PrivacyError: see the class.
        """
        if step not in self._values:
            self._values[step] = self._checked(step)
        return self._values[step]

    def _checked(self, step: int) -> float:
        try:
            value = self._function(step)
        except PrivacyError:
            raise
        except Exception as error:
            raise PrivacyError(
                f"{self._name} of step {step} is not known: its function raised {type(error).__name__}: {error}",
                remedy="give a function that has a number for every step from 0 on",
            ) from error
        found = math.nan if isinstance(value, bool) else number(value)
        if not (0 < found <= self._largest and found < math.inf):
            interval = "(0, inf)" if self._largest == math.inf else f"(0, {self._largest:g}]{self._whose}"
            raise PrivacyError(
                f"{self._name} of step {step} is {value!r}, not in {interval}",
                remedy="give a function whose values are finite, above 0 and within these bounds, at every step",
            )
        return found

    def digest(self, steps: int) -> str:
        """Of the values of so many steps, from 0 on."""
        packed = struct.pack(f"<{steps}d", *(self(step) for step in range(steps)))
        return hashlib.sha256(packed).hexdigest()[:32]

    def state(self, steps: int) -> dict[str, Any]:
        """What :meth:`is_of` compares; plain numbers and text."""
        return {"first": self(0), "steps": steps, "digest": self.digest(steps)}

    def is_of(self, state: Any) -> bool:
        """Whether the steps that a saved state covers have these values."""
        if not isinstance(state, Mapping):
            return False
        steps = state.get("steps")
        if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps < 2**32:
            return False
        return self.digest(steps) == state.get("digest")


class Sampled(NamedTuple):
    """How one step is sampled and divided."""

    sample_rate: float
    """q, in (0, 1]."""
    expected_batch_size: float
    """B: what divides the sum."""


class RateSchedule:
    """Sample rate and expected batch size of every step.

    Args:
        sample_rate: of the step.
        expected_batch_size: of the step.
    """

    def __init__(self, sample_rate: ByStep, expected_batch_size: ByStep) -> None:
        self.sample_rate, self.expected_batch_size = sample_rate, expected_batch_size

    def at(self, step: int) -> Sampled:
        """Of one step.

        Raises:
            PrivacyError: :class:`ByStep`.
        """
        return Sampled(self.sample_rate(step), self.expected_batch_size(step))

    def state(self, steps: int) -> dict[str, Any]:
        """What :meth:`is_of` compares."""
        return {**self.expected_batch_size.state(steps), "rates": self.sample_rate.digest(steps)}

    def is_of(self, state: Any) -> bool:
        """Whether the steps that a saved state covers were sampled and divided as here."""
        return self.expected_batch_size.is_of(state) and self.sample_rate.is_of(
            {"steps": state["steps"], "digest": state.get("rates")}
        )
