"""The proof that examples never mix: one label for every value of the joint graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from dpcompile.errors import DPCompileError, ExampleMixingError, UnsupportedGraphError
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Examples, Label, Mixed, Shared, Summed, Whole
from dpcompile.graph.locate import module_of, where
from dpcompile.graph.operations import operation_name, takes_only_shapes
from dpcompile.graph.sizes import Size, is_one, product, same, shape_of
from dpcompile.proof.border import forbidden_output, forbidden_write, kept_number
from dpcompile.proof.rules import Call, Labels, Rows, find_rule, named_arguments
from dpcompile.proof.rules.pointwise import pointwise
from dpcompile.proof.rules.registry import is_pointwise
from dpcompile.proof.rules.shared import shared

__all__ = ["Proof", "prove", "refusal"]


@dataclass(frozen=True, slots=True)
class Proof:
    """The label of every node, and what follows from it."""

    labels: Mapping[fx.Node, Labels]
    batch: Size
    rows: Rows

    def of(self, node: fx.Node) -> Label:
        """The label of a node with one value."""
        label = self.labels[node]
        return label[0] if isinstance(label, tuple) else label

    def leaving(self, node: fx.Node | None) -> Label:
        """The label of an output, with what another graph must know of a shared one."""
        label = self.of(node) if node is not None else Shared()
        return replace(label, alike=self.rows.alike(node)) if node is not None and isinstance(label, Shared) else label

    def is_summed(self, node: fx.Node) -> bool:
        """Whether the node is a sum over the examples (or belongs to the only one)."""
        return isinstance(self.of(node), (Summed, Whole))


def prove(joint: JointGraph, examples_per_user: int = 1) -> Proof:
    """Label every value, and refuse what the guarantee cannot stand on.

    Args:
        joint: the graph.
        examples_per_user: rows of the call that are one user's; an example is a user then.

    **Guarantee.** If this returns, then for every trainable parameter the gradient in the graph is a sum over the
    examples of terms that depend on one example each (and on shared values), every differentiable output of the model
    is per example or such a sum, and no buffer is written with anything that depends on an example. What a term is does
    not depend on the example's row number in the batch: taken out of the batch, an example leaves the others' terms as
    they are, but for draws of random numbers, of which each example has its own.

    ==========================================  ==========================================================
    edge case                                   outcome
    ==========================================  ==========================================================
    mixed value that reaches no gradient        allowed (an accuracy computed for logging)
    output with its examples flattened          allowed on dimension 0 ([B, T] to [B·T]), else refused
    output that is a vector of sums             refused: a loss of it would make all examples depend on each other
    Python number read out of examples          refused where it leaves the graph, or reaches a gradient
    write to a parameter being trained          refused
    write to an input with examples             allowed where every example keeps its place
    gradient that is identically zero           allowed
    output that depends on no example           allowed; a gradient through it is refused when it runs
    gradient with a part from no example        refused (a regulariser inside the model)
    gradient of an input that lies otherwise    refused
    parameter with an example axis of its own   refused
    operation without a rule on example data    refused by name
    arange(B), a buffer with B rows, tril ..    refused where they meet examples row by row
    ``x[arange(B), i]``                         right: every example picks itself
    torch.rand(B, ..), dropout                  right; one draw's rows may not meet other examples too
    batch of one example                        nothing to mix; writes to buffers are still refused
    ==========================================  ==========================================================

    Raises:
        ExampleMixingError: examples mix on the way to a gradient, an output or a buffer.
        UnsupportedGraphError: an operation without a rule.
    """
    proof = _label_all(joint)
    for destination, source in joint.mutations():
        error = forbidden_write(joint, destination, source, proof.of(source))
        if error is not None:
            raise error
    for position, node in joint.differentiable_outputs():
        _check_output(position, node, proof.of(node), examples_per_user)
    for node in joint.outputs:
        if node is not None and (error := kept_number(node, proof.labels)) is not None:
            raise error
    for name, gradient in joint.gradients.items():
        if gradient is not None:
            _check_gradient(name, gradient, proof.of(gradient))
    for source, gradient in joint.input_gradients.items():
        _check_input_gradient(joint.input_name(source), gradient, proof.of(source), proof.of(gradient))
    return proof


def refusal(label: Mixed, target: str) -> DPCompileError:
    """The error for a mixed value that reached ``target``."""
    operation = _name(label.origin)
    place, inside = where(label.origin), module_of(label.origin)
    kind = ExampleMixingError if label.supported else UnsupportedGraphError
    if inside is not None and issubclass(inside[1], torch.nn.modules.batchnorm._BatchNorm):
        return ExampleMixingError(
            f"{inside[1].__name__} in training mode normalises every example by the statistics of the whole batch "
            f"(module {inside[0]}, operation `{operation}`)",
            where=place,
            remedy="use GroupNorm (dpcompile.replace_batchnorm) or LayerNorm, or call .eval() on BatchNorm layers that "
            "hold running statistics, to freeze these",
        )
    verb = "mixes examples" if label.supported else "is not understood"
    remedy = label.remedy or (
        "compute it for every example by itself; a loss belongs outside the model, one value per example "
        "(reduction='none'), then .mean(); use in_dims for inputs that have no example axis"
        if label.supported
        else "rewrite it with operations that have a rule; for an operator of your own, dpcompile.register_axis_rule "
        "says what it does to the examples"
    )
    return kind(f"`{operation}` {verb}: {label.reason} (it reaches {target})", where=place, remedy=remedy)


def _label_all(joint: JointGraph) -> Proof:
    """Draws of random numbers that turn out to meet examples row by row are theirs, and all is labelled anew."""
    drawn: dict[fx.Node, Examples] = {}
    while True:
        labels, rows = _propagate(joint, drawn)
        if not rows.drawn:
            return Proof(labels, joint.batch, rows)
        drawn |= rows.drawn


def _propagate(joint: JointGraph, drawn: Mapping[fx.Node, Examples]) -> tuple[dict[fx.Node, Labels], Rows]:
    """The forward first, then the cotangents (each lies like its output), then the backward."""
    labels: dict[fx.Node, Labels] = {}
    rows = Rows(labels, joint.batch, joint.names)
    sums: dict[int, tuple[Examples, tuple[Size, ...]]] = {}

    def label(node: fx.Node) -> None:
        if node in drawn and all(isinstance(labels[n], (Shared, Examples)) for n in node.all_input_nodes):
            results = node.meta["val"]
            labels[node] = tuple(drawn[node] for _ in results) if isinstance(results, (tuple, list)) else drawn[node]
        elif node.op == "placeholder":
            labels[node] = _input_label(joint, node, labels)
        elif node.op == "get_attr":
            labels[node] = Shared()
        elif node.op == "call_function":
            labels[node] = _call_label(Call(node, named_arguments(node), labels, joint.batch, sums, rows))
            _note_forward_sum(node, labels, sums)

    for node in joint.graph.nodes:
        if node not in joint.tangent_of and all(n in labels for n in node.all_input_nodes):
            label(node)
    for node in joint.graph.nodes:
        if node not in labels:
            label(node)
    return labels, rows


def _input_label(joint: JointGraph, node: fx.Node, labels: Mapping[fx.Node, Labels]) -> Label:
    axis = joint.example_axes.get(node)
    if axis is not None:
        return Whole() if is_one(joint.batch) else axis
    output = joint.tangent_of.get(node)
    if output is None:
        return Shared(alike=joint.alike.get(node, ()))
    label = labels[output]
    label = label[0] if isinstance(label, tuple) else label
    if isinstance(label, Summed):
        return Shared(cotangent=True)
    if isinstance(label, Shared):
        return Shared(zero=node in joint.plain_tangents)  # see dpcompile.proof.unowned
    return label if isinstance(label, (Examples, Whole)) else Shared()


def _call_label(call: Call) -> Labels:
    node, labels = call.node, call.labels
    if node.target is operator.getitem:
        container, position = node.args[0], node.args[1]
        label = labels[container]  # type: ignore[index]
        return label[position] if isinstance(label, tuple) else label  # type: ignore[index]
    operands = [labels[n] for n in node.all_input_nodes]
    flat = [x for label in operands for x in (label if isinstance(label, tuple) else (label,))]
    mixed = next((x for x in flat if isinstance(x, Mixed)), None)
    if mixed is not None:  # its very size may depend on the examples (nonzero, unique)
        return mixed
    if takes_only_shapes(node.target):
        return shared(call)
    if any(isinstance(x, Whole) for x in flat):
        return Whole()
    if all(isinstance(x, Shared) for x in flat):
        return shared(call)
    if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return _scalar_label(call)
    rule = find_rule(node.target)
    if rule is None and is_pointwise(node.target):
        rule = pointwise
    if rule is None:
        return call.unsupported(f"there is no rule for `{_name(node)}`")
    return _of_right_size(call, rule(call))


def _of_right_size(call: Call, labels: Labels) -> Labels:
    """Whatever a rule says: a dimension that carries the examples carries all of them."""
    value = call.node.meta["val"]
    if isinstance(labels, tuple):
        return tuple(_checked(call, x, v) for x, v in zip(labels, value, strict=True))
    return _checked(call, labels, value)


def _checked(call: Call, label: Label, value: object) -> Label:
    if not isinstance(label, Examples) or not isinstance(value, torch.Tensor):
        return label
    if same(shape_of(value)[label.dim], product([label.outer, call.batch, label.inner])):
        return label
    return call.mixes("it takes some of the examples only")


def _note_forward_sum(node: fx.Node, labels: Mapping[fx.Node, Labels], sums: dict) -> None:
    label, sequence = labels[node], node.meta.get("seq_nr")
    if isinstance(label, Summed) and sequence is not None and sequence not in sums and node.all_input_nodes:
        source = node.all_input_nodes[0]
        before = labels[source]
        if isinstance(before, Examples):
            sums[sequence] = (before, shape_of(source.meta["val"]))


def _scalar_label(call: Call) -> Label:
    """A Python number read from a tensor: a size is shared, a value of examples is not."""
    if call.name in ("sym_size", "sym_numel", "sym_stride", "sym_storage_offset"):
        return Shared()
    return call.mixes("it reads a number out of the examples' values, and that number then applies to all of them")


def _check_output(position: int, node: fx.Node, label: Label, rows: int) -> None:
    """A loss per example must be able to find the examples in what the model returns."""
    if isinstance(label, Mixed):
        raise refusal(label, f"output {position} of the model")
    error = forbidden_output(position, node, label, rows)
    if error is not None:
        raise error


def _check_gradient(name: str, gradient: fx.Node, label: Label) -> None:
    if isinstance(label, (Summed, Whole)):
        return
    if isinstance(label, Mixed):
        raise refusal(label, f"the gradient of parameter '{name}'")
    if isinstance(label, Examples):
        raise ExampleMixingError(
            f"parameter '{name}' has an example axis of its own ({label}): its rows belong to positions in the batch",
            where=where(gradient),
            remedy="give the parameter no batch dimension, and broadcast it",
        )
    if not label.zero:
        raise UnsupportedGraphError(
            f"the gradient of parameter '{name}' does not come from the examples, so it cannot be clipped",
            where=where(gradient),
            remedy="keep regularisers on parameters out of the model (use the optimizer's weight_decay), or freeze it",
        )


def _check_input_gradient(name: str, gradient: fx.Node, source: Label, label: Label) -> None:
    """What flows back to the graph that made an input must lie there as the cotangent that its proof assumed."""
    if isinstance(label, Mixed):
        raise refusal(label, f"the gradient of input '{name}'")
    lies_right = isinstance(label, Whole) or (isinstance(label, Shared) and label.zero) or label == source
    if isinstance(source, (Examples, Whole)) and not lies_right:
        raise ExampleMixingError(
            f"the gradient of input '{name}' is {label}, and the input is {source}: what made the input could not find "
            "the examples in it",
            where=where(gradient),
            remedy="give every example its own gradient in the backward of a custom autograd.Function, or in a hook",
        )


def _name(node: fx.Node) -> str:
    return operation_name(node.target).removeprefix("python::")
