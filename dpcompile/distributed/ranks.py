"""What all ranks must have in common: one seed, and one mechanism."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpcompile.errors import PrivacyError, UnsupportedGraphError

__all__ = [
    "any_rank",
    "differ_along",
    "digest",
    "from_first",
    "gathered",
    "gathered_over",
    "rank",
    "refuse_disagreement",
    "refuse_other_place",
    "refuse_some",
    "summed",
    "world_size",
]


def world_size() -> int:
    """How many ranks there are; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def from_first(value: Any) -> Any:
    """The value of rank 0, on every rank; every rank must call this."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, in their order; every rank must call this."""
    if world_size() == 1:
        return [value]
    everywhere: list[Any] = [None] * world_size()
    dist.all_gather_object(everywhere, value)
    return everywhere


def gathered_over(groups: Sequence[Any], value: Any) -> list[Any]:
    """The values of all ranks of a mesh that has these groups along its dimensions; every rank of it must call this.

    Returns:
        In the order of the ranks' places, of which those along the first dimension come one after the other.
    """
    found = [value]
    for group in groups:
        everywhere: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everywhere, found, group=group)
        found = [x for part in everywhere for x in part]
    return found


def differ_along(groups: Sequence[Any], values: Sequence[Any]) -> list[bool]:
    """Along which dimensions of a mesh what :func:`gathered_over` returned is not the same."""
    found, run = [], 1
    for group in groups:
        size = dist.get_world_size(group)
        firsts = [values[i - i // run % size * run] for i in range(len(values))]
        found.append(any(a != b for a, b in zip(values, firsts, strict=True)))
        run *= size
    return found


def summed(value: Tensor) -> Tensor:
    """The sum over all ranks; every rank must call this."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def digest(secret: int) -> str:
    """Tells whether two secrets are the same, and not what they are."""
    return hashlib.sha256(f"dpcompile seed {secret}".encode()).hexdigest()


def any_rank(value: bool) -> bool:
    """Whether it is so on one rank or more; every rank must call this."""
    return any(gathered(value))


def refuse_some(what: str, ranks: int) -> None:
    """Clipped sums are added up over all ranks: over some of them only, the others would train a model of their own.

    Raises:
        UnsupportedGraphError: ``what`` holds fewer than all.
    """
    if ranks != world_size():
        raise UnsupportedGraphError(
            f"{what} over {ranks} of {world_size()} ranks: examples are dealt out to all ranks, and their gradients "
            "would be added up over some",
            remedy="take a mesh, or a process group, of all ranks; start runs that are meant to be separate separately",
        )


def refuse_disagreement(values: Mapping[str, Any]) -> None:
    """Compare values over all ranks; every rank must call this, and all raise if one differs.

    Raises:
        PrivacyError: naming the values that are not the same on all ranks.
    """
    if world_size() == 1:
        return
    everywhere = gathered(dict(values))
    different = [name for name in values if len({repr(v[name]) for v in everywhere}) > 1]
    if different:
        listed = ", ".join(
            name if name == "seed" else f"{name} ({', '.join(repr(v[name]) for v in everywhere)})" for name in different
        )
        raise PrivacyError(
            f"the ranks disagree about {listed}",
            remedy="make model, optimizer and loader with the same arguments on every rank; load the same checkpoint",
        )


def refuse_other_place(place: Sequence[int], device: torch.device, group: Any = None) -> None:
    """Compare where training stands over the ranks of a group; every rank must call this, and all raise.

    Args:
        place: numbers below 2**63, as many on every rank: steps taken, draws, a digest of C and sigma; none: nothing
            is compared.
        device: where collectives work.
        group: None: all ranks.

    Raises:
        PrivacyError: one of the numbers is not the same on all of them.
    """
    if not place:
        return
    ends = torch.tensor([*place, *(-n for n in place)], dtype=torch.int64, device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = ends[: len(place)], -ends[len(place) :]
    if bool((largest != smallest).any()):
        raise PrivacyError(
            "the ranks are at different steps or draws of the loader, or moved C or the noise otherwise: "
            f"this one at {list(place)}, others from {smallest.tolist()} to {largest.tolist()}; their clipped sums do "
            "not belong together",
            remedy="run every batch on every rank: no `continue` or `break` that one rank alone takes (to skip a draw, "
            "agree on it first, with torch.distributed.all_reduce, on a condition that is not private)",
        )
