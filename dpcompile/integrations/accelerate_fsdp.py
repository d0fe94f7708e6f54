"""FSDP2 by Accelerate's plugin: the model is sharded as it says, with units that can be made private."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names, fsdp2_prepare_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from dpcompile.errors import PrivacyError, UnsupportedGraphError

__all__ = ["refuse_plugin", "shard"]

_LOOP = "call fully_shard and dpcompile's own make_private, as docs/distributed.md has it"


def refuse_plugin(accelerator: Any) -> None:
    """Raise for settings of FSDP that cannot be had with private training.

    Args:
        accelerator: whose ``distributed_type`` is FSDP.

    Raises:
        UnsupportedGraphError: FSDP1, or other dimensions beside the shards.
        PrivacyError: weights that only the first rank has, or checkpoints that are put on by Accelerate.
    """
    plugin: Any = accelerator.state.fsdp_plugin
    if not accelerator.is_fsdp2:
        raise UnsupportedGraphError(
            "the accelerator shards by FSDP1, whose flattened parameters have no gradient for each example",
            remedy="set fsdp_version=2 in FullyShardedDataParallelPlugin",
        )
    if accelerator.parallelism_config is not None:
        raise UnsupportedGraphError(
            "the accelerator has a parallelism_config beside FSDP2",
            remedy=f"leave it out; or {_LOOP}",
        )
    if plugin.cpu_ram_efficient_loading:
        raise PrivacyError(
            "cpu_ram_efficient_loading: the weights of all ranks but the first are not there when a model is sharded",
            remedy="set cpu_ram_efficient_loading=False in FullyShardedDataParallelPlugin",
        )
    if plugin.activation_checkpointing:
        raise PrivacyError(
            "activation_checkpointing of FSDP's plugin restores no random numbers, and the second forward of a block "
            "would be another than the first",
            remedy="leave it out there, and put checkpoint_wrapper around the blocks before make_private",
        )


def shard(accelerator: Any, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Shard a model in place, each module that the plugin's policy names, and the model; one that is stays as it is.

    Accelerate would put the last norm and the head into one unit of several modules, which cannot be made private.

    Args:
        accelerator: with FSDP2.
        model: an ordinary one.
        optimizers: their parameters become the sharded ones.

    Raises:
        PrivacyError: an optimizer that took steps, or has parameters that are not the model's.
    """
    if isinstance(model, FSDPModule):
        return
    plugin: Any = accelerator.state.fsdp_plugin
    plugin.set_auto_wrap_policy(model)
    before = {id(p): name for name, p in fsdp2_canonicalize_names(dict(model.named_parameters())).items()}
    given = [group for optimizer in optimizers for group in optimizer.param_groups]
    if any(optimizer.state for optimizer in optimizers) or any(id(p) not in before for g in given for p in g["params"]):
        raise PrivacyError(
            "the optimizer took steps already, or has parameters that are not the model's: it cannot follow the shards",
            remedy="make the optimizer of model.parameters() before make_private, and step it afterwards",
        )
    options: dict[str, Any] = {"mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy()}
    if plugin.cpu_offload:
        options["offload_policy"] = plugin.cpu_offload
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)
    checkpointed = {id(getattr(module, "_checkpoint_wrapped_module", None)) for module in model.modules()}
    for module in reversed(list(model.modules())[1:]):  # the inner ones first
        if (
            wraps is not None
            and wraps(module)
            and not isinstance(module, FSDPModule)
            and id(module) not in checkpointed
        ):
            fully_shard(module, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(model, **options)
    after = fsdp2_canonicalize_names(dict(model.named_parameters()))
    for group in given:
        group["params"] = [after[before[id(p)]] for p in group["params"]]
