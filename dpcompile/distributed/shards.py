"""Parameters of which every rank holds a part: what lies here, where it lies in the whole, and sums over all ranks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpcompile._torch.parallel import inner_tensor
from dpcompile.distributed.ranks import world_size
from dpcompile.errors import UnsupportedGraphError

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before 2.13

__all__ = [
    "Pending",
    "as_gradient",
    "check_layout",
    "computing_device",
    "fake_gathered",
    "gathered_shape",
    "is_distributed",
    "local_part",
    "local_runs",
    "reduce_sums",
    "tensor_parallel_dims",
    "zeros_for",
]


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is a ``DTensor``."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What of the tensor lies on this rank: all of it, unless it is a ``DTensor``."""
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def computing_device(parameter: Tensor) -> torch.device:
    """Where a parameter is used; with CPU offload it rests elsewhere."""
    distributed: Any = parameter
    return torch.device(distributed.device_mesh.device_type) if is_distributed(parameter) else parameter.device


def zeros_for(parameter: Tensor) -> Tensor:
    """A clipped sum of zeros, of what of the parameter lies here."""
    return torch.zeros_like(local_part(parameter.detach()), dtype=torch.promote_types(parameter.dtype, torch.float32))


def as_gradient(parameter: Tensor, local: Tensor) -> Tensor:
    """A gradient of the parameter from what of it lies on this rank."""
    if not is_distributed(parameter):
        return local
    distributed: Any = parameter
    if local.device.type != distributed.device_mesh.device_type:  # offloaded: from_local would move it to the mesh
        gradient: Any = torch.empty_like(distributed.detach())
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


def local_runs(parameter: Tensor) -> list[tuple[int, int]]:
    """Where the elements on this rank, row by row, lie in the whole parameter, flattened: ``(first, how many)``.

    A parameter cut along dimension 0 lies on every rank as one run; cut along another one, in a run for every row.
    """
    if not is_distributed(parameter):
        return [(0, parameter.numel())]
    layout = _layout(parameter)
    return _runs(tuple(parameter.shape), layout.offset, layout.here)


def check_layout(parameter: Tensor, *, fsdp: bool) -> None:
    """Raise UnsupportedGraphError if a ``DTensor`` is cut in a way that is not understood here."""
    layout = _layout(parameter)
    distributed: Any = parameter
    mesh = distributed.device_mesh
    if not _is_understood(distributed.placements, [mesh.size(i) for i in range(mesh.ndim)], fsdp=fsdp):
        raise _not_understood(parameter)
    on_all = layout.fsdp_dim is None and mesh.size() == world_size()
    if fsdp and layout.fsdp_dim != 0 and not on_all:
        raise _not_understood(parameter)


def gathered_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape that FSDP gathers: the whole one, or of a tensor-parallel parameter this rank's part."""
    return _layout(parameter).gathered if is_distributed(parameter) else tuple(parameter.shape)


def fake_gathered(parameter: Any, dtype: torch.dtype, *, fsdp: bool) -> Tensor:
    """What a unit computes with, without values; to be called within a fake mode."""
    mesh, dims = parameter.device_mesh, tensor_parallel_dims(parameter, fsdp=fsdp)
    shape = gathered_shape(parameter) if fsdp else tuple(inner_tensor(parameter).shape)
    device = computing_device(parameter)
    local = torch.empty(shape, dtype=dtype, device=device, requires_grad=parameter.requires_grad)
    if not dims:
        return local
    return type(parameter).from_local(
        local,
        mesh[tuple(mesh.mesh_dim_names[d] for d in dims)] if fsdp else mesh,
        [parameter.placements[d] for d in dims],
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def tensor_parallel_dims(parameter: Any, *, fsdp: bool) -> list[int]:
    """The dimensions of a ``DTensor``'s mesh that are none of FSDP's: all without FSDP, else those behind its cut."""
    cut = [i for i, p in enumerate(parameter.placements) if _is_cut(p)]
    if fsdp and not cut:  # replicated by FSDP
        return []
    return list(range(cut[0] + 1 if fsdp else 0, len(parameter.placements)))


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a parameter is cut, first by tensor parallelism and what is left of it by FSDP2, into rows.

    Of a mesh without FSDP2 the first dimension that cuts stands in its place; nobody asks for sums over it.

    Attributes:
        offset: where what lies here begins in the parameter, by dimension.
        here: its shape.
        gathered: the shape of what FSDP cuts.
        world: over how many ranks FSDP cuts it.
        rows: how many rows each of them has; the last ones fewer or none.
        shards: FSDP's group; None if the parameter is not cut.
        replicas: the groups of replicas.
        fsdp_dim: the dimension that FSDP cuts; None if the parameter is not cut.
    """

    offset: tuple[int, ...]
    here: tuple[int, ...]
    gathered: tuple[int, ...]
    world: int
    rows: int
    shards: Any
    replicas: tuple[Any, ...]
    fsdp_dim: int | None


def _is_cut(placement: Any) -> bool:
    return type(placement).__name__ in ("Shard", "_StridedShard")


def _layout(parameter: Any) -> _Layout:
    mesh, placements = parameter.device_mesh, parameter.placements
    cut = [i for i, p in enumerate(placements) if _is_cut(p)]
    sizes = [mesh.size(i) for i in range(mesh.ndim)]
    if not any(_is_understood(placements, sizes, fsdp=fsdp) for fsdp in (True, False)):
        raise _not_understood(parameter)
    offset, here = [0] * parameter.ndim, list(parameter.shape)
    gathered, rows = list(here), here[0] if here else 1
    for i in reversed(cut):  # tensor parallelism cuts first, and stands behind
        dim, ranks, rank = placements[i].dim, mesh.size(i), mesh.get_local_rank(i)
        gathered, rows = list(here), -(-here[dim] // ranks)
        if i != cut[0] and here[dim] % ranks:
            raise UnsupportedGraphError(
                f"dimension {dim} of a parameter of shape {list(parameter.shape)} does not divide by the {ranks} "
                "ranks of tensor parallelism",
                remedy="choose sizes that do",
            )
        begin = min(rank * rows, here[dim])
        offset[dim] += begin
        here[dim] = min(rows, here[dim] - begin)
    if tuple(inner_tensor(parameter).shape) != tuple(here):
        raise UnsupportedGraphError(
            f"this rank holds {list(inner_tensor(parameter).shape)} of a parameter of shape {list(parameter.shape)}, "
            f"where equal parts give {here}",
            remedy="shard with torch.distributed.fsdp.fully_shard, after parallelize_module",
        )
    first = cut[0] if cut else mesh.ndim
    replicas = tuple(mesh.get_group(i) for i in range(first))
    found = tuple(offset), tuple(here), tuple(gathered)
    if not cut:
        return _Layout(*found, 1, rows, None, replicas, None)
    return _Layout(*found, mesh.size(first), rows, mesh.get_group(first), replicas, placements[first].dim)


def _not_understood(parameter: Any) -> UnsupportedGraphError:
    return UnsupportedGraphError(
        f"a parameter of shape {list(parameter.shape)} has the placements {tuple(parameter.placements)} on its mesh",
        remedy="shard along dimension 0 of the parameters (fully_shard's default), on a mesh of (replicas, shards, "
        "those of parallelize_module, up to two), of which the first and the last may be missing",
    )


def _is_understood(placements: Sequence[Any], sizes: Sequence[int], *, fsdp: bool) -> bool:
    """Replicas, FSDP2's shards, and up to two dimensions behind; twice the same dimension only as FSDP2 cuts it."""
    cut = [i for i, p in enumerate(placements) if _is_cut(p)]
    if not all(_is_cut(p) or type(p).__name__ == "Replicate" for p in placements):
        return False
    first = cut[0] if fsdp and cut else -1
    if first > 1 or len(placements) - first - 1 > 2 or (fsdp and not cut and len(placements) > 1):
        return False
    behind = [i for i in cut if i > first]
    dims = [placements[i].dim for i in behind]
    strided = [i for i in cut if type(placements[i]).__name__ == "_StridedShard"]
    if len(set(dims)) < len(dims) or (first >= 0 and behind and placements[first].dim != 0):
        return False
    if first < 0 or 0 not in dims:
        return not strided
    return strided == [first] and placements[first].split_factor == sizes[behind[dims.index(0)]]


def _runs(whole: tuple[int, ...], offset: tuple[int, ...], here: tuple[int, ...]) -> list[tuple[int, int]]:
    if 0 in here:
        return []
    split = max((d for d in range(len(whole)) if here[d] != whole[d]), default=0)
    strides = [1] * len(whole)
    for d in reversed(range(len(whole) - 1)):
        strides[d] = strides[d + 1] * whole[d + 1]
    length = 1
    for d in range(split, len(here)):
        length *= here[d]
    starts = [offset[split] * strides[split] if whole else 0]
    for d in reversed(range(split)):
        starts = [(offset[d] + i) * strides[d] + s for i in range(here[d]) for s in starts]
    return [(start, length) for start in starts]


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
            size, device = torch.Size(layout.here), inner_tensor(parameter).device
            part = self.received[at : at + size.numel()].view(size)
            found.append(part.clone() if part.device == device else part.to(device))
            at += layout.rows * torch.Size(layout.gathered[1:]).numel()
        return found


def reduce_sums(parameters: Sequence[Tensor], sums: Sequence[Tensor]) -> Pending:
    """Start to add up clipped sums over the ranks, in one reduce-scatter for all parameters of a unit.

    Args:
        parameters: sharded over the same ranks.
        sums: of this rank's examples, of the shapes of :func:`gathered_shape`, float32 or wider, all of one dtype.

    The bytes are those of FSDP2's own reduction: every parameter padded to equal rows on all ranks.
    """
    layouts = [_layout(p) for p in parameters]
    world = layouts[0].world
    parts = []
    for total, layout in zip(sums, layouts, strict=True):
        assert tuple(total.shape) == layout.gathered, (total.shape, layout)
        missing = layout.rows * world - total.shape[0]
        padded = torch.cat([total, total.new_zeros((missing, *total.shape[1:]))]) if missing else total
        parts.append(padded.reshape(world, -1))
    sent = torch.cat(parts, 1)
    if layouts[0].shards is None or world == 1:
        return Pending(parameters, layouts, sent.view(-1), None, None)
    received = sent.new_empty(sent.shape[1])
    work = _reduce_scatter(received, sent.view(-1), group=layouts[0].shards, async_op=True)
    return Pending(parameters, layouts, received, work, sent)
