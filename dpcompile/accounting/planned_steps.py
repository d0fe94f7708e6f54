"""The steps for which a target epsilon was calibrated, and what happens beyond them."""

from __future__ import annotations

import warnings
from typing import Literal, TypeAlias, get_args

from dpcompile.accounting.by_step import ByStep
from dpcompile.errors import PrivacyError, PrivacyWarning, running_line

__all__ = ["OnExceed", "PlannedSteps"]

OnExceed: TypeAlias = Literal["raise", "warn", "ignore"]


class PlannedSteps:
    """How many logical steps a run may take.

    Args:
        steps: that were planned; None: any number.
        on_exceed: "raise", "warn" (once) or "ignore".
        noise: what sigma is multiplied by at each step; None: 1.

    Raises:
        PrivacyError: another ``on_exceed``.
    """

    def __init__(self, steps: int | None, on_exceed: OnExceed, noise: ByStep | None = None) -> None:
        if on_exceed not in get_args(OnExceed):
            raise PrivacyError(
                f"on_exceed is {on_exceed!r}", remedy=f"give one of {', '.join(map(repr, get_args(OnExceed)))}"
            )
        self.steps, self.noise, self._on_exceed = steps, noise, on_exceed

    def refuse_less_noise(self, before: float, after: float) -> None:
        """Raise PrivacyError if the noise of planned steps is to become less than what was calibrated for them.

        With a schedule the number is its scale, and none but the first will do.
        """
        if self.noise is not None and after != before:
            raise PrivacyError(
                f"noise_multiplier was to go from {before} to {after}, and it is the scale of make_private's "
                "noise_schedule, which sets the noise of every step",
                remedy="leave one of them out: noise_schedule, or NoiseSchedule and what else moves the noise",
            )
        if self.steps is not None and after < before:
            raise PrivacyError(
                f"noise_multiplier was to go from {before} to {after}, and {before} is what a target epsilon was "
                f"calibrated to for {self.steps} steps",
                remedy="give make_private noise_schedule=factor beside the target, which calibrates the schedule as a "
                "whole; or calibrate_noise(..., schedule=factor) and make_private its noise_multiplier in place of the "
                "target",
            )

    def check_draw(self, draw: int, used: int) -> None:
        """Before a step, where rates go by the draw: it is one of those planned, and none of those before it.

        Args:
            draw: of the step.
            used: the draws of the run before are below it, of whatever loader.

        Raises:
            PrivacyError: it is not, with "raise".
        """
        self.check(draw)
        if self.steps is not None and draw < used:
            self._exceed(
                f"draw {draw} of the loader, and the run has stepped on draw {used - 1}: noise was calibrated for each "
                "draw once, and its rate counts again: epsilon may be above the target",
                remedy="load the loader's state too (loader.load_state_dict, or load_checkpoint with the loader), and "
                "step once per draw; or pass on_exceed='warn' to make_private and report what the accountant says",
            )

    def begin_pass(self, taken: int) -> None:
        """Another pass over the data begins when so many steps were ``taken``: warn where it has none left."""
        if self.steps is not None and taken >= self.steps and self._on_exceed == "raise":
            warnings.warn(
                f"all {self.steps} planned steps are taken, and another pass over the loader begins: its first "
                "optimizer.step() will be refused, as epsilon would be above the target; stop here, or plan the run "
                "with more epochs or steps",
                PrivacyWarning,
                stacklevel=5,
            )

    def check(self, taken: int) -> None:
        """Before a step, when so many were ``taken``.

        Raises:
            PrivacyError: it is one more than planned, with "raise".
        """
        if self.steps is None or taken < self.steps:
            return
        self._exceed(
            f"step {taken + 1} of a run whose noise is calibrated for {self.steps}: epsilon is above the target",
            remedy="stop here, plan the run with more epochs or steps, or pass on_exceed='warn' to make_private and "
            "report what the accountant says",
        )

    def _exceed(self, what: str, *, remedy: str) -> None:
        if self._on_exceed == "ignore":
            return
        if self._on_exceed == "raise":
            raise PrivacyError(what, where=running_line(), remedy=remedy)
        self._on_exceed = "ignore"
        warnings.warn(f"{what}; report what the accountant says", RuntimeWarning, stacklevel=5)
