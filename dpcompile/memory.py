"""How much memory the plain backward needs, for budgets that are a multiple of it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import sympy
import torch
from torch import fx

from dpcompile.joint import JointGraph
from dpcompile.operations import operation_name
from dpcompile.sizes import shape_of

__all__ = ["budget_in_bytes", "peak_bytes"]

_VIEWS = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "alias", "slice",
    "select", "detach", "getitem", "split", "split_with_sizes", "unbind",
}  # fmt: skip


def budget_in_bytes(budget: float | int | None, joint: JointGraph, hints: Mapping[sympy.Symbol, int]) -> float | None:
    """What the norms may add: all of an int budget, or what a float leaves above the plain step's peak."""
    if budget is None:
        return None
    peak = peak_bytes(joint.graph, hints)
    return max((budget * peak if isinstance(budget, float) else budget) - peak, 0)


def peak_bytes(graph: fx.Graph, hints: Mapping[sympy.Symbol, int]) -> float:
    """The largest sum of live values if the graph ran in order, each value freed after its last use.

    Inputs live throughout; views cost nothing.
    """
    last_use: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            last_use[_storage(operand)] = node
    live = peak = 0.0
    dying: dict[fx.Node, list[fx.Node]] = {}
    for owner, user in last_use.items():
        if owner.op != "placeholder":
            dying.setdefault(user, []).append(owner)
    for node in graph.nodes:
        if _storage(node) is node:
            live += _bytes(node, hints)
            peak = max(peak, live)
        live -= sum(_bytes(owner, hints) for owner in dying.get(node, ()))
    return peak


def _storage(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and node.all_input_nodes:
        name = operation_name(node.target)
        if name not in _VIEWS:
            break
        node = node.all_input_nodes[0]
    return node


def _bytes(node: fx.Node, hints: Mapping[sympy.Symbol, int]) -> float:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    total = 0.0
    for v in values:
        if isinstance(v, torch.Tensor):
            total += prod(int(str(sympy.sympify(n).xreplace(dict(hints)))) for n in shape_of(v)) * v.element_size()
    return total
