"""A graph around units: cut at their calls, and run piece by piece."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile._torch import pytree
from dpcompile._torch.aot import keep_source
from dpcompile._torch.tensors import detect_fake_mode
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.labels import Label
from dpcompile.graph.locate import where
from dpcompile.regions.checkpoints import checkpoint_of
from dpcompile.regions.units import unit_call

__all__ = ["Piece", "Skeleton", "holds_units", "whole_piece"]


@dataclass(eq=False, slots=True)
class Piece:
    """What stands between two calls of units.

    Attributes:
        graph: as a module of its own; its placeholders are ``inputs``.
        inputs: nodes of the whole graph.
        outputs: nodes of the whole graph.
        recompute: it stands under a checkpoint.
    """

    graph: fx.GraphModule
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    recompute: bool = False

    def fakes(self, live: Sequence[Any]) -> list[Any]:
        """Fake tensors like the live ones, to trace with."""
        nodes = self.graph.graph.find_nodes(op="placeholder")
        mode = detect_fake_mode([n.meta.get("example_value") for n in nodes])
        if mode is None:
            return list(live)
        with mode:
            return [_like(x, n) if isinstance(x, Tensor) else x for x, n in zip(live, nodes, strict=True)]


def whole_piece(gm: fx.GraphModule) -> Piece:
    """A graph that calls no unit, as one piece."""
    values: Any = gm.graph.output_node().args[0]
    return Piece(gm, gm.graph.find_nodes(op="placeholder"), [n for n in values if isinstance(n, fx.Node)])


def _like(value: Tensor, node: fx.Node) -> Tensor:
    expected = node.meta["example_value"]
    seen, wanted = (value.shape, value.dtype), (expected.shape, expected.dtype)
    if seen != wanted or (value.requires_grad and not expected.requires_grad and torch.is_grad_enabled()):
        raise UnsupportedGraphError(
            f"a block returned {list(value.shape)} {value.dtype} where its forward alone gives {list(expected.shape)} "
            f"{expected.dtype}",
            remedy="remove hooks that change what the block returns, or compile the model without regions",
        )
    return torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=value.device, requires_grad=value.requires_grad
    )


def holds_units(gm: fx.GraphModule) -> bool:
    """Whether a graph calls units.

    Raises:
        UnsupportedGraphError: within a graph inside it (a loop, a branch).
    """
    for module in gm.modules():
        if module is not gm and isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=unit_call):
                raise UnsupportedGraphError(
                    "a block that is compiled by itself is called in a loop, a branch or a torch.autograd.Function of "
                    "the captured graph",
                    where=where(node),
                    remedy="write loops and branches in Python; call the block outside the torch.autograd.Function, or "
                    "compile the model without regions",
                )
    return bool(gm.graph.find_nodes(op="call_function", target=unit_call))


@dataclass(eq=False, slots=True)
class Skeleton:
    """A graph that calls units.

    Attributes:
        steps: in order: a piece, or the node of a unit's call.
        source: the captured graph.
    """

    source: fx.GraphModule
    steps: list[Piece | fx.Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        _refuse_modes(self.source)
        pieces = _assign(self.source)
        output = self.source.graph.output_node()
        by_piece: dict[int, list[fx.Node]] = {}
        for node, number in pieces.items():
            by_piece.setdefault(number, []).append(node)
        ordered: list[tuple[int, Piece | fx.Node]] = []
        for number, nodes in by_piece.items():
            calls = nodes[0].target is unit_call
            ordered.append((number, nodes[0] if calls else _piece(self.source, nodes, pieces, output)))
        self.steps = [step for _, step in sorted(ordered, key=lambda pair: pair[0])]

    def run(
        self,
        inputs: Sequence[Any],
        labels: Sequence[Label | None],
        run_piece: Callable[[Piece, list[Any], list[Label | None]], tuple[Sequence[Any], Sequence[Label]]],
        run_unit: Callable[[fx.Node, Any, Any, list[Label | None]], tuple[Any, list[Label]]],
    ) -> tuple[list[Any], list[Label | None]]:
        """Run on live values; answers with outputs and their labels (None for what is no tensor)."""
        placeholders = self.source.graph.find_nodes(op="placeholder")
        values: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
        known: dict[fx.Node, Any] = dict(zip(placeholders, labels, strict=True))
        for step in self.steps:
            if isinstance(step, Piece):
                found, names = run_piece(step, [values[n] for n in step.inputs], [known[n] for n in step.inputs])
                values.update(zip(step.outputs, found, strict=True))
                known.update(zip(step.outputs, names, strict=True))
            else:
                _, args, kwargs = step.args
                live = fx.map_arg((args, kwargs), lambda n: values[n])
                flat = [n for n in pytree.tree_leaves((args, kwargs)) if isinstance(n, fx.Node)]
                given = [known[n] for n in flat if isinstance(values[n], Tensor)]
                result, names = run_unit(step, *live, given)  # type: ignore[arg-type]
                values[step] = result
                leaves, structure = pytree.tree_flatten(result)
                remaining = iter(names)
                known[step] = pytree.tree_unflatten(
                    [_Known(next(remaining)) if isinstance(x, Tensor) else None for x in leaves], structure
                )
                if isinstance(known[step], _Known):
                    known[step] = known[step].label
                if not isinstance(result, Tensor):
                    self._unpack(step, values, known)
        outputs = self.source.graph.output_node().args[0]
        flat_outputs: list[Any] = list(outputs)  # type: ignore[arg-type]
        return (
            [values[n] if isinstance(n, fx.Node) else n for n in flat_outputs],
            [known[n] if isinstance(n, fx.Node) else None for n in flat_outputs],
        )

    def _unpack(self, node: fx.Node, values: dict[fx.Node, Any], known: dict[fx.Node, Any]) -> None:
        for user in node.users:
            if user.target is operator.getitem and user.args[0] is node:
                position: Any = user.args[1]
                values[user] = values[node][position]
                label = known[node][position]
                known[user] = label.label if isinstance(label, _Known) else label
                if not isinstance(values[user], Tensor):
                    self._unpack(user, values, known)


@dataclass(frozen=True, slots=True)
class _Known:
    label: Label


def _is_container(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), (tuple, list))


def _from_unit(node: fx.Node) -> bool:
    """Whether a node takes a unit's result apart."""
    if node.target is unit_call:
        return True
    first = node.args[0] if node.args else None
    taken = node.target is operator.getitem and isinstance(first, fx.Node) and _is_container(first)
    return taken and _from_unit(first)  # type: ignore[arg-type]


def _assign(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """Node -> the step that it belongs to: the call of a unit by itself, the rest between two calls together.

    What stands under a checkpoint and what does not are steps of their own.
    """
    number, found, inside = 0, {}, None
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or (node.target is not unit_call and _from_unit(node)):
            continue
        source: Any = node.args[0] if node.target is operator.getitem else None
        if source in found and source.target is not unit_call:
            found[node] = found[source]
            continue
        if node.target is unit_call:
            found[node] = number + 1
            number += 2
            continue
        if checkpoint_of(node) != inside:
            number, inside = number + 1, checkpoint_of(node)
        found[node] = number
    return found


def _piece(gm: fx.GraphModule, nodes: list[fx.Node], pieces: dict[fx.Node, int], output: fx.Node) -> Piece:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    own = set(nodes)
    operands = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in own)
    inputs = [n for n in operands if n.op != "get_attr"]
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
        keep_source(node, copies[node])
    for node in operands:
        if node.op == "get_attr":
            copies[node] = graph.node_copy(node)
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    outputs = [n for n in nodes if any(u not in own for u in n.users)]
    for node in outputs:
        if _is_container(node):
            raise UnsupportedGraphError(
                "a tuple of tensors passes from one piece of the model to another",
                where=where(node),
                remedy="take it apart where it is made",
            )
    result = graph.output(tuple(copies[n] for n in outputs))
    result.meta = dict(output.meta)
    return Piece(fx.GraphModule(gm, graph), inputs, outputs, checkpoint_of(nodes[0]) is not None)


def _refuse_modes(gm: fx.GraphModule) -> None:
    """A unit may not be called where the graph switched gradients or autocast: pieces would not see it."""
    depth = 0
    grad = True
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name in ("_enter_autocast", "_exit_autocast"):
            depth += 1 if name == "_enter_autocast" else -1
        elif name == "_set_grad_enabled":
            grad = bool(node.args[0])
        elif node.target is unit_call and (depth or not grad):
            raise UnsupportedGraphError(
                "a block that is compiled by itself is called under torch.no_grad or autocast inside the model",
                where=where(node),
                remedy="enter it around the call of the whole model or inside the block, freeze parameters with "
                "requires_grad_(False), or compile the model without regions",
            )
