"""The running backward, hooks, and modes that see every operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._decomp.decompositions
import torch._dynamo
from torch._dispatch.python import enable_python_dispatcher
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

__all__ = [
    "TorchDispatchMode",
    "enable_python_dispatcher",
    "after_backward",
    "asks_for",
    "current_backward",
    "has_call_hooks",
    "has_gradient_hooks",
    "hooks_of",
    "entered_modes",
    "in_functorch",
    "in_symbolic_trace",
    "is_entered",
    "on_top",
    "refuse_forward_mode",
    "remove_forward_hooks",
]


def current_backward() -> int:
    """Identify the running ``backward()`` call."""
    return torch._C._current_graph_task_id()


def asks_for(leaf: Any) -> bool:
    """Whether the running backward is a ``torch.autograd.grad`` that is to return the gradient of this leaf's node."""
    try:
        torch._C._will_engine_execute_node(leaf)  # type: ignore[attr-defined]
    except RuntimeError as error:
        return "autograd.grad()" in str(error)
    return False


def after_backward(function: Callable[[], None]) -> None:
    """Run ``function`` when the running ``backward()`` is over; what it raises, that ``backward()`` raises."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def in_functorch() -> bool:
    """Whether a transform of ``torch.func`` is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]


def in_symbolic_trace() -> bool:
    """Whether ``torch.fx`` records what runs: ``symbolic_trace`` or ``make_fx``."""
    return is_fx_symbolic_tracing()


def entered_modes() -> list[str]:
    """The classes of the modes that see every operation now, outermost first."""
    return [type(mode).__name__ for mode in _get_current_dispatch_mode_stack()]


def refuse_forward_mode(name: str) -> None:
    """Raise NotImplementedError where forward-mode derivatives are taken: custom operators drop them in silence."""
    if torch.autograd.forward_ad._current_level >= 0:
        raise NotImplementedError(f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd)")


def hooks_of(tensor: torch.Tensor) -> list[Any]:
    """The hooks on the gradient of a tensor."""
    return list((tensor._backward_hooks or {}).values())


def is_entered(mode: TorchDispatchMode) -> bool:
    """Whether operations reach this mode: printing a tensor switches all modes off for a while."""
    return any(entered is mode for entered in _get_current_dispatch_mode_stack())


def on_top(mode: TorchDispatchMode) -> bool:
    """Whether no other mode was entered since this one."""
    stack = _get_current_dispatch_mode_stack()
    return bool(stack) and stack[-1] is mode


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """Whether the user registered a hook on the parameter's gradient."""
    accumulated = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return bool(parameter._backward_hooks) or bool(accumulated)


def has_call_hooks(module: torch.nn.Module) -> bool:
    """Whether hooks run before or after calls of this module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def remove_forward_hooks(module: torch.nn.Module, names: tuple[str, ...]) -> None:
    """Take functions of these names off a module's forward, whoever holds their handles."""
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__name__", None) in names:
            del module._forward_hooks[key]
