"""Models under FSDP2: what is refused, what a failed forward leaves, and which unit holds which parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import nn

from dpcompile._torch.parallel import clear_interrupted, forward_hooks, is_fsdp_hook
from dpcompile.distributed.ranks import refuse_some
from dpcompile.distributed.shards import check_layout, is_distributed, tensor_parallel_dims
from dpcompile.errors import UnsupportedGraphError
from dpcompile.regions.units import Unit

__all__ = ["check_sharded", "clear_failed", "held_by_units"]


def check_sharded(root: Unit, parameters: Mapping[str, nn.Parameter], *, stages: int = 1, sharing: int = 1) -> None:
    """Raise UnsupportedGraphError unless FSDP2 holds every trainable parameter in a way that is understood here.

    **Guarantee.** If this returns, then every trainable parameter's sums are added up over all ranks that have examples
    of their own.

    Args:
        root: the model.
        parameters: of it.
        stages: of a pipeline over so many ranks; FSDP shards one stage over the others.
        sharing: so many ranks of tensor parallelism share a batch, and hold copies of what is not cut over them.
    """
    for name, parameter in parameters.items():
        if parameter.requires_grad and not is_distributed(parameter):
            raise UnsupportedGraphError(
                f"the trainable parameter '{name}' is outside FSDP: every rank would add its own gradient to it",
                remedy="call fully_shard on the model itself too, without ignored_params, or freeze the parameter",
            )
        if parameter.requires_grad:
            check_layout(parameter, fsdp=True)
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            copies = 1 if tensor_parallel_dims(parameter, fsdp=True) else sharing
            refuse_some(f"FSDP shards '{name}'", cast(Any, parameter).device_mesh.size() * stages * copies)
    for unit in _all(root):
        if unit.sharded and not all(map(is_fsdp_hook, forward_hooks(unit.module))):
            raise UnsupportedGraphError(
                f"'{unit.path or 'the model'}' has hooks around its forward besides those of its own fully_shard: what "
                "they do to the examples is not seen",
                remedy="put the hooks on a module inside the unit, and call fully_shard on one module at a time",
            )
        if unit.sharded and "forward" in unit.module.__dict__:
            raise UnsupportedGraphError(
                f"the forward of '{unit.path or 'the model'}' was replaced on the object",
                remedy="override it in a class, or wrap the module in another and shard that",
            )


def clear_failed(root: Unit) -> None:
    """Before a forward: what an earlier one, or its backward, left behind when it failed."""
    for unit in _all(root):
        if unit.sharded:
            clear_interrupted(unit.module)


def held_by_units(root: Unit, parameters: Mapping[str, nn.Parameter]) -> dict[str, list[str]]:
    """Path of a unit -> the trainable parameters that it holds; units inside others first."""
    return {unit.path: _own(unit, parameters) for unit in _all(root)}


def _own(unit: Unit, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """The trainable parameters of a unit, without those of the units inside."""
    inside = [f"{child.path}." for child in unit.children]
    prefix = f"{unit.path}." if unit.path else ""
    return [
        name
        for name, p in parameters.items()
        if p.requires_grad and name.startswith(prefix) and not name.startswith(tuple(inside))
    ]


def _all(unit: Unit) -> Iterator[Unit]:
    for child in unit.children:
        yield from _all(child)
    yield unit
