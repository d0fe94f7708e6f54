"""Whether two ways to the same numbers agree up to rounding, and which operations may be at fault if not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile.graph.operations import operation_name
from dpcompile.kernels.rounding import FMA, products_on

__all__ = ["described", "distance", "largest", "norms_scale", "scale_of", "suspects", "tolerances"]

_ALLOWED = ((1e-12, 1e-8), (2e-7, 3e-4), (2e-3, 1e-2), (1e-2, 3e-2))  # epsilon of the dtype up to -> allowed
_SMALL = 1e-3  # of the largest gradient: what is smaller is compared with this


def tolerances(graph: fx.Graph, exact: Collection[str]) -> list[float]:
    """How far each output of a graph may be off, relative to its scale: from the narrowest dtype that it came through.

    Args:
        graph: with fake values.
        exact: names of placeholders whose dtype says nothing, as they hold small integers.
    """
    epsilon: dict[fx.Node, float] = {}
    for node in graph.nodes:
        own = max((_epsilon(v) for v in _tensors(node.meta.get("val"))), default=0.0)
        own = 0.0 if node.op == "placeholder" and node.name in exact else own
        floats = any(v.is_floating_point() or v.is_complex() for v in _tensors(node.meta.get("val")))
        passed_on = [epsilon[n] for n in node.all_input_nodes] if floats or node.op == "output" else []
        epsilon[node] = max([own, *passed_on])
    outputs: Sequence[Any] = graph.output_node().args[0]  # type: ignore[assignment]
    return [_allowed(epsilon[n]) if isinstance(n, fx.Node) else 0.0 for n in outputs]


def scale_of(wanted: Tensor, largest: float = 0.0) -> Tensor:
    """What a difference from these values is divided by: the largest of them, or a part of the largest gradient."""
    magnitude = _real(wanted).abs()
    finite = magnitude[torch.isfinite(magnitude)]
    own = finite.max() if finite.numel() else magnitude.new_zeros(())
    return own.clamp_min(max(_SMALL * largest, torch.finfo(own.dtype).tiny))


def norms_scale(wanted: Tensor) -> Tensor:
    """The same for norms ``[B]``, or for squared norms ``[parameters, B]``: every example for itself."""
    usual = torch.where(torch.isfinite(wanted), wanted, torch.zeros_like(wanted)).abs()
    if wanted.ndim == 1:
        floor = _SMALL * usual.max() if usual.numel() else usual.new_zeros(())
    else:
        total = usual.sum(0)
        floor = _SMALL**2 * torch.maximum(total, _SMALL**2 * total.max() if total.numel() else total)
    return torch.maximum(usual, floor.expand_as(usual)).clamp_min(torch.finfo(usual.dtype).tiny)


def distance(found: Tensor, wanted: Tensor, scale: Tensor) -> float:
    """The largest difference over its scale; infinite where one of the two is finite and the other is not."""
    a, b = _real(found), _real(wanted)
    if not b.numel():
        return 0.0
    finite = torch.isfinite(b)
    if a.shape != b.shape or not torch.equal(finite, torch.isfinite(a)):
        return float("inf")
    difference = torch.where(finite, (a - b).abs() / scale, torch.zeros_like(b))
    return float(difference.max())


def suspects(wrong: Collection[fx.Node], right: Collection[fx.Node]) -> list[fx.Node]:
    """Operations that every wrong output comes from and no right one does, in the order in which they run.

    Views apart; those that are not pointwise first: it is there that compilers err.
    """
    common: set[fx.Node] | None = None
    for node in wrong:
        own = _ancestors([node])
        common = own if common is None else common & own
    left = (common or set()) - _ancestors(right)
    graph = next(iter(wrong)).graph
    calls = [n for n in graph.nodes if n in left and n.op == "call_function" and n.all_input_nodes and not _is_view(n)]
    telling = [n for n in calls if torch.Tag.pointwise not in getattr(n.target, "tags", ())]
    return telling or calls


def described(nodes: Sequence[fx.Node]) -> str:
    """The names of some operations, each once: the first few."""
    names = list(dict.fromkeys(operation_name(n.target) for n in nodes))
    return ", ".join(f"`{n}`" for n in names[:6]) + (", .." if len(names) > 6 else "")


def largest(values: Mapping[int, Tensor]) -> float:
    """The largest finite magnitude among these tensors."""
    return max((float(scale_of(v)) for v in values.values() if v.numel()), default=0.0)


def _ancestors(nodes: Collection[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(r.alias_info is not None for r in schema.returns)


def _real(value: Tensor) -> Tensor:
    value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def _epsilon(value: Tensor) -> float:
    if not (value.is_floating_point() or value.is_complex()):
        return 0.0
    narrow = value.dtype in (torch.float32, torch.complex64) and products_on(value.device) != FMA
    return 2.0**-10 if narrow else torch.finfo(value.dtype).eps


def _allowed(epsilon: float) -> float:
    return next((allowed for bound, allowed in _ALLOWED if epsilon <= bound), 0.2)
