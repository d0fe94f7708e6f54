"""The three lowerings of a region's backward.

*Deferred*: it is cut in two at the clip weights. The first part computes gradients of inputs and every example's
squared norms. The second computes the clipped sums; it runs once the weights are known, which is when the whole
backward of the model is over. *At once*: the weights arise within the graph, which stays whole. *Two passes*: one graph
for norms, and one, for a second backward, for clipped sums; nothing is kept from one to the other.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile._torch.compile import Boxed, GraphCompiler
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.locate import where
from dpcompile.graph.sizes import same, shape_of, size
from dpcompile.lowering.pending import LoweredBackward, PendingSums
from dpcompile.options import AT_ONCE, DEFERRED, TWO_PASS
from dpcompile.planning.replay import storage_of

__all__ = ["Cut", "lower_backward"]


_WAIT = torch.ops._c10d_functional.wait_tensor.default  # impure to torch, so that it is not left out
_BESIDE = (operator.getitem, _WAIT)


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a rewritten joint graph is cut, by position in its outputs and by name.

    Attributes:
        norms: the position of the squared norms, ``[parameters, B]``.
        sums: the positions of the clipped sums, in the order of the parameters; None where it is zero.
        weights: the name of the placeholder that stands for the clip weights, ``[parameters, B]``.
        outputs: how many outputs the joint graph has.
    """

    norms: int
    sums: tuple[int | None, ...]
    weights: str
    outputs: int


@torch.library.custom_op("dpcompile::hand_out", mutates_args=())
def hand_out(total: Tensor, values: list[Tensor]) -> Tensor:
    """Stands in a joint graph for a clipped sum, and keeps alive what the parameter's norm is taken of.

    It never runs: :func:`lower_backward` takes it apart.
    """
    raise AssertionError("a backward that hands out what norms are taken of ran whole")


@hand_out.register_fake
def _(total: Tensor, values: list[Tensor]) -> Tensor:
    """Shapes only."""
    return torch.empty_like(total)


@dataclass(frozen=True, slots=True)
class _Backward:
    """A backward graph, taken apart.

    Attributes:
        early: its outputs, with None for clipped sums.
        sums: the clipped sums, in the order of the parameters.
        norms: the position of the squared norms in ``early``.
        weights: the placeholder of the clip weights, or, at once, of the bounds; None if they are not read.
        handed: row of a parameter that other regions use too -> what its norm is taken of.
    """

    gm: fx.GraphModule
    early: list[Any]
    sums: list[Any]
    norms: int
    weights: fx.Node | None
    handed: dict[int, list[fx.Node]]

    @property
    def placeholders(self) -> list[fx.Node]:
        return list(self.gm.graph.find_nodes(op="placeholder"))

    def part(self, inputs: Sequence[fx.Node], nodes: set[fx.Node], outputs: Sequence[Any]) -> fx.GraphModule:
        return _part(self.gm, inputs, nodes, outputs)


def lower_backward(cut: Cut, gm: fx.GraphModule, compile_graph: GraphCompiler, lowered: LoweredBackward) -> Boxed:
    """Compile a region's backward graph.

    Contract: ``gm`` is the backward half of a joint graph that was rewritten with weights, or bounds, as an input. The
    function returns what ``gm`` would, with None for the clipped sums, which it leaves in ``lowered``.

    **Guarantee.** No value that the first part, or the first pass, computes depends on the placeholder of the weights:
    what stands in its place when the backward runs is not read. Both passes compute the same cotangents: a graph that
    draws random numbers or writes is not run twice.

    Raises:
        UnsupportedGraphError: two passes, and the backward draws random numbers or writes.
    """
    kind = lowered.lowering.kind
    values: list[Any] = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    shift = cut.outputs - len(values)
    slots = [None if slot is None else slot - shift for slot in cut.sums]
    handed: dict[int, list[fx.Node]] = {}
    for row, slot in enumerate(slots):
        if slot is not None and getattr(values[slot], "target", None) is torch.ops.dpcompile.hand_out.default:
            values[slot], handed[row] = values[slot].args
    late = {slot for slot in slots if slot is not None}
    placeholders = gm.graph.find_nodes(op="placeholder")
    backward = _Backward(
        gm,
        [None if i in late else v for i, v in enumerate(values)],
        [None if i is None else values[i] for i in slots],
        cut.norms - shift,
        next((n for n in placeholders if n.name == cut.weights), None),
        handed,
    )
    if backward.weights is not None:
        _read_sizes_elsewhere(gm, backward.weights)
    assert not handed or kind == DEFERRED, "a parameter that other regions use too is not deferred"
    if kind == AT_ONCE:
        return _at_once(backward, compile_graph, lowered)
    if kind == TWO_PASS:
        return _in_two_passes(backward, compile_graph, lowered)
    return _in_two_parts(backward, compile_graph, lowered)


def _at_once(backward: _Backward, compile_graph: GraphCompiler, lowered: LoweredBackward) -> Boxed:
    own = backward.placeholders
    graph = backward.part(
        own, {n for n in backward.gm.graph.nodes if n.op != "output"}, [*backward.early, *backward.sums]
    )
    run_graph = compile_graph(graph, [n.meta.get("val") for n in own])

    def run(arguments: list[Any]) -> list[Any]:
        results = list(_call(run_graph, arguments))
        found, sums = results[: len(backward.early)], results[len(backward.early) :]
        lowered.leave(found[backward.norms], PendingSums(lambda live, _: live, sums))
        return found

    return run


def _in_two_passes(backward: _Backward, compile_graph: GraphCompiler, lowered: LoweredBackward) -> Boxed:
    once = next((n for n in backward.gm.graph.nodes if _must_run_once(n)), None)
    if once is not None:
        raise UnsupportedGraphError(
            f"a backward that is to run twice draws random numbers or writes to memory (`{once.name}`): the second "
            "time it would not come to the same",
            where=where(once),
            remedy="use norm='auto' without memory_budget, or draw the numbers outside of the model and pass them "
            "to it",
        )
    own, norms = backward.placeholders, backward.norms
    first = _ancestors(v for v in backward.early if isinstance(v, fx.Node))
    assert backward.weights not in first, "the norms depend on the clip weights"
    rest = [None if i == norms else v for i, v in enumerate(backward.early)]
    second = _ancestors(v for v in (*rest, *backward.sums) if isinstance(v, fx.Node))
    fakes = [n.meta.get("val") for n in own]
    run_first = compile_graph(backward.part(own, first, backward.early), fakes)
    run_second = compile_graph(backward.part(own, second, [*rest, *backward.sums]), fakes)
    position = None if backward.weights is None else own.index(backward.weights)

    def run(arguments: list[Any]) -> list[Any]:
        weights = None if position is None else lowered.weights_for(arguments[position])
        if position is None or weights is None:
            return list(_call(run_first, arguments))
        arguments[position] = weights
        results = list(_call(run_second, arguments))
        found, sums = results[: len(rest)], results[len(rest) :]
        found[norms] = marker = weights.clone()
        lowered.leave(marker, PendingSums(lambda live, _: live, sums))
        return found

    return run


def _in_two_parts(backward: _Backward, compile_graph: GraphCompiler, lowered: LoweredBackward) -> Boxed:
    gm, early, weights, placeholders = backward.gm, backward.early, backward.weights, backward.placeholders
    handed = backward.handed
    first = _ancestors(v for v in early if isinstance(v, fx.Node))
    first |= _ancestors(n for nodes in handed.values() for n in nodes)
    first |= _ancestors(n for n in gm.graph.nodes if _must_run_once(n))
    # Of an operation with several results each crosses by itself: there is no value that is all of them. And nothing
    # crosses that other ranks are still at.
    first |= {n for n in gm.graph.nodes if n.target in _BESIDE and n.args[0] in first}
    assert weights not in first, "the first part of a backward depends on the clip weights"
    late = [n for n in backward.sums if isinstance(n, fx.Node)]
    second = _ancestors(late) - first
    second |= _views(n for node in second for n in node.all_input_nodes if n in first)
    crossing = {n for node in second for n in node.all_input_nodes if n in first - second}
    crossing |= {n for n in second if n.op == "placeholder" and n is not weights}
    crossing |= {n for n in late if n in first}
    sizes = [n for n in placeholders if not isinstance(n.meta.get("val"), Tensor)]
    inputs = [n for n in placeholders if n in crossing or n in sizes]
    made = [n for n in gm.graph.nodes if n in crossing and n.op != "placeholder"]
    spare = list(dict.fromkeys(n for nodes in handed.values() for n in nodes if n.op != "placeholder"))
    di = backward.part(placeholders, first, [*early, *made, *spare])
    tail = [weights] if weights is not None else []
    dw = backward.part([*inputs, *made, *tail], second, backward.sums)
    run_di = compile_graph(di, [n.meta.get("val") for n in placeholders])
    run_dw = compile_graph(dw, [n.meta.get("val") for n in (*inputs, *made, *tail)])
    kept = [placeholders.index(n) for n in inputs]

    def rest(live: list[Any], given: Tensor | None) -> list[Tensor | None]:
        arguments = [*live, given] if tail else list(live)
        live.clear()
        return list(_call(run_dw, arguments))

    def run(arguments: list[Any]) -> list[Any]:
        live = [arguments[i] for i in kept]
        found = {n: arguments[placeholders.index(n)] for nodes in handed.values() for n in nodes if n not in spare}
        results = list(_call(run_di, arguments))
        end = len(early) + len(made)
        found.update(zip(spare, results[end:], strict=True))
        given = {row: [found[n] for n in nodes] for row, nodes in handed.items()}
        lowered.leave(results[backward.norms], PendingSums(rest, [*live, *results[len(early) : end]], given))
        return results[: len(early)]

    return run


def _read_sizes_elsewhere(gm: fx.GraphModule, weights: fx.Node) -> None:
    """Sizes that are read off the clip weights are read off another input that has them."""
    others = [n for n in gm.graph.find_nodes(op="placeholder") if n is not weights]
    for node in [n for n in weights.users if n.target is torch.ops.aten.sym_size.int]:
        wanted = size(node.meta["val"])
        known = ((n, d) for n in others if isinstance(v := n.meta.get("val"), Tensor)
                 for d, length in enumerate(shape_of(v)) if same(length, wanted))  # fmt: skip
        node.args = next(known, node.args)


def _call(function: Any, arguments: list[Any]) -> Sequence[Any]:
    return function(arguments) if getattr(function, "_boxed_call", False) else function(*arguments)


def _must_run_once(node: fx.Node) -> bool:
    """Whether a node writes, or draws random numbers: it belongs to the first part."""
    return node.op == "call_function" and (
        (node.is_impure() and node.target is not _WAIT)
        or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    )


def _ancestors(nodes: Any) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _views(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Those that are views, and what they are views of up to what has memory of its own.

    They are made again where they are read: their memory lies as the compiler chose, channels last for one, and not as
    it did while the graph was traced.
    """
    found: set[fx.Node] = set()
    for start in nodes:
        node, own = start, storage_of(start)
        while node is not own:
            found.add(node)
            node = node.all_input_nodes[0]
    return found


def _part(gm: fx.GraphModule, inputs: Sequence[fx.Node], nodes: set[fx.Node], outputs: Sequence[Any]) -> fx.GraphModule:
    """A graph of some nodes, with their names and metadata."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in gm.graph.nodes:
        if node in nodes and node not in copies:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    result = graph.output(tuple(copies[v] if isinstance(v, fx.Node) else None for v in outputs))
    result.meta = {}
    return fx.GraphModule(gm, graph)
