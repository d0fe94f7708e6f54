"""What torch's optimizers and its gradient scaler keep to themselves."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
import torch._decomp.decompositions
import torch._dynamo
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

__all__ = ["adam_state", "add_one_", "is_stepped_as_made", "mark_stepped", "scale_tensor", "sgd_state"]


def scale_tensor(scaler: torch.amp.GradScaler) -> torch.Tensor:
    """A copy of the scale of a gradient scaler that was used; does not wait for its device."""
    return cast(Any, scaler)._scale.detach().clone()


def is_stepped_as_made(optimizer: torch.optim.Optimizer, *, hooks: int, everywhere: Collection[Any]) -> bool:
    """Whether ``step()`` does what its class says, and nothing else, ``hooks`` pre-hooks of its own apart.

    Args:
        optimizer: what is to be stepped.
        hooks: how many pre-hooks of its own change nothing.
        everywhere: pre-hooks of all optimizers that change nothing.
    """
    replaced = optimizer.__dict__.get("step")  # learning-rate schedulers put a wrapper there that counts calls
    return (
        (replaced is None or getattr(replaced, "_wrapped_by_lr_sched", False))
        and len(optimizer._optimizer_step_pre_hooks) == hooks
        and not optimizer._optimizer_step_post_hooks
        and all(hook in everywhere for hook in _global_optimizer_pre_hooks.values())
        and not _global_optimizer_post_hooks
        and not hasattr(optimizer, "grad_scale")
        and not hasattr(optimizer, "found_inf")
    )


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Learning-rate schedulers look at this to see that a step came before theirs."""
    cast(Any, optimizer)._opt_called = True


def adam_state(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[list[torch.Tensor], ...]:
    """Parameters, gradients, means, means of squares and steps of a group of Adam, made where they are missing."""
    params, grads, means, squares, largest, steps = [], [], [], [], [], []
    cast(Any, optimizer)._init_group(group, params, grads, means, squares, largest, steps)
    return params, grads, means, squares, steps


def sgd_state(
    optimizer: torch.optim.Optimizer, group: dict[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]:
    """Parameters, gradients and momentum buffers of a group of SGD: none without momentum, None where there is none."""
    params, grads, buffers = [], [], []
    cast(Any, optimizer)._init_group(group, params, grads, buffers)
    return params, grads, buffers


def add_one_(tensors: list[torch.Tensor]) -> None:
    """Add 1 to each tensor in place, in one call."""
    torch._foreach_add_(tensors, 1)  # type: ignore[reportPrivateImportUsage]
