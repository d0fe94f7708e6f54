"""Models under FSDP2: what is refused, and the clipped sums' way to the shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dpcompile._torch.parallel import clear_interrupted, forward_hooks, is_fsdp_hook
from dpcompile.distributed.ranks import refuse_some
from dpcompile.distributed.shards import (
    Pending,
    check_layout,
    computing_device,
    gathered_shape,
    is_distributed,
    reduce_sums,
)
from dpcompile.errors import UnsupportedGraphError
from dpcompile.regions.units import Unit

__all__ = ["ShardedSums", "add_up", "check_sharded", "clear_failed"]


def check_sharded(root: Unit, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise UnsupportedGraphError unless FSDP2 holds every trainable parameter in a way that is understood here."""
    for name, parameter in parameters.items():
        if parameter.requires_grad and not is_distributed(parameter):
            raise UnsupportedGraphError(
                f"the trainable parameter '{name}' is outside FSDP: every rank would add its own gradient to it",
                remedy="call fully_shard on the model itself too, without ignored_params, or freeze the parameter",
            )
        if parameter.requires_grad:
            check_layout(parameter, fsdp=True)
    meshes = [cast(Any, p).device_mesh.size() for p in parameters.values() if p.requires_grad]
    if meshes:
        refuse_some("FSDP shards the model", max(meshes))
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


class ShardedSums:
    """Clipped sums of sharded parameters: added up over the ranks, unit by unit.

    A unit's reduction starts when all its regions have their sums, and runs while those of the next are computed; two
    at most are under way. Every rank reduces every trainable parameter, also one that no backward of its own reached,
    in the same order.
    """

    def __init__(self, root: Unit, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._own = {unit.path: _own(unit, parameters) for unit in _all(root)}
        self._left: Counter[str] = Counter()
        self._gathered: dict[str, dict[str, Tensor]] = {}
        self._pending: list[tuple[list[str], Pending]] = []
        self._done: list[tuple[str, Tensor]] = []

    def expect(self, unit: str) -> None:
        """A region of this unit ran forward."""
        self._left[unit] += 1

    def add(self, unit: str, sums: Sequence[tuple[str, Tensor]]) -> None:
        """The clipped sums of a region of this unit, of the examples of this rank; those of one parameter add up."""
        assert all(name in self._own.get(unit, ()) for name, _ in sums), (unit, [name for name, _ in sums])
        add_up(self._gathered.setdefault(unit, {}), sums)
        self._left[unit] -= 1
        if not self._left[unit]:
            self._reduce(unit)

    def finish(self) -> list[tuple[str, Tensor]]:
        """``(parameter name, local part of the sum over all ranks)``."""
        for unit in list(self._own):
            self._reduce(unit)
        self._wait()
        return self._done

    def _reduce(self, unit: str) -> None:
        started = _start(self._own.pop(unit), self._parameters, self._gathered.pop(unit, {}))
        self._wait()
        self._pending = started

    def _wait(self) -> None:
        for names, reduction in self._pending:
            self._done += zip(names, reduction.wait(), strict=True)
        self._pending = []


def add_up(totals: dict[str, Tensor], sums: Iterable[tuple[str, Tensor]]) -> None:
    """Add sums into totals by name: a parameter may have some from several regions."""
    for name, value in sums:
        totals[name] = totals[name] + value if name in totals else value


def _start(
    names: Sequence[str], parameters: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor]
) -> list[tuple[list[str], Pending]]:
    groups: dict[torch.dtype, list[str]] = {}
    for name in names:
        groups.setdefault(torch.promote_types(parameters[name].dtype, torch.float32), []).append(name)
    started = []
    for dtype, members in groups.items():
        own = [parameters[n] for n in members]
        whole = [
            sums[n] if n in sums else torch.zeros(gathered_shape(p), dtype=dtype, device=computing_device(p))
            for n, p in zip(members, own, strict=True)
        ]
        started.append((members, reduce_sums(own, whole)))
    return started


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
