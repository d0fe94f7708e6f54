"""Writing new nodes into a graph as ordinary tensor functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from dpcompile.graph.compile import trace_like

__all__ = ["JOB", "behind", "insert", "last_of"]

JOB = "dpcompile"  # in a node's ``meta``: "norm", "clip" or "sum", of what was written into a graph


def insert(graph: fx.Graph, after: fx.Node, function: Callable[..., Any], operands: Sequence[fx.Node]) -> Any:
    """Trace ``function`` on the values of ``operands`` and write its operations into ``graph`` behind ``after``.

    Contract: every operand comes at or before ``after``. The new nodes carry fake values, and are marked as backward,
    so that the partitioner does not move them into the forward and save their results.

    Returns:
        The node (or the tree of nodes) that holds the result.
    """
    traced = trace_like(lambda *args: function(*args), *(n.meta["val"] for n in operands))
    environment: dict[fx.Node, fx.Node] = {}
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    environment.update(zip(placeholders, operands, strict=True))
    result: Any = None
    point = after
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            result = fx.map_arg(node.args[0], lambda n: environment[n])
            continue
        with graph.inserting_after(point):
            if node.op == "get_attr":
                copied = _copy_constant(graph, traced, node)
            else:
                copied = graph.node_copy(node, lambda n: environment[n])
        copied.meta = {k: v for k, v in node.meta.items() if k in ("val", "tensor_meta")}
        copied.meta["partitioner_tag"] = "must_be_in_backward"
        environment[node] = point = copied
    return result


def last_of(graph: fx.Graph, nodes: Sequence[fx.Node]) -> fx.Node:
    """The node of ``nodes`` that comes last in the graph."""
    wanted = set(nodes)
    return next(n for n in reversed(graph.nodes) if n in wanted)


def _copy_constant(graph: fx.Graph, traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    value = getattr(traced, str(node.target))
    assert isinstance(value, torch.Tensor) and value.numel() == 1, "only scalars are expected as constants"
    copied = graph.call_function(
        torch.ops.aten.full.default, ([], value.item()), {"dtype": value.dtype, "device": value.device}
    )
    return copied


def behind(graph: fx.Graph, nodes: Sequence[fx.Node]) -> fx.Node:
    """Where nodes that use ``nodes`` may be written: behind the last of them, and behind all placeholders."""
    last = last_of(graph, nodes)
    if last.op != "placeholder":
        return last
    return last_of(graph, [n for n in graph.nodes if n.op == "placeholder"])
