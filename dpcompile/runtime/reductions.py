"""Sums over replicas: of floating-point numbers, or exactly, of integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpcompile.errors import PrivacyError
from dpcompile.noise.grid import LARGEST, ROUNDINGS, to_grid, within

__all__ = ["add_up", "add_up_exactly"]

_BUCKET = 2**23  # elements that are sent at once


def add_up(sums: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Sums over all ranks of a group; every rank must call this with the same shapes, in the same order.

    Args:
        sums: of this rank's examples, float32 or wider.
        group: the replicas.
    """
    return _reduced(sums, [torch.cat([s.reshape(-1) for s in members]) for members in _buckets(sums)], group)


def add_up_exactly(sums: Sequence[Tensor], group: Any, grid: float) -> list[Tensor]:
    """The same on a grid, as float64: whole multiples of it, each a sum of one multiple a rank, without error.

    Args:
        sums: see :func:`add_up`; each is rounded to the grid here, once.
        group: the replicas, :data:`dpcompile.noise.grid.ROUNDINGS` at most.
        grid: a power of two.

    Raises:
        PrivacyError: on all ranks, if one has a sum that is not finite, or so large that the sum of all might not fit.

    **Guarantee.** Integers of at most ``LARGEST / ranks`` are added up as int64, in whatever order: no partial sum is
    above LARGEST, and float64 holds that.
    """
    world = dist.get_world_size(group)
    if world > ROUNDINGS:
        raise PrivacyError(
            f"exact sums over {world} replicas: noise is for sums that are rounded {ROUNDINGS} times at most",
            remedy="use fewer replicas, or leave exact=True out",
        )
    largest, flat, misfits = LARGEST // world, [], []
    for members in _buckets(sums):
        units = torch.cat([to_grid(s.reshape(-1), grid) for s in members])
        misfits.append(~within(units, largest))
        flat.append(units.nan_to_num(0.0).clamp(-largest, largest).to(torch.int64))
    misfit = torch.stack([m.to(flat[0].device) for m in misfits]).any().long()
    dist.all_reduce(misfit, group=group)
    if misfit.item():
        raise PrivacyError(
            f"a clipped sum of one of {world} ranks is not finite, or larger than {largest * grid:g}, where its grid "
            "ends",
            remedy="if so many examples are in a step, take a grid of fewer bits: ExactMechanism(..., bits=...) as "
            "DPOptimizer(mechanism=...); a sum that is not finite has not been clipped",
        )
    return [units.double() * grid for units in _reduced(sums, flat, group)]


def _reduced(sums: Sequence[Tensor], flat: Sequence[Tensor], group: Any) -> list[Tensor]:
    """What lies flat in buckets, added up, in the shapes of the sums."""
    found: list[Tensor] = []
    pending = [dist.all_reduce(one, group=group, async_op=True) for one in flat]
    for members, one, work in zip(_buckets(sums), flat, pending, strict=True):
        if work is not None:
            work.wait()
        parts = one.split([s.numel() for s in members])
        found += [part.view(s.shape) for part, s in zip(parts, members, strict=True)]
    return found


def _buckets(sums: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype and device."""
    buckets: list[list[Tensor]] = []
    size = 0
    for tensor in sums:
        last = buckets[-1][-1] if buckets else None
        alike = last is not None and (last.dtype, last.device) == (tensor.dtype, tensor.device)
        if not alike or size + tensor.numel() > _BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel()
    return buckets
