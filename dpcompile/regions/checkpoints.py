"""Activation checkpointing by regions: ``torch.utils.checkpoint`` around blocks becomes a mark on what it holds."""

from __future__ import annotations

from typing import Any

from torch import fx

from dpcompile._torch.aot import checkpoint_call, copy_graph, is_selective, keep_source
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.locate import where
from dpcompile.regions.units import unit_call

__all__ = ["checkpoint_of", "unwrap_whole", "unwrap_units"]

_MARK = "dpcompile_checkpoint"


def checkpoint_of(node: fx.Node) -> int | None:
    """Which checkpoint a node stood in; None if in none."""
    return node.meta.get(_MARK)


def unwrap_whole(gm: fx.GraphModule) -> fx.GraphModule | None:
    """The inside of a graph that is one checkpoint and nothing else (a block under ``checkpoint_wrapper``), or None.

    The region then runs its forward again in the backward; what it is compiled to is that of the block alone.
    """
    calls = [n for n in gm.graph.nodes if checkpoint_call(n)]
    if len(calls) != 1 or is_selective(_body(gm, calls[0])):
        return None
    around = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method", "call_module")]
    if any(n is not calls[0] and calls[0] not in n.all_input_nodes for n in around):
        return None
    copied = _copy(gm)
    _inline(copied, next(n for n in copied.graph.nodes if checkpoint_call(n)), 0)
    return copied


def unwrap_units(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with every checkpoint that holds calls of units taken apart; its nodes carry :func:`checkpoint_of`.

    Raises:
        UnsupportedGraphError: a checkpoint with a policy of what to keep (selective checkpointing).
    """
    copied, number = gm, 0
    while True:
        call = next((n for n in copied.graph.nodes if checkpoint_call(n) and _holds_units(_body(copied, n))), None)
        if call is None:
            return copied
        if is_selective(_body(copied, call)):
            raise UnsupportedGraphError(
                "a block that is compiled by itself is called under a checkpoint with a context_fn",
                where=where(call),
                remedy="put the checkpoint into the block, or leave context_fn out",
            )
        if copied is gm:
            copied = _copy(gm)
            call = next(n for n in copied.graph.nodes if n.name == call.name)
        _inline(copied, call, number)
        number += 1


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    copied = fx.GraphModule(gm, copy_graph(gm.graph))
    copied.meta.update(gm.meta)
    for old, new in zip(gm.graph.nodes, copied.graph.nodes, strict=True):
        keep_source(old, new)
    return copied


def _body(gm: fx.GraphModule, call: fx.Node) -> fx.GraphModule:
    target: Any = call.args[0]
    body: Any = getattr(gm, str(target.target))
    return body


def _holds_units(body: fx.GraphModule) -> bool:
    graphs = (m for m in body.modules() if isinstance(m, fx.GraphModule))
    return any(m.graph.find_nodes(op="call_function", target=unit_call) for m in graphs)


def _inline(gm: fx.GraphModule, call: fx.Node, number: int) -> None:
    """Write the body of a checkpoint in its place; each of its nodes is marked."""
    body, source = _body(gm, call), call.args[0]
    assert isinstance(source, fx.Node)
    inputs = body.graph.find_nodes(op="placeholder")
    copies: dict[fx.Node, Any] = dict(zip(inputs, call.args[1:], strict=True))
    for node in body.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        with gm.graph.inserting_before(call):
            if node.op == "get_attr":
                name = f"{source.target}_{node.target}".replace(".", "_")
                setattr(gm, name, getattr(body, str(node.target)))
                copied = gm.graph.get_attr(name)
            else:
                copied = gm.graph.node_copy(node, lambda n: copies[n])
        copied.meta = {**node.meta, _MARK: number}
        copies[node] = copied
    (results,) = body.graph.output_node().args
    assert isinstance(results, (tuple, list))
    for user in list(call.users):
        result: Any = results[user.args[1]]  # type: ignore[index]
        user.replace_all_uses_with(copies[result])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)
    if not source.users:
        gm.graph.erase_node(source)
    gm.delete_all_unused_submodules()
    gm.recompile()
