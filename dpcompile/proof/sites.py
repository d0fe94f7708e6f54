"""Gradient sites: the operations where the example axis is summed away into a parameter's gradient."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import networkx
import torch
from torch import fx

from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Examples, Shared, Summed, Whole
from dpcompile.graph.locate import where
from dpcompile.graph.operations import operation_name
from dpcompile.proof.alignment import complete_axes
from dpcompile.proof.prove import Proof
from dpcompile.proof.site_kinds import Form, SiteKind, find_site_kind

__all__ = ["ParameterGradient", "Site", "find_gradients"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Site:
    """One operation whose operands have an example axis and whose value has none.

    Attributes:
        value: the node that holds the sum (the operation, or the ``getitem`` of one that returns several values).
        operation: the operation itself.
        kind: the operation's name, or ``"whole"`` for a batch of one example.
        operands: tensor operands by schema name.
        axes: the example axis of those operands that have one; an operand that depends on no example but is laid out
            position by position along the others' axis counts too.
    """

    value: fx.Node
    operation: fx.Node
    kind: str
    operands: Mapping[str, fx.Node]
    axes: Mapping[str, Examples]

    @property
    def linear_operands(self) -> tuple[str, ...]:
        """Names of the operands with an example axis in which the site is linear, the preferred one first."""
        known = self.known
        return tuple(name for name in known.linear if name in self.axes) if known else ()

    @property
    def known(self) -> SiteKind | None:
        """What is known of the operation."""
        return find_site_kind(self.kind, result_of(self.value))

    @property
    def form(self) -> Form | None:
        """How its outer products are found; None: by no general way."""
        return None if self.known is None else self.known.form

    @property
    def widens(self) -> bool:
        """Whether it takes narrow numbers as they are, and adds up in float32 or wider."""
        return self.known is not None and self.known.widens


@dataclass(frozen=True, slots=True)
class ParameterGradient:
    """A trainable parameter's gradient: a linear function of its sites.

    Attributes:
        name: the parameter.
        parameter: its placeholder.
        gradient: the node that the graph returns for it.
        sites: where the example axis is summed away, in graph order; none if the gradient is identically zero.
        tail: the operations between the sites and the gradient, in graph order, the gradient last; empty if the
            gradient is itself the only site.
    """

    name: str
    parameter: fx.Node
    gradient: fx.Node
    sites: tuple[Site, ...]
    tail: tuple[fx.Node, ...]


def find_gradients(joint: JointGraph, proof: Proof) -> list[ParameterGradient]:
    """Find the sites and the tail of every parameter's gradient.

    **Guarantee.** Every path from a value of the examples to a returned gradient passes through exactly one site: the
    graph without the sites' operations has no path from an example to a gradient, and a site's value feeds no other
    site. Both are checked on the graph itself, independently of how the sites were found.

    Raises:
        UnsupportedGraphError: a path that is not covered, or a site of a kind that has no norm rule.
    """
    order = {node: i for i, node in enumerate(joint.graph.nodes)}
    sites: dict[fx.Node, Site] = {}
    found = []
    for name, gradient in joint.gradients.items():
        if gradient is None or isinstance(proof.of(gradient), Shared):
            continue
        tail, values = _trace_back(gradient, proof)
        own = [sites.setdefault(v, _site(v, proof, name)) for v in values]
        found.append(
            ParameterGradient(
                name,
                joint.parameters[name],
                gradient,
                tuple(sorted(own, key=lambda s: order[s.value])),
                tuple(sorted(tail, key=order.__getitem__)),
            )
        )
    _check_coverage(joint, proof, found)
    return found


def _trace_back(gradient: fx.Node, proof: Proof) -> tuple[set[fx.Node], set[fx.Node]]:
    """Walk from the gradient back over sums until the operations that made them."""
    tail: set[fx.Node] = set()
    values: set[fx.Node] = set()
    stack = [gradient]
    while stack:
        node = stack.pop()
        if node in tail or node in values:
            continue
        if _is_site(node, proof):
            values.add(node)
            continue
        tail.add(node)
        stack.extend(n for n in node.all_input_nodes if isinstance(proof.labels[n], Summed))
    return tail, values


def result_of(value: fx.Node) -> int:
    """Which of its operation's results a value is."""
    return value.args[1] if value.target is operator.getitem else 0  # type: ignore[return-value]


def _operation(value: fx.Node) -> fx.Node:
    return value.args[0] if value.target is operator.getitem else value  # type: ignore[return-value]


def _is_site(node: fx.Node, proof: Proof) -> bool:
    if isinstance(proof.labels[node], Whole):
        return True
    operands = [proof.labels[n] for n in _operation(node).all_input_nodes]
    return not any(isinstance(x, Summed) for x in operands)


def _site(value: fx.Node, proof: Proof, parameter: str) -> Site:
    if isinstance(proof.labels[value], Whole):
        return Site(value, value, "whole", {}, {})
    operation = _operation(value)
    kind = operation_name(operation.target)
    operands: dict[str, fx.Node] = {}
    schema: Any = operation.target._schema  # type: ignore[union-attr]
    named = {a.name: v for a, v in zip(schema.arguments, operation.args, strict=False)} | dict(operation.kwargs)
    for name, operand in named.items():
        if isinstance(operand, fx.Node):
            operands[name] = operand
        elif isinstance(operand, (list, tuple)):
            operands.update({f"{name}.{i}": n for i, n in enumerate(operand) if isinstance(n, fx.Node)})
    labelled = {n: x for n, o in operands.items() if isinstance(x := proof.of(o), Examples)}
    known = find_site_kind(kind, result_of(value))
    axes = complete_axes(kind, known, operation, operands, labelled) if known is not None else {}
    if known is None or not any(n in axes for n in known.linear):
        raise UnsupportedGraphError(
            f"the gradient of parameter '{parameter}' is summed over the examples by `{kind}`, which has no norm rule",
            where=where(operation),
            remedy="rewrite the layer so that its gradient ends in a matrix product, a sum, an index-put or a "
            "convolution, or say how it sums with dpcompile.register_site",
        )
    return Site(value, operation, kind, operands, axes)


def _check_coverage(joint: JointGraph, proof: Proof, gradients: list[ParameterGradient]) -> None:
    values = {s.value for g in gradients for s in g.sites}
    graph = networkx.DiGraph()
    for node in joint.graph.nodes:
        graph.add_node(node)
        if node not in values and node.op != "output":
            graph.add_edges_from((n, node) for n in node.all_input_nodes)
    for gradient in gradients:
        ancestors = networkx.ancestors(graph, gradient.gradient) | {gradient.gradient}
        leak = next((n for n in ancestors if n not in values and isinstance(proof.of(n), (Examples, Whole))), None)
        if leak is not None:
            raise UnsupportedGraphError(
                f"values of single examples reach the gradient of parameter '{gradient.name}' past its sites "
                f"(through `{leak.name}`)",
                where=where(leak),
                remedy="report this model: the proof and the sites disagree",
            )
    feeding = {v for v in values for a in _operation(v).all_input_nodes if isinstance(proof.of(a), Summed)}
    assert not feeding, f"sites behind sites: {feeding}"
