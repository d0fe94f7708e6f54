"""Tensor parallelism: which parameters are cut over which ranks, and the norms that these ranks have together."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpcompile._torch.tensors import real_tensors
from dpcompile.distributed.ranks import world_size
from dpcompile.distributed.shards import check_layout, is_distributed, local_part, tensor_parallel_dims
from dpcompile.errors import PrivacyError, UnsupportedGraphError

__all__ = ["Compared", "NormsOverRanks", "TensorParallel", "check_copies", "find_tensor_parallel"]

_PIECES = 4  # of the fingerprint; each is a number small enough to be added up exactly in float32
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """One group of ranks that share the work on the same examples.

    Attributes:
        group: of ``torch.distributed``.
        name: of the group, as graphs have it.
        size: how many ranks it has.
        cut: names of the parameters of which every one of them holds another part; of all others each holds all (or,
            under FSDP, the same shard).
        data_ranks: how many such groups there are; each has its own examples.
    """

    group: Any
    name: str
    size: int
    cut: frozenset[str]
    data_ranks: int


def find_tensor_parallel(
    parameters: Mapping[str, nn.Parameter], *, fsdp: bool, stages: int = 1
) -> TensorParallel | None:
    """What ``parallelize_module`` did to a model; None if nothing.

    Args:
        parameters: of the model.
        fsdp: whether it is under ``fully_shard``.
        stages: over how many ranks the pipeline lies, if it is a stage of one.

    Raises:
        UnsupportedGraphError: placements or meshes that are not understood here.
    """
    groups: dict[str, Any] = {}
    cut = set()
    for name, parameter in parameters.items():
        if not is_distributed(parameter):
            continue
        distributed: Any = parameter
        mesh, placements = distributed.device_mesh, distributed.placements
        if not fsdp and mesh.ndim != 1:
            raise UnsupportedGraphError(
                f"parameter '{name}' lies on a mesh of {mesh.ndim} dimensions, {tuple(placements)}, without FSDP",
                remedy="call parallelize_module with a mesh of one dimension, such as mesh['tp'], and fully_shard with "
                "the other",
            )
        for dim in tensor_parallel_dims(distributed, fsdp=fsdp):
            kind = type(placements[dim]).__name__
            if kind not in ("Shard", "Replicate"):
                raise UnsupportedGraphError(
                    f"parameter '{name}' has the placement {placements[dim]} over the ranks of tensor parallelism",
                    remedy="use ColwiseParallel and RowwiseParallel",
                )
            if kind == "Shard":
                _check_even(name, distributed, placements[dim].dim, mesh.size(dim))
                cut.add(name)
            group = mesh.get_group(dim)
            groups[group.group_name] = group
        if parameter.requires_grad:
            check_layout(parameter, fsdp=fsdp)
    if not groups:
        return None
    if len(groups) > 1:
        raise UnsupportedGraphError(
            f"parameters are cut over {len(groups)} groups of ranks", remedy="use one mesh for all parallelize_module"
        )
    ((name, group),) = groups.items()
    size = dist.get_world_size(group)
    if not fsdp and size * stages != world_size():
        raise UnsupportedGraphError(
            f"tensor parallelism over {size} of {world_size()} ranks: the others would train by themselves, with the "
            "same noise",
            remedy="use all ranks for it, or call fully_shard too, on the other dimension of the mesh",
        )
    return TensorParallel(group, name, size, frozenset(cut), world_size() // (size * stages))


def _check_even(name: str, parameter: Any, dim: int, ranks: int) -> None:
    if parameter.shape[dim] % ranks:
        raise UnsupportedGraphError(
            f"dimension {dim} of parameter '{name}', {parameter.shape[dim]}, does not divide by the {ranks} ranks of "
            "tensor parallelism",
            remedy="choose sizes that do",
        )


@dataclass(frozen=True, slots=True)
class NormsOverRanks:
    """Adds up squared norms over the ranks of tensor parallelism, in one all-reduce.

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

    def add(self, cut: Sequence[Tensor], copied: Sequence[Tensor]) -> list[Tensor]:
        """Squared norms of whole gradients.

        Args:
            cut: ``[B]`` each, over parameters of which every rank holds another part: these add up.
            copied: the same, over parameters that every rank holds: these are equal on all ranks, and count once.

        **Guarantee.** Every rank returns the same numbers, those of the gradients of all ranks together, or an error
        is raised on every rank that can see it.

        ================================================  =========================================================
        edge case                                         outcome
        ================================================  =========================================================
        ranks were given other examples, or other masks   PrivacyError
        copies of a parameter whose gradients differ      PrivacyError, beyond what rounding explains
        an example that is not finite on one rank         not finite on all
        ================================================  =========================================================
        """
        n, rows = self.parallel.size, len(cut)
        dtype = reduce(torch.promote_types, (t.dtype for t in (*cut, *copied)))
        own = torch.stack([t.to(dtype) for t in (*cut, *copied)])
        pieces = _small_numbers(self.inputs, n).to(own.device)
        sent = torch.cat([own.reshape(-1), pieces.to(own.dtype), pieces.square().to(own.dtype)])
        dist.all_reduce(sent, group=self.parallel.group)
        sums, squares = sent[own.numel() :].to(torch.float64).reshape(2, -1)
        both = sent[: own.numel()].reshape(own.shape)
        mean = both[rows:] / n
        differ = (mean - own[rows:]).abs() > _TOLERANCE * mean
        same = torch.stack([(n * squares == sums.square()).all(), ~(differ & torch.isfinite(mean)).any()])
        inputs, copies = same.tolist()
        if not inputs:
            raise PrivacyError(
                "the ranks of tensor parallelism were given different examples, or different padding: they work on one "
                "batch together",
                remedy="give all of them the same batch; PoissonLoader(rank=..., world_size=...) counts the groups, "
                "not the ranks in them, and all ranks take one seed",
            )
        if not copies:
            raise PrivacyError(
                "parameters that every rank of tensor parallelism holds whole have other gradients on other ranks",
                remedy="start all ranks from the same weights (torch.manual_seed, or broadcast them), and compute the "
                "same loss on all",
            )
        return list((both[:rows] + mean).unbind())


class Compared:
    """Which tensors are the same on all ranks; each is compared once."""

    def __init__(self, parallel: TensorParallel) -> None:
        self._parallel = parallel
        self._known: dict[int, tuple[weakref.ref[Tensor], bool]] = {}

    def same(self, tensor: Tensor) -> bool:
        """Whether all ranks hold the same; the first time every rank must ask."""
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        with real_tensors():
            own = (str(tensor.dtype), tuple(tensor.shape), int(fingerprint([tensor])))
            everywhere: list[Any] = [None] * self._parallel.size
            dist.all_gather_object(everywhere, own, group=self._parallel.group)
        answer = all(e == own for e in everywhere)
        self._known[id(tensor)] = (weakref.ref(tensor), answer)
        return answer


def check_copies(module: nn.Module, parallel: TensorParallel) -> None:
    """Compare over the ranks what each of them holds a copy of; every rank must call this.

    Raises:
        PrivacyError: naming a parameter that is not the same on all ranks.
    """
    held = module.named_parameters()
    own = {n: int(fingerprint([local_part(p)])) for n, p in held if n not in parallel.cut}
    everywhere: list[Any] = [None] * parallel.size
    dist.all_gather_object(everywhere, own, group=parallel.group)
    different = [n for n in own if len({e[n] for e in everywhere}) > 1]
    if different:
        raise PrivacyError(
            f"the ranks of tensor parallelism hold other values of parameter '{different[0]}', of which each has a "
            "copy",
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
