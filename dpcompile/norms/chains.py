"""What the tail of a gradient does to one site's value, where it only moves it and adds it once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx

from dpcompile.graph.operations import COPIES, REARRANGES, operation_name
from dpcompile.graph.sizes import shape_of
from dpcompile.proof.sites import ParameterGradient

__all__ = ["chain_of"]


def chain_of(value: fx.Node, gradient: ParameterGradient, through: Collection[str]) -> tuple[Any, ...] | None:
    """What the tail does to one site's value: a tuple that is equal for equal rearrangements, or None.

    None where the tail scales, slices or combines it otherwise than by adding it once.
    """
    moves: list[Any] = []
    tail = set(gradient.tail)
    node = value
    while node is not gradient.gradient:
        users = [u for u in node.users if u in tail]
        if len(users) != 1:
            return None
        node = users[0]
        name = operation_name(node.target)
        if name == "add":
            if node.kwargs.get("alpha", 1) != 1 or node.args[0] is node.args[1] or not _same_shapes(node):
                return None
        elif name not in REARRANGES | COPIES | {"getitem", *through}:
            return None
        elif name in REARRANGES:
            moves.append(_move(node, name))
    return _simplify(moves)


def _same_shapes(node: fx.Node) -> bool:
    shapes = {shape_of(n.meta["val"]) for n in node.all_input_nodes}
    return len(shapes) == 1


def _move(node: fx.Node, name: str) -> tuple[Any, ...]:
    before, after = shape_of(node.all_input_nodes[0].meta["val"]), shape_of(node.meta["val"])
    if name in ("permute", "transpose", "t"):
        ndim = len(before)
        if name == "permute":
            order = tuple(d % ndim for d in node.args[1])  # type: ignore[union-attr]
        else:
            a, b = (d % ndim for d in node.args[1:3]) if name == "transpose" else (0, 1)  # type: ignore[operator]
            order = tuple({a: b, b: a}.get(d, d) for d in range(ndim))
        return ("permute", order)
    return ("view", before, after) if before != after else ("view",)


def _simplify(moves: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    kept: list[tuple[Any, ...]] = []
    for move in moves:
        if move == ("view",):
            continue
        if kept and kept[-1][0] == "permute" and move[0] == "permute":
            before = kept.pop()[1]
            move = ("permute", tuple(before[i] for i in move[1]))
        if move[0] == "permute" and move[1] == tuple(range(len(move[1]))):
            continue
        kept.append(move)
    if not kept:
        return ("identity",)
    return ("transposed",) if kept == [("permute", (1, 0))] else tuple(kept)
