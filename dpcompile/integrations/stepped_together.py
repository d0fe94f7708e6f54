"""Several optimizers that a loop steps one by one, and that take one private step together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpcompile.errors import PrivacyError
from dpcompile.optim.optimizer import DPOptimizer

__all__ = ["SteppedTogether"]


class SteppedTogether:
    """One draw gives one private gradient, so all parts are updated when the last of them was stepped.

    Args:
        private: made of all parts.
        parts: the plain optimizers.

    Attributes:
        handles: what the loop steps, one for each part.
    """

    def __init__(self, private: DPOptimizer, parts: Sequence[Optimizer]) -> None:
        self.private = private
        self._stepped: set[int] = set()
        self._clears = False
        self.handles = [_Handle(self, part, number) for number, part in enumerate(parts)]

    def check(self) -> None:
        """Before a batch.

        Raises:
            PrivacyError: some parts were stepped on the one before, and not all.
        """
        if self._stepped:
            left = [type(h.part).__name__ for h in self.handles if h.number not in self._stepped]
            raise PrivacyError(
                f"of {len(self.handles)} optimizers {', '.join(left)} was not stepped on the last batch",
                remedy="step every optimizer once per batch, after one backward of one loss (the sum of several); "
                "losses that take turns are several releases of one draw, which is not accounted for",
            )

    def step(self, number: int) -> None:
        """A part is stepped."""
        self.refuse_second(number)
        self._stepped.add(number)
        if len(self._stepped) == len(self.handles):
            self._stepped.clear()
            self.private.step()
            if self._clears:
                self._clears = False
                self.private.zero_grad()

    def refuse_second(self, number: int) -> None:
        """Raise PrivacyError if the part has been stepped on this batch."""
        if number in self._stepped:
            self.check()

    def zero_grad(self, set_to_none: bool) -> None:
        """A part's gradients are cleared: with all others', and after the step if that is under way."""
        if self._stepped:
            self._clears = True
        else:
            self.private.zero_grad(set_to_none)


class _Handle(Optimizer):
    """One of them, as the loop sees it."""

    _step_supports_amp_scaling = True

    def __init__(self, together: SteppedTogether, part: Optimizer, number: int) -> None:
        self._together, self.part, self.number = together, part, number
        self.private = together.private  # by which it is known that this one's step has noise
        super().__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.part.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.part.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.part.defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if getattr(self, "grad_scale", None) is not None:
            raise PrivacyError(
                "a gradient scaler steps one of several optimizers, which take one step together",
                remedy="give precision='bf16-mixed', which scales no loss",
            )
        self._together.step(self.number)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._together.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        params = param_group["params"]
        for p in [params] if isinstance(params, Tensor) else params:
            if id(p) not in {id(q) for q in self._together.private.engine.parameters().values()}:
                raise PrivacyError(
                    "a parameter that is not the private model's", remedy="make it private with the rest"
                )
        self.part.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Of all, with the first; nothing with the others."""
        return {} if self.number else self._together.private.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self.number:
            self._together.private.load_state_dict(state_dict)
