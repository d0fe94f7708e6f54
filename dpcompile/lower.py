"""The deferred lowering: a backward cut in two at the clip weights.

The first part computes gradients of inputs and every example's squared norms. The second computes the clipped sums; it
runs once the weights are known, which is when the whole backward of the model is over.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile._torch import Boxed, GraphCompiler, WeakTensorKeyDictionary, memory_of

__all__ = ["Cut", "Rest", "cut_backward", "take_rest"]


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


@dataclass(frozen=True, slots=True)
class Rest:
    """The second part of one backward that has run, with what it needs.

    Attributes:
        run: from a list of values and the weights to clipped sums.
        live: the values.
        handed: row of a parameter that other regions use too -> what its norm is taken of, over all regions.
    """

    run: Callable[[list[Any], Tensor], list[Tensor | None]]
    live: list[Any]
    handed: dict[int, list[Tensor]] = field(default_factory=dict)

    def __call__(self, weights: Tensor) -> list[Tensor | None]:
        """Clipped sums of the parameters for weights ``[parameters, B]``; to be called once, it frees the values."""
        self.handed.clear()
        return self.run(self.live, weights)

    def preview(self, weights: Tensor) -> list[Tensor | None]:
        """The same, and the values stay."""
        return self.run(list(self.live), weights)

    def protect(self, memory: Collection[int]) -> None:
        """Copy what lies in memory that will not last: parameters of a shard that are gathered for a while."""
        for values in (self.live, *self.handed.values()):
            for i, value in enumerate(values):
                if isinstance(value, Tensor) and memory_of(value) in memory:
                    values[i] = value.clone()


_RESTS: Any = WeakTensorKeyDictionary()


@torch.library.custom_op("dpcompile::hand_out", mutates_args=())
def hand_out(total: Tensor, values: list[Tensor]) -> Tensor:
    """Stands in a joint graph for a clipped sum, and keeps alive what the parameter's norm is taken of.

    It never runs: :func:`cut_backward` takes it apart.
    """
    raise AssertionError("a backward that hands out what norms are taken of ran whole")


@hand_out.register_fake
def _(total: Tensor, values: list[Tensor]) -> Tensor:
    """Shapes only."""
    return torch.empty_like(total)


def take_rest(norms: Tensor) -> Rest:
    """The second part of the backward that returned these norms; it is given out once."""
    return _RESTS.pop(norms)


def cut_backward(cut: Cut, gm: fx.GraphModule, compile_graph: GraphCompiler) -> Boxed:
    """Compile the two parts of a backward graph, and return the first.

    Contract: ``gm`` is the backward half of a joint graph that was rewritten with weights as an input. The function
    returns what ``gm`` would, with None for the clipped sums; :func:`take_rest` has them.

    **Guarantee.** No value that the first part computes depends on the placeholder of the weights: what stands in its
    place when the backward runs is not read.
    """
    values: list[Any] = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    shift = cut.outputs - len(values)
    sums = [None if slot is None else slot - shift for slot in cut.sums]
    handed: dict[int, list[fx.Node]] = {}
    for row, slot in enumerate(sums):
        if slot is not None and getattr(values[slot], "target", None) is torch.ops.dpcompile.hand_out.default:
            values[slot], handed[row] = values[slot].args
    late = {slot for slot in sums if slot is not None}
    early = [None if i in late else v for i, v in enumerate(values)]
    placeholders = gm.graph.find_nodes(op="placeholder")
    weights = next((n for n in placeholders if n.name == cut.weights), None)
    first = _ancestors(v for v in early if isinstance(v, fx.Node))
    first |= _ancestors(n for nodes in handed.values() for n in nodes)
    first |= _ancestors(n for n in gm.graph.nodes if _must_run_once(n))
    # Of an operation with several results each crosses by itself: there is no value that is all of them.
    first |= {n for n in gm.graph.nodes if n.target is operator.getitem and n.args[0] in first}
    assert weights not in first, "the first part of a backward depends on the clip weights"
    second = _ancestors(values[i] for i in late if isinstance(values[i], fx.Node)) - first
    crossing = {n for node in second for n in node.all_input_nodes if n in first}
    crossing |= {n for n in second if n.op == "placeholder" and n is not weights}
    crossing |= {values[i] for i in late if values[i] in first}
    sizes = [n for n in placeholders if not isinstance(n.meta.get("val"), Tensor)]
    inputs = [n for n in placeholders if n in crossing or n in sizes]
    made = [n for n in gm.graph.nodes if n in crossing and n.op != "placeholder"]
    spare = list(dict.fromkeys(n for nodes in handed.values() for n in nodes if n.op != "placeholder"))
    di = _part(gm, placeholders, first, [*early, *made, *spare])
    wanted = [None if i is None else values[i] for i in sums]
    tail = [weights] if weights is not None else []
    dw = _part(gm, [*inputs, *made, *tail], second, wanted)
    run_di = compile_graph(di, [n.meta.get("val") for n in placeholders])
    run_dw = compile_graph(dw, [n.meta.get("val") for n in (*inputs, *made, *tail)])
    kept = [placeholders.index(n) for n in inputs]
    norms = cut.norms - shift

    def rest(live: list[Any], given: Tensor) -> list[Tensor | None]:
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
        _RESTS[results[norms]] = Rest(rest, [*live, *results[len(early) : end]], given)
        return results[: len(early)]

    return run


def _call(function: Any, arguments: list[Any]) -> Sequence[Any]:
    return function(arguments) if getattr(function, "_boxed_call", False) else function(*arguments)


def _must_run_once(node: fx.Node) -> bool:
    """Whether a node writes, or draws random numbers: it belongs to the first part."""
    return node.op == "call_function" and (
        node.is_impure() or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
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
