"""Expert parallelism: which parameters are experts of ranks that have batches of their own."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dpcompile.distributed.ranks import refuse_some
from dpcompile.distributed.shards import is_distributed, tensor_parallel_dims
from dpcompile.errors import UnsupportedGraphError

__all__ = ["ExpertParallel", "find_expert_parallel", "note_group"]

_GROUPS: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class ExpertParallel:
    """One group of ranks, each with examples of its own, that hold the experts of a model between them.

    Attributes:
        name: of the group, as graphs have it.
        cut: names of the parameters of which every rank of the group holds another part.
    """

    name: str
    cut: frozenset[str]

    def along(self, mesh: Any) -> tuple[str, ...] | None:
        """Which dimensions of ranks that share a batch a ``DeviceMesh`` has: none; None if it is of other ranks."""
        return () if mesh.ndim == 1 and mesh.get_group(0).group_name == self.name else None


def note_group(group: Any) -> None:
    """The ranks of this process group have batches of their own: what is cut over them are experts."""
    _GROUPS.add(group)


def find_expert_parallel(
    parameters: Mapping[str, nn.Parameter], *, fsdp: bool, pipeline: bool = False
) -> ExpertParallel | None:
    """The experts of a model that were cut by :func:`dpcompile.experts.cut_experts`; None if it has none.

    Args:
        parameters: of the model.
        fsdp: whether it is under ``fully_shard``; otherwise rows that are sent are refused where they are met.
        pipeline: whether it is a stage of one.

    Raises:
        UnsupportedGraphError: experts that FSDP2 does not hold as it should, or several groups.
    """
    behind: dict[str, Any] = {n: p for n, p in parameters.items() if fsdp and _groups_behind_fsdp(p)}
    groups = {g for p in behind.values() for g in _groups_behind_fsdp(p)}
    if not any(g in _GROUPS for g in groups):
        return None
    if pipeline:
        raise UnsupportedGraphError(
            "experts that lie on several ranks, in a stage of a pipeline",
            remedy="cut the experts over ranks that share a batch, or train without a pipeline",
        )
    if len(groups) > 1:
        raise UnsupportedGraphError(
            f"parameters are cut over {len(groups)} groups of ranks, of which one has batches of their own",
            remedy="use one mesh for all cut_experts, and leave out parallelize_module",
        )
    for name, parameter in behind.items():
        if parameter.device_mesh.ndim != 2:
            raise UnsupportedGraphError(
                f"the experts '{name}' lie on a mesh of {parameter.device_mesh.ndim} dimensions",
                remedy="fully_shard(experts, mesh=mesh['edp']) on the one other dimension of a mesh of two",
            )
        refuse_some(f"the experts '{name}' lie", parameter.device_mesh.size())
    return ExpertParallel(groups.pop().group_name, frozenset(behind))


def _groups_behind_fsdp(parameter: Any) -> list[Any]:
    """Over which groups a parameter is cut besides FSDP's."""
    if not is_distributed(parameter):
        return []
    return [parameter.device_mesh.get_group(d) for d in tensor_parallel_dims(parameter, fsdp=True)]
