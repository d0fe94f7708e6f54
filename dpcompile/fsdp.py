"""Models under FSDP2: what is refused, and the clipped sums' way to the shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dpcompile.errors import UnsupportedGraphError
from dpcompile.shards import Pending, is_distributed, local_start, reduce_sums
from dpcompile.units import Unit

__all__ = ["add_up", "check_sharded", "reduce_over_ranks"]

Compute = Callable[[], list[tuple[str, Tensor]]]


def check_sharded(root: Unit, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise UnsupportedGraphError unless FSDP2 holds every trainable parameter in a way that is understood here."""
    for name, parameter in parameters.items():
        if parameter.requires_grad and not is_distributed(parameter):
            raise UnsupportedGraphError(
                f"the trainable parameter '{name}' is outside FSDP: every rank would add its own gradient to it",
                remedy="call fully_shard on the model itself too, without ignored_params, or freeze the parameter",
            )
        if parameter.requires_grad:
            local_start(parameter)
    for unit in _all(root):
        hooks = (*unit.module._forward_pre_hooks.values(), *unit.module._forward_hooks.values())
        if unit.sharded and not all(type(getattr(h, "__self__", None)).__name__ == "FSDPState" for h in hooks):
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


def reduce_over_ranks(
    root: Unit, parameters: Mapping[str, nn.Parameter], sums: Sequence[tuple[str, Compute]]
) -> list[tuple[str, Tensor]]:
    """Compute the clipped sums region by region, and add them up over the ranks unit by unit.

    The reduction of a unit runs while the sums of the next are computed. Every rank reduces every trainable parameter,
    also one that no backward of its own reached, in the same order.

    Returns:
        ``(parameter name, local part of the sum over all ranks)``.
    """
    left = Counter(unit for unit, _ in sums)
    gathered: dict[str, dict[str, Tensor]] = {}
    pending: list[tuple[list[str], Pending]] = []
    own = {unit.path: _own(unit, parameters) for unit in _all(root)}
    for unit, compute in sums:
        add_up(gathered.setdefault(unit, {}), compute())
        left[unit] -= 1
        if not left[unit]:
            pending += _start(own.pop(unit), parameters, gathered.pop(unit))
    for names in own.values():
        pending += _start(names, parameters, {})
    return [pair for names, reduction in pending for pair in zip(names, reduction.wait(), strict=True)]


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
            sums[n] if n in sums else torch.zeros(p.shape, dtype=dtype, device=p.device)
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
