"""Parameters of which every rank holds a part: what lies here, where it lies in the whole, and sums over all ranks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpcompile.errors import UnsupportedGraphError

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before 2.13

__all__ = [
    "Pending",
    "as_gradient",
    "computing_device",
    "is_distributed",
    "local_part",
    "local_start",
    "reduce_sums",
    "version_of",
    "zeros_for",
]


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What of the tensor lies on this rank: all of it, unless it is a ``DTensor``."""
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def computing_device(parameter: Tensor) -> torch.device:
    """Where a parameter is used; with CPU offload it rests elsewhere."""
    distributed: Any = parameter
    return torch.device(distributed.device_mesh.device_type) if is_distributed(parameter) else parameter.device


def version_of(tensor: Tensor) -> tuple[int, int]:
    """Changes with every in-place operation on the tensor or on its local part."""
    return tensor._version, local_part(tensor)._version


def zeros_for(parameter: Tensor) -> Tensor:
    """A clipped sum of zeros, of what of the parameter lies here."""
    return torch.zeros_like(local_part(parameter.detach()), dtype=torch.promote_types(parameter.dtype, torch.float32))


def as_gradient(parameter: Tensor, local: Tensor) -> Tensor:
    """A gradient of the parameter from what of it lies on this rank."""
    if not is_distributed(parameter):
        return local
    distributed: Any = parameter
    if local.device.type != distributed.device_mesh.device_type:  # offloaded: from_local would move it to the mesh
        gradient = torch.empty_like(distributed.detach())
        gradient.to_local().copy_(local)
        return gradient
    return type(distributed).from_local(
        local,
        distributed.device_mesh,
        distributed.placements,
        run_check=False,
        shape=distributed.shape,
        stride=distributed.stride(),
    )


def local_start(parameter: Tensor) -> int:
    """The index, in the whole parameter flattened row by row, of the first element that lies here.

    A parameter cut along dimension 0 lies on every rank as one run of elements.
    """
    if not is_distributed(parameter):
        return 0
    layout = _layout(parameter)
    first = min(layout.rank * layout.rows, parameter.shape[0])
    return first * (parameter.numel() // max(parameter.shape[0], 1))


@dataclass(frozen=True, slots=True)
class _Layout:
    """How FSDP2 cuts a parameter: equal numbers of rows, the last ranks with fewer or none; or not at all."""

    world: int
    rank: int
    rows: int
    shards: Any
    replicas: tuple[Any, ...]


def _layout(parameter: Any) -> _Layout:
    mesh, placements = parameter.device_mesh, parameter.placements
    cut = [i for i, p in enumerate(placements) if p.is_shard()]
    copied = [i for i, p in enumerate(placements) if p.is_replicate()]
    replicas = tuple(mesh.get_group(i) for i in copied)
    if len(copied) == len(placements):
        return _Layout(1, 0, parameter.shape[0], None, replicas)
    plain = type(placements[cut[0]]).__name__ == "Shard" if cut else False
    if len(cut) != 1 or len(cut) + len(copied) != len(placements) or not plain or placements[cut[0]].dim != 0:
        raise UnsupportedGraphError(
            f"a parameter of shape {list(parameter.shape)} has the placements {tuple(placements)} on its mesh",
            remedy="shard along dimension 0 of the parameters, on a mesh of one dimension, or of two of which the "
            "first replicates (fully_shard's defaults)",
        )
    world, rank = mesh.size(cut[0]), mesh.get_local_rank(cut[0])
    rows = -(-parameter.shape[0] // world)
    here = max(min(rows, parameter.shape[0] - rank * rows), 0)
    if parameter.to_local().shape[0] != here:
        raise UnsupportedGraphError(
            f"rank {rank} holds {parameter.to_local().shape[0]} rows of a parameter where equal parts give {here}",
            remedy="shard with torch.distributed.fsdp.fully_shard",
        )
    return _Layout(world, rank, rows, mesh.get_group(cut[0]), replicas)


@dataclass(slots=True)
class Pending:
    """A sum over ranks that is under way."""

    parameters: Sequence[Tensor]
    layouts: Sequence[_Layout]
    received: Tensor
    work: Any
    sent: Tensor | None

    def wait(self) -> list[Tensor]:
        """The local parts of the sums over all ranks, in the order of the parameters, where these rest."""
        if self.work is not None:
            self.work.wait()
        self.sent = None
        for group in self.layouts[0].replicas:
            dist.all_reduce(self.received, group=group)
        found, at = [], 0
        for parameter, layout in zip(self.parameters, self.layouts, strict=True):
            width = parameter.numel() // max(parameter.shape[0], 1)
            here = local_part(parameter.detach())
            part = self.received[at : at + here.numel()].view(here.shape)
            found.append(part.clone() if part.device == here.device else part.to(here.device))
            at += layout.rows * width
        return found


def reduce_sums(parameters: Sequence[Tensor], sums: Sequence[Tensor]) -> Pending:
    """Start to add up clipped sums over the ranks, in one reduce-scatter for all parameters of a unit.

    Args:
        parameters: sharded over the same ranks.
        sums: of this rank's examples, whole, float32 or wider, all of one dtype.

    The bytes are those of FSDP2's own reduction: every parameter padded to equal rows on all ranks.
    """
    layouts = [_layout(p) for p in parameters]
    world = layouts[0].world
    parts = []
    for total, layout in zip(sums, layouts, strict=True):
        missing = layout.rows * world - total.shape[0]
        padded = torch.cat([total, total.new_zeros((missing, *total.shape[1:]))]) if missing else total
        parts.append(padded.reshape(world, -1))
    sent = torch.cat(parts, 1)
    if layouts[0].shards is None:
        return Pending(parameters, layouts, sent.view(-1), None, None)
    received = sent.new_empty(sent.shape[1])
    work = _reduce_scatter(received, sent.view(-1), group=layouts[0].shards, async_op=True)
    return Pending(parameters, layouts, received, work, sent)
