"""FSDP2 by Accelerate's plugin: the model is sharded as it says, with units that can be made private."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names, fsdp2_prepare_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from dpcompile._torch.parallel import checkpointed
from dpcompile.errors import PrivacyError, UnsupportedGraphError
from dpcompile.optim.optimizer import DPOptimizer

__all__ = ["refuse_plugin", "shard", "take_private_optimizers", "tell_of_shards"]

_LOOP = "call fully_shard and dpcompile's own make_private, as docs/distributed.md has it"


def tell_of_shards(accelerator: Any, plugin: Any) -> None:
    """Let an accelerator on CPUs shard by a plugin.

    Accelerate knows FSDP on accelerators alone; on CPUs it takes DistributedDataParallel, whatever plugin it is given.

    Args:
        accelerator: of several processes.
        plugin: its own from now on.
    """
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def take_private_optimizers(accelerator: Any) -> None:
    """Let ``accelerator.prepare`` take a DPOptimizer alone: Accelerate wants the model beside it, to shard it first.

    Args:
        accelerator: with FSDP2, whose model is sharded by :func:`shard`.
    """
    theirs = accelerator.prepare

    def prepare(*given: Any, **options: Any) -> Any:
        private = [getattr(x, "optimizer", None) if not isinstance(x, DPOptimizer) else x for x in given]
        if len(given) == 1 and isinstance(private[0], DPOptimizer):  # or one that is prepared already
            return accelerator.prepare_optimizer(given[0])
        return theirs(*given, **options)

    accelerator.prepare = prepare


def refuse_plugin(accelerator: Any) -> None:
    """Raise for settings of FSDP that cannot be had with private training.

    Args:
        accelerator: whose ``distributed_type`` is FSDP.

    Raises:
        UnsupportedGraphError: FSDP1, or other dimensions beside the shards.
        PrivacyError: weights that only the first rank has.
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
    if plugin.activation_checkpointing and getattr(plugin, "activation_checkpointing_offload", False):
        raise UnsupportedGraphError(
            "activation_checkpointing_offload of FSDP's plugin moves what blocks keep, which a graph does not hold",
            remedy="set activation_checkpointing_offload=False",
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
        for module in model.modules():  # evaluation leaves the weights of the outermost unit whole
            if isinstance(module, FSDPModule):
                module.reshard()
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
    units = _units(plugin, model)
    if plugin.activation_checkpointing:
        units = [_checkpointed(model, unit) for unit in units]
    for unit in units:
        fully_shard(unit, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(model, **options)
    after = fsdp2_canonicalize_names(dict(model.named_parameters()))
    for group in given:
        group["params"] = [after[before[id(p)]] for p in group["params"]]


def _units(plugin: Any, model: nn.Module) -> list[nn.Module]:
    """What the policy names, the inner ones first, but for those with a parameter that is used outside too."""
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)
    if wraps is None:
        return []
    checkpointed = {id(getattr(module, "_checkpoint_wrapped_module", None)) for module in model.modules()}
    named = [m for m in list(model.modules())[1:] if wraps(m) and id(m) not in checkpointed]
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), set()).add(id(module))
    units = []
    for module in reversed(named):
        inside = {id(m) for m in module.modules()}
        whole = all(owners[id(p)] <= inside for p in module.parameters())
        if whole and not isinstance(module, FSDPModule):
            units.append(module)
    return units


def _checkpointed(model: nn.Module, unit: nn.Module) -> nn.Module:
    """The unit under a checkpoint, in its place in the model."""
    wrapped = checkpointed(unit)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is unit and wrapped is not unit:
            model.set_submodule(name, wrapped)
    return wrapped
