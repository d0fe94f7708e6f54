"""The hooks of an optimizer that wraps another: on its own steps, on the other's states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

__all__ = ["HookedOptimizer"]


class HookedOptimizer(Optimizer):
    """What :class:`dpcompile.DPOptimizer` does about hooks.

    Attributes:
        optimizer: the inner one.
        accumulating: whether a step only waits.
    """

    optimizer: Optimizer
    accumulating: bool

    def register_step_pre_hook(self, hook: Any) -> Any:
        """As in torch, before the noise; not called for steps that only accumulate."""
        return super().register_step_pre_hook(_unless_accumulating(hook))

    def register_step_post_hook(self, hook: Any) -> Any:
        """As in torch, after the update; not called for steps that only accumulate."""
        return super().register_step_post_hook(_unless_accumulating(hook))

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """On the inner optimizer, which it is given."""
        return self.optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """On the inner optimizer, which it is given."""
        return self.optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """On the inner optimizer, which it is given."""
        return self.optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """On the inner optimizer, which it is given."""
        return self.optimizer.register_load_state_dict_post_hook(hook, prepend)


def _unless_accumulating(hook: Callable[..., Any]) -> Callable[..., Any]:
    def on_logical_step(optimizer: HookedOptimizer, args: Any, kwargs: Any) -> Any:
        return None if optimizer.accumulating else hook(optimizer, args, kwargs)

    return on_logical_step
