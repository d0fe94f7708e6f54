"""What DistributedDataParallel, FSDP2 and DTensor keep to themselves."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
import torch._decomp.decompositions
import torch._dynamo

from dpcompile._torch.autograd import current_backward

__all__ = [
    "ddp_options",
    "forward_hooks",
    "group_named",
    "gathered_parameters",
    "active_replica",
    "checkpointed",
    "clear_interrupted",
    "inner_tensor",
    "is_fsdp_hook",
    "mixed_precision",
    "ranks_of_group",
    "share_fsdp_state",
]


def active_replica() -> Any:
    """The DistributedDataParallel whose forward is running; None outside."""
    return torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()


def checkpointed(unit: torch.nn.Module) -> torch.nn.Module:
    """The module under a checkpoint that restores random numbers; one that is under one stays as it is."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper

    return unit if isinstance(unit, CheckpointWrapper) else checkpoint_wrapper(unit)


def inner_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What of a ``DTensor`` lies on this rank, as it is kept: no new tensor, no gradient."""
    return cast(Any, tensor)._local_tensor


def mixed_precision(module: torch.nn.Module) -> Any:
    """The policy of a unit of FSDP2."""
    return cast(Any, module)._get_fsdp_state()._mp_policy


def group_named(name: str) -> Any:
    """The process group that a graph knows by its name."""
    from torch.distributed import distributed_c10d  # not on every build

    return cast(Any, distributed_c10d)._resolve_process_group(name)


def gathered_parameters(unit: torch.nn.Module) -> set[int]:
    """``id`` of the parameters in a unit of FSDP2, and in units inside, in the form that they have while gathered."""
    found = set()
    for module in unit.modules():
        if hasattr(module, "_get_fsdp_state"):
            state = cast(Any, module)._get_fsdp_state()
            several = getattr(state, "_fsdp_param_groups", None)  # newer torch
            groups = [state._fsdp_param_group] if several is None else several
            held = (p for group in groups if group is not None for p in group.fsdp_params)
            found.update(id(p._unsharded_param) for p in held if hasattr(p, "_unsharded_param"))
    return found


def ranks_of_group(group: Any) -> list[int]:
    """The ranks of a process group, in its order, also of one that a graph knows by its name."""
    from torch.distributed import distributed_c10d  # not on every build

    resolved = cast(Any, distributed_c10d)._resolve_process_group(group) if isinstance(group, str) else group
    return distributed_c10d.get_process_group_ranks(resolved)


def share_fsdp_state(view: torch.nn.Module, module: torch.nn.Module) -> None:
    """Let methods of FSDP2 on an object that shares a module's state do what they do on the module."""
    from torch.distributed import _composable_state  # not on every build

    _composable_state._insert_module_state(view, cast(Any, module)._get_fsdp_state())


def forward_hooks(module: torch.nn.Module) -> list[Any]:
    """The hooks around a module's forward."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def ddp_options(ddp: Any) -> dict[str, bool]:
    """Options of a DistributedDataParallel that change how it reduces gradients -> whether they are on."""
    return {
        "static_graph=True": ddp.static_graph,
        "mixed_precision": ddp.mixed_precision is not None,
        "a communication hook": bool(ddp._comm_hooks),
        "delay_all_reduce_named_params": bool(ddp._delay_all_reduce_params),
        "the join() context": ddp._join_config.enable,
    }


def is_fsdp_hook(hook: Any) -> bool:
    """Whether a hook on a module or a tensor is that of ``fully_shard`` or ``replicate``."""
    return type(getattr(hook, "__self__", None)).__name__ in ("FSDPState", "_ReplicateState")


def clear_interrupted(module: torch.nn.Module) -> None:
    """Bring a unit of FSDP2 to rest after a forward or backward that ended in an error.

    Otherwise FSDP takes the next forward for a part of that one, never frees the root's parameters again, and goes on
    computing with the weights of before the next update.
    """
    state = cast(Any, module)._get_fsdp_state()
    context = state._state_ctx
    interrupted = context.iter_forward_root is not None or context.post_backward_final_callback_queued
    if interrupted and current_backward() == -1:
        state._root_post_backward_final_callback()


def in_context_parallel() -> bool:
    """Whether attention is exchanged for that of torch's ``context_parallel`` now."""
    module: Any = sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")
    if module is None:
        return False
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    handlers = module.DTensor._op_dispatcher._custom_op_handlers
    return handlers.get(flash) is module._sdpa_handler
