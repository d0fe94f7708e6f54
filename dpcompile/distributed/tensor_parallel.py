"""Tensor and context parallelism: which parameters are cut over which ranks, and the norms that these have together.

The ranks that share a batch are a mesh of one dimension or two (tensor parallelism along one, context parallelism along
the other). Along each a parameter is cut or whole, by itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpcompile._torch.tensors import real_tensors
from dpcompile.distributed.ranks import differ_along, gathered_over, rank, world_size
from dpcompile.distributed.shards import check_layout, is_distributed, local_part, tensor_parallel_dims
from dpcompile.errors import PrivacyError, UnsupportedGraphError

__all__ = ["Axis", "Compared", "NormsOverRanks", "TensorParallel", "check_copies", "find_tensor_parallel"]

_AXES = 2  # what is tested, and what fully_shard takes
_PIECES = 4  # of the fingerprint; each is a number small enough to be added up exactly in float32
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of the mesh of ranks that share the work on the same examples.

    Attributes:
        group: of the ranks that differ along it, of ``torch.distributed``.
        name: of the group, as graphs have it.
        size: how many ranks it has.
        label: of the dimension; "" if the mesh has no other.
        cut: names of the parameters of which every one of them holds another part; of all others each holds all (or,
            under FSDP, the same shard).
    """

    group: Any
    name: str
    size: int
    label: str
    cut: frozenset[str]


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """The ranks that share the work on the same examples.

    Attributes:
        axes: the dimensions of their mesh.
        everyone: all of them.
        data_ranks: how many such meshes there are; each has its own examples.
    """

    axes: tuple[Axis, ...]
    everyone: frozenset[int]
    data_ranks: int

    @property
    def groups(self) -> list[Any]:
        """Of the dimensions."""
        return [axis.group for axis in self.axes]

    def along(self, mesh: Any) -> tuple[str, ...] | None:
        """Labels of the dimensions that a ``DeviceMesh`` has; None if it has others."""
        own = {axis.name: axis.label for axis in self.axes}
        names = [mesh.get_group(i).group_name for i in range(mesh.ndim)]
        return tuple(own[n] for n in names) if own.keys() >= set(names) else None


def find_tensor_parallel(
    parameters: Mapping[str, nn.Parameter], *, fsdp: bool, stages: int = 1
) -> TensorParallel | None:
    """What ``parallelize_module`` and ``distribute_tensor`` did to a model; None if nothing. Every rank calls this.

    Args:
        parameters: of the model.
        fsdp: whether it is under ``fully_shard``.
        stages: over how many ranks the pipeline lies, if it is a stage of one.

    Raises:
        UnsupportedGraphError: placements or meshes that are not understood here.
    """
    axes: dict[str, Axis] = {}
    for name, parameter in parameters.items():
        if not is_distributed(parameter):
            continue
        distributed: Any = parameter
        mesh, placements = distributed.device_mesh, distributed.placements
        for dim in tensor_parallel_dims(distributed, fsdp=fsdp):
            kind = type(placements[dim]).__name__
            if kind not in ("Shard", "Replicate"):
                raise UnsupportedGraphError(
                    f"parameter '{name}' has the placement {placements[dim]} over the ranks of tensor parallelism",
                    remedy="use ColwiseParallel and RowwiseParallel",
                )
            group = mesh.get_group(dim)
            axis = axes.get(group.group_name)
            if axis is None:
                label = mesh.mesh_dim_names[dim] if mesh.mesh_dim_names else f"dimension {dim}"
                axis = Axis(group, group.group_name, mesh.size(dim), label, frozenset())
            if kind == "Shard":
                _check_even(name, distributed, placements[dim].dim, mesh.size(dim))
                axis = replace(axis, cut=axis.cut | {name})
            axes[axis.name] = axis
        if parameter.requires_grad:
            check_layout(parameter, fsdp=fsdp)
    if not axes:
        return None
    found = [replace(axis, label="") for axis in axes.values()] if len(axes) == 1 else list(axes.values())
    everyone = _mesh_of(found)
    if not fsdp and len(everyone) * stages != world_size():
        raise UnsupportedGraphError(
            f"tensor parallelism over {len(everyone)} of {world_size()} ranks: the others would train by themselves, "
            "with the same noise",
            remedy="use all ranks for it, or call fully_shard too, on the other dimension of the mesh",
        )
    return TensorParallel(tuple(found), everyone, world_size() // (len(everyone) * stages))


def _mesh_of(axes: Sequence[Axis]) -> frozenset[int]:
    """The ranks of the mesh that has these dimensions.

    Raises:
        UnsupportedGraphError: they are not those of one mesh, or too many.
    """
    if len(axes) == 1:
        return frozenset(dist.get_process_group_ranks(axes[0].group))
    groups = [axis.group for axis in axes]
    everyone = frozenset(gathered_over(groups, rank()))
    alike = len(set(gathered_over(groups, everyone))) == 1
    if not alike or len(everyone) != prod(axis.size for axis in axes) or len(axes) > _AXES:
        raise UnsupportedGraphError(
            f"parameters lie over {len(axes)} groups of ranks, {', '.join(axis.label for axis in axes)}, which are not "
            f"the dimensions of one mesh of up to {_AXES}",
            remedy="use one mesh for all parallelize_module; where tokens are cut too, a mesh of two dimensions for "
            "both: distribute_tensor(p, mesh['cp', 'tp'], [Replicate(), Shard(0)])",
        )
    return everyone


def _check_even(name: str, parameter: Any, dim: int, ranks: int) -> None:
    if parameter.shape[dim] % ranks:
        raise UnsupportedGraphError(
            f"dimension {dim} of parameter '{name}', {parameter.shape[dim]}, does not divide by the {ranks} ranks of "
            "tensor parallelism",
            remedy="choose sizes that do",
        )


@dataclass(frozen=True, slots=True)
class NormsOverRanks:
    """Adds up squared norms over the ranks that share a batch, in one all-reduce along each dimension of their mesh.

    Attributes:
        parallel: the ranks.
        inputs: int64 ``[]``, a fingerprint of this rank's examples and of the mask.
    """

    parallel: TensorParallel
    inputs: Tensor

    @classmethod
    def of(cls, parallel: TensorParallel, examples: Sequence[Tensor]) -> NormsOverRanks:
        """For a forward on these examples."""
        return cls(parallel, fingerprint(examples))

    def add(self, groups: Sequence[Mapping[str, Tensor]], like: Tensor) -> list[Tensor]:
        """Squared norms of whole gradients, of each clip group.

        Along each dimension those of parameters of which every rank holds another part add up; those of parameters
        that every rank holds are equal on all ranks, and count once.

        Args:
            groups: parameter -> ``[B]``, for each clip group.
            like: ``[B]``.

        **Guarantee.** Every rank returns the same numbers, those of the gradients of all ranks together, or an error
        is raised on all.

        ================================================  =========================================================
        edge case                                         outcome
        ================================================  =========================================================
        ranks were given other examples, or other masks   PrivacyError
        copies of a parameter whose gradients differ      PrivacyError, beyond what rounding explains
        an example that is not finite on one rank         not finite on all
        ================================================  =========================================================
        """
        axes = self.parallel.axes
        dtype = reduce(torch.promote_types, (t.dtype for rows in groups for t in rows.values()), like.dtype)
        squared: dict[tuple[bool, ...], Tensor] = {}  # along which dimensions cut -> [groups, B]
        for kind in product((True, False), repeat=len(axes)):
            own = [[r for n, r in rows.items() if tuple(n in axis.cut for axis in axes) == kind] for rows in groups]
            squared[kind] = torch.stack([_sum(rows, like).to(dtype) for rows in own])
        faults: Tensor | None = None
        for axis in axes:
            squared, faults = self._add_along(axis, squared, faults)
        assert faults is not None
        inputs, copies = faults.tolist()
        if inputs:
            raise PrivacyError(
                "the ranks of tensor parallelism were given different examples, or different padding: they work on one "
                "batch together",
                remedy="give all of them the same batch; PoissonLoader(rank=..., world_size=...) counts the groups, "
                "not the ranks in them, and all ranks take one seed",
            )
        if copies:
            raise PrivacyError(
                "parameters that every rank of tensor parallelism holds whole have other gradients on other ranks",
                remedy="start all ranks from the same weights (torch.manual_seed, or broadcast them), and compute the "
                "same loss on all",
            )
        return list(squared[()].unbind())

    def _add_along(
        self, axis: Axis, squared: Mapping[tuple[bool, ...], Tensor], faults: Tensor | None
    ) -> tuple[dict[tuple[bool, ...], Tensor], Tensor]:
        """What the ranks along a dimension have together, by how it is cut along the ones that follow.

        Args:
            axis: the dimension.
            squared: see :meth:`add`, from this dimension on.
            faults: other inputs, other gradients of copies: what was found along the dimensions before, on this rank.
        """
        n, kinds = axis.size, sorted(squared, reverse=True)  # cut along it first
        own = torch.stack([squared[kind] for kind in kinds])
        pieces = _small_numbers(self.inputs, n).to(own.device)
        before = own.new_zeros(0) if faults is None else faults.to(own)
        sent = torch.cat([own.reshape(-1), pieces.to(own.dtype), pieces.square().to(own.dtype), before])
        dist.all_reduce(sent, group=axis.group)
        numbers, told = sent[own.numel() :].split([2 * _PIECES, len(before)])
        sums, squares = numbers.to(torch.float64).reshape(2, -1)
        both, rows = sent[: own.numel()].reshape(own.shape), len(kinds) // 2
        mean = both[rows:] / n
        differ = (mean - own[rows:]).abs() > _TOLERANCE * mean
        wrong = torch.stack([(n * squares != sums.square()).any(), (differ & torch.isfinite(mean)).any()])
        if faults is not None:
            wrong |= told > 0
        return {kind[1:]: both[i] + mean[i] for i, kind in enumerate(kinds[:rows])}, wrong


class Compared:
    """Along which dimensions of the mesh tensors are the same on all ranks; each is compared once."""

    def __init__(self, parallel: TensorParallel) -> None:
        self._parallel = parallel
        self._known: dict[int, tuple[weakref.ref[Tensor], frozenset[str]]] = {}

    def same(self, tensor: Tensor) -> frozenset[str]:
        """The dimensions, by label, along which all ranks hold the same; the first time every rank must ask."""
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        parallel = self._parallel
        with real_tensors():
            own = (str(tensor.dtype), tuple(tensor.shape), int(fingerprint([tensor])))
            differ = differ_along(parallel.groups, gathered_over(parallel.groups, own))
        answer = frozenset(axis.label for axis, other in zip(parallel.axes, differ, strict=True) if not other)
        self._known[id(tensor)] = (weakref.ref(tensor), answer)
        return answer


def check_copies(module: nn.Module, parallel: TensorParallel) -> None:
    """Compare over the ranks what each of them holds a copy of; every rank must call this.

    Raises:
        PrivacyError: naming a parameter that is not the same on all ranks.
    """
    own = {n: int(fingerprint([local_part(p)])) for n, p in module.named_parameters()}
    everywhere = gathered_over(parallel.groups, own)
    for name in own:
        differ = differ_along(parallel.groups, [e[name] for e in everywhere])
        if any(other and name not in axis.cut for axis, other in zip(parallel.axes, differ, strict=True)):
            raise PrivacyError(
                f"the ranks of tensor parallelism hold other values of parameter '{name}', of which each has a copy",
                remedy="start all of them from the same weights: torch.manual_seed with one seed, or broadcast them",
            )


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """int64 ``[]`` that differs, but for one case in 2**64, where tensors differ."""
    found = None
    for tensor in tensors:
        value = tensor.detach().contiguous().reshape(-1)
        value = torch.view_as_real(value).reshape(-1) if value.is_complex() else value
        whole = value.view(_INTEGERS[value.element_size()]).to(torch.int64)
        place = torch.arange(1, whole.numel() + 1, device=whole.device, dtype=torch.int64)
        mixed = _mix(whole + _mix(place)).sum()
        found = mixed if found is None else _mix(_mix(found) + mixed)
    assert found is not None
    return found


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _mix(value: Tensor) -> Tensor:
    """Spread every bit over all (SplitMix64's finaliser, Steele et al. 2014), modulo 2**64."""
    value = (value ^ _shifted(value, 30)) * -0x40A7B892E31B1A47
    value = (value ^ _shifted(value, 27)) * -0x6B2FB644ECCEEE15
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _small_numbers(value: Tensor, ranks: int) -> Tensor:
    """A few bits of a fingerprint at a time, so few that sums of squares are exact in float32."""
    bits = (24 - (ranks - 1).bit_length()) // 2
    shifts = torch.arange(_PIECES, device=value.device) * bits
    return ((value >> shifts) & ((1 << bits) - 1)).to(torch.float64)


def _sum(members: Sequence[Tensor], like: Tensor) -> Tensor:
    return sum(members[1:], start=members[0]) if members else torch.zeros_like(like)
