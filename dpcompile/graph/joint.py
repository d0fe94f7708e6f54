"""The joint graph, with names: which placeholder is which parameter, input or cotangent, and where its gradient is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from dpcompile.graph.labels import Examples
from dpcompile.graph.sizes import Size

__all__ = ["JointGraph", "OfExperts", "OverAxis", "OverRanks", "mutations"]


@dataclass(frozen=True, slots=True)
class OverAxis:
    """What a graph's inputs are along one dimension of the mesh of ranks that share a batch.

    Attributes:
        group: of the ranks along it.
        name: of the group, as graphs have it.
        label: of the dimension; "" if the mesh has no other.
        cut: positions of the inputs of which every rank holds another part, or another value.
        copied: positions of the others that are neither parameters nor arguments of the call; they were compared.
    """

    group: Any
    name: str
    label: str
    cut: frozenset[int]
    copied: frozenset[int]


@dataclass(frozen=True, slots=True)
class OfExperts:
    """Which of a graph's parameters are experts that lie on ranks with examples of their own.

    Attributes:
        name: of their group, as graphs have it.
        cut: names of the parameters.
    """

    name: str
    cut: frozenset[str]


@dataclass(frozen=True, slots=True)
class OverRanks:
    """What a graph's inputs are on the other ranks that share a batch (tensor and context parallelism).

    Attributes:
        axes: dimension by dimension of the mesh.
        everyone: all these ranks.
    """

    axes: tuple[OverAxis, ...]
    everyone: frozenset[int]

    @property
    def groups(self) -> list[Any]:
        """Of the dimensions."""
        return [axis.group for axis in self.axes]


@dataclass(frozen=True, slots=True)
class JointGraph:
    """A forward and backward in one ``fx.Graph``, decomposed to ATen.

    Attributes:
        module: the graph module; passes rewrite it in place.
        example_axes: the placeholders that hold examples.
        tangent_of: cotangent placeholder -> the forward output it belongs to.
        outputs: forward outputs in order.
        mask: placeholder of the float32 ``[B]`` weights that the padding mask gives (1 real, 0 padding); where nothing
            is trained, any placeholder with examples.
        batch: the number of examples.
        names: placeholder -> what the user calls it.
        parameters: trainable parameters by name, as placeholders.
        gradients: their gradients by name; None where autograd found none.
        norm_slot: the position in the graph's outputs that the per-example norms take.
        gradient_slots: parameter name -> the position of its gradient in the graph's outputs.
        sum_slots: parameter name -> the position that its clipped sum takes; another one only where the parameter is
            narrower than float32.
        plain_tangents: cotangent placeholder -> the position, in what the captured graph returns, of the output that it
            belongs to; only of outputs that AOTAutograd returns as they are.
        input_gradients: placeholder that is no parameter -> its gradient, which flows on to whatever made the input.
        weights: in a region the placeholder of the clip weights, ``[parameters, B]``, or, clipped at once, of the
            bounds of the parameters' groups; squared norms leave in the same shape, in the order of ``parameters``.
        bounds: of a graph with several clip groups the placeholder of their bounds, ``[groups, B]``.
        groups: their names, in the same order.
        group_slot: the position in the graph's outputs that the groups' norms take, in the same shape.
        alike: shared placeholder -> the dimensions along which all its positions are known to be the same.
    """

    module: fx.GraphModule
    example_axes: Mapping[fx.Node, Examples]
    tangent_of: Mapping[fx.Node, fx.Node]
    outputs: tuple[fx.Node | None, ...]
    mask: fx.Node
    batch: Size
    names: Mapping[fx.Node, str] = field(default_factory=dict)
    parameters: Mapping[str, fx.Node] = field(default_factory=dict)
    gradients: Mapping[str, fx.Node | None] = field(default_factory=dict)
    norm_slot: int = -1
    gradient_slots: Mapping[str, int] = field(default_factory=dict)
    sum_slots: Mapping[str, int] = field(default_factory=dict)
    plain_tangents: Mapping[fx.Node, int] = field(default_factory=dict)
    input_gradients: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    weights: fx.Node | None = None
    bounds: fx.Node | None = None
    groups: tuple[str, ...] = ()
    group_slot: int | None = None
    alike: Mapping[fx.Node, tuple[int, ...]] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self.module.graph

    def differentiable_outputs(self) -> Iterator[tuple[int, fx.Node]]:
        """Forward outputs that a cotangent flows into, with their positions."""
        differentiable = set(self.tangent_of.values())
        for position, node in enumerate(self.outputs):
            if node in differentiable and node is not None:
                yield position, node

    def mutations(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """``(input written to, new value)`` for every in-place operation of the graph, whatever it is."""
        yield from mutations(self.graph)

    def input_name(self, node: fx.Node) -> str:
        """What the user calls an input."""
        return self.names.get(node, node.name)


def mutations(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """``(value written to, another operand)`` for every in-place operation of a graph, whatever it is."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        named = {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)} | dict(node.kwargs)
        written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        for destination in (v for k, v in named.items() if k in written and isinstance(v, fx.Node)):
            yield from ((destination, source) for source in node.all_input_nodes if source is not destination)
