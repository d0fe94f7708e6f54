"""From what AOTAutograd makes of a captured graph to a joint graph with names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from dpcompile._torch.aot import (
    ForwardTokenAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
    is_gradient_of_input,
)
from dpcompile.capture.roles import Roles
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Examples
from dpcompile.graph.locate import where
from dpcompile.graph.sizes import size

__all__ = ["check_outputs", "name_joint", "returned", "written_inputs"]


def name_joint(module: fx.GraphModule, roles: Roles, *, trained: bool = True) -> JointGraph | None:
    """Read AOTAutograd's descriptors off a joint graph, or off a forward alone where nothing needs a gradient.

    Args:
        module: the graph, decomposed.
        roles: of its inputs before :func:`dpcompile.capture.inputs.extend`.
        trained: whether :func:`~dpcompile.capture.inputs.extend` gave it a mask and slots for norms and sums.

    Returns:
        The graph with names; None if nothing is trained and no example goes into it.

    Raises:
        UnsupportedGraphError: parameters or inputs that AOTAutograd replaced (views of one another, written to).
    """
    inputs, tangents = _inputs(module)
    if trained:
        _refuse_replaced(inputs, roles)
    axes = {inputs[p]: roles.layouts.get(p, Examples(dim)) for p, dim in roles.examples.items() if p in inputs}
    if not trained and not axes:
        return None
    described = returned(module)
    forward = {d: v for d, v in described if d is not None and is_gradient_of_input(d) is None}
    belongs = {t: d for d, t in tangents.items() if isinstance(forward.get(d), fx.Node)}
    outputs = (v for d, v in described if isinstance(d, PlainAOTOutput))
    slots = {p: i for i, (d, _) in enumerate(described) if (p := is_gradient_of_input(d)) is not None}
    flowing_on = {} if trained and roles.lowering is None else slots
    joint = JointGraph(
        module=module,
        example_axes=axes,
        tangent_of={t: forward[d] for t, d in belongs.items()},
        outputs=tuple(v if isinstance(v, fx.Node) else None for v in outputs),
        mask=next(iter(axes), inputs.get(roles.inputs)),  # type: ignore[arg-type]
        batch=roles.batch,
        names={inputs[p]: name for p, name in roles.names.items() if p in inputs},
        plain_tangents={t: d.idx for t, d in belongs.items() if isinstance(d, PlainAOTOutput)},
        input_gradients={
            inputs[p]: gradient
            for p, slot in flowing_on.items()
            if p in inputs and p < roles.inputs and p not in roles.parameters
            if isinstance(gradient := described[slot][1], fx.Node)
        },
        alike={inputs[p]: dims for p, dims in roles.alike.items() if p in inputs},
    )
    return _trained(joint, roles, inputs, slots) if trained else joint


def _trained(joint: JointGraph, roles: Roles, inputs: Mapping[int, fx.Node], slots: Mapping[int, int]) -> JointGraph:
    """With parameters, and with what was appended to the captured graph's inputs: see :func:`~.inputs.extend`."""
    mask, values = inputs[roles.inputs], joint.graph.output_node().args[0]
    third = roles.inputs + 2
    wide = {p: third + bool(roles.groups) + i for i, p in enumerate(roles.narrow)}
    return replace(
        joint,
        example_axes={**joint.example_axes, mask: Examples(0)},
        mask=mask,
        batch=size(mask.meta["val"].shape[0]),
        parameters={name: inputs[p] for p, name in roles.parameters.items()},
        gradients={name: values[slots[p]] for p, name in roles.parameters.items()},  # type: ignore[index, misc]
        norm_slot=slots[roles.inputs + 1],
        gradient_slots={name: slots[p] for p, name in roles.parameters.items()},
        sum_slots={name: slots[wide.get(p, p)] for p, name in roles.parameters.items()},
        weights=inputs[third] if roles.lowering is not None else None,
        bounds=inputs[third] if roles.groups else None,
        groups=roles.groups,
        group_slot=slots[third] if roles.groups else None,
    )


def _inputs(module: fx.GraphModule) -> tuple[dict[int, fx.Node], dict[Any, fx.Node]]:
    """The captured graph's inputs by position, and the cotangents by the output that each belongs to."""
    inputs: dict[int, fx.Node] = {}
    tangents: dict[Any, fx.Node] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        descriptor = node.meta.get("desc")
        if isinstance(descriptor, PlainAOTInput):
            inputs[descriptor.idx] = node
        elif isinstance(descriptor, TangentAOTInput):
            tangents[descriptor.output] = node
    return inputs, tangents


def _refuse_replaced(inputs: Mapping[int, fx.Node], roles: Roles) -> None:
    added = 3 if roles.groups else 2
    needed = (*roles.parameters, *roles.examples, *range(roles.inputs, roles.inputs + added))
    missing = [p for p in needed if p not in inputs]
    if missing:
        called = ", ".join(f"'{roles.names.get(p, p)}'" for p in missing)
        raise UnsupportedGraphError(
            f"inputs {called} share memory with others that the model writes to",
            remedy="clone the input before the in-place operation",
        )


def returned(module: fx.GraphModule) -> list[tuple[Any, Any]]:
    """What a graph returns, with AOTAutograd's descriptors."""
    output = module.graph.output_node()
    return list(zip(output.meta["desc"], output.args[0], strict=True))  # type: ignore[arg-type]


def written_inputs(module: fx.GraphModule) -> set[int]:
    """Positions of the captured graph's inputs that its joint graph writes to."""
    found = set()
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable:
            descriptors = [n.meta.get("desc") for n in node.all_input_nodes]
            found |= {d.idx for d in descriptors if isinstance(d, PlainAOTInput)}
    return found


def check_outputs(module: fx.GraphModule, roles: Roles) -> None:
    """Raise UnsupportedGraphError unless the user gets every output of a joint graph as the graph returns it.

    Of other outputs AOTAutograd makes what the user sees outside the graph, where nothing is proved: views of a base,
    subclasses of tensors, new values of inputs that need a gradient.
    """
    cotangents = (n.meta.get("desc") for n in module.graph.find_nodes(op="placeholder"))
    candidates = [*returned(module), *((d.output, None) for d in cotangents if isinstance(d, TangentAOTInput))]
    for descriptor, node in candidates:
        if descriptor is None or is_gradient_of_input(descriptor) is not None or isinstance(descriptor, _AS_IN_GRAPH):
            continue
        place = where(node) if isinstance(node, fx.Node) else None
        if isinstance(descriptor, InputMutationAOTOutput) and isinstance(descriptor.mutated_input, PlainAOTInput):
            raise UnsupportedGraphError(
                f"the model writes to '{roles.names.get(descriptor.mutated_input.idx)}', which needs a gradient, in "
                "place",
                where=place,
                remedy="clone it before the in-place operation; write to parameters only between two steps (an "
                "embedding with max_norm does so in every forward)",
            )
        raise UnsupportedGraphError(
            f"the model returns what is no plain tensor of the captured graph ({descriptor.expr()})",
            where=place,
            remedy="return plain tensors: no tensor subclasses, no views of inputs that are written to",
        )


_AS_IN_GRAPH = (PlainAOTOutput, ForwardTokenAOTOutput)
