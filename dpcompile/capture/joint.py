"""From what AOTAutograd makes of a captured graph to a joint graph with names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from dpcompile._torch.aot import (
    ForwardTokenAOTOutput,
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from dpcompile.capture.roles import Roles
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Examples
from dpcompile.graph.locate import where
from dpcompile.graph.sizes import size

__all__ = ["check_outputs", "name_joint", "written_inputs"]


def name_joint(module: fx.GraphModule, roles: Roles) -> JointGraph:
    """Read AOTAutograd's descriptors off a joint graph.

    Args:
        module: the joint graph, decomposed.
        roles: of the inputs before :func:`extend`.

    Raises:
        UnsupportedGraphError: parameters or inputs that AOTAutograd replaced (views of one another, written to).
    """
    inputs = roles.inputs
    by_position: dict[int, fx.Node] = {}
    tangents: dict[Any, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op != "placeholder":
            continue
        descriptor = node.meta.get("desc")
        if isinstance(descriptor, PlainAOTInput):
            by_position[descriptor.idx] = node
        elif isinstance(descriptor, TangentAOTInput):
            tangents[descriptor.output] = node
    missing = [p for p in (*roles.parameters, *roles.examples, inputs, inputs + 1) if p not in by_position]
    if missing:
        called = ", ".join(f"'{roles.names.get(p, p)}'" for p in missing)
        raise UnsupportedGraphError(
            f"inputs {called} share memory with others that the model writes to",
            remedy="clone the input before the in-place operation",
        )
    output = module.graph.output_node()
    values: Sequence[Any] = output.args[0]  # type: ignore[assignment]
    descriptors: Sequence[Any] = output.meta["desc"]
    slots = {d.grad_of.idx: i for i, d in enumerate(descriptors) if _is_gradient(d)}
    forward = {d: values[i] for i, d in enumerate(descriptors) if not _is_gradient(d) and d is not None}
    outputs = [values[i] for i, d in enumerate(descriptors) if isinstance(d, PlainAOTOutput)]
    return JointGraph(
        module=module,
        parameters={name: by_position[p] for p, name in roles.parameters.items()},
        gradients={name: values[slots[p]] for p, name in roles.parameters.items()},
        example_axes={by_position[p]: roles.layouts.get(p, Examples(dim)) for p, dim in roles.examples.items()}
        | {by_position[inputs]: Examples(0)},
        tangent_of={t: forward[d] for d, t in tangents.items() if isinstance(forward.get(d), fx.Node)},
        outputs=tuple(v if isinstance(v, fx.Node) else None for v in outputs),
        mask=by_position[inputs],
        names={by_position[p]: name for p, name in roles.names.items() if p in by_position},
        norm_slot=slots[inputs + 1],
        gradient_slots={name: slots[p] for p, name in roles.parameters.items()},
        sum_slots={
            name: slots[inputs + 2 + roles.narrow.index(p) if p in roles.narrow else p]
            for p, name in roles.parameters.items()
        },
        batch=size(by_position[inputs].meta["val"].shape[0]),
        plain_tangents={
            t: d.idx
            for d, t in tangents.items()
            if isinstance(d, PlainAOTOutput) and isinstance(forward.get(d), fx.Node)
        },
        input_gradients={
            by_position[p]: gradient
            for p, slot in slots.items()
            if roles.lowering is not None and p in by_position and p < inputs and p not in roles.parameters
            if isinstance(gradient := values[slot], fx.Node)
        },
        weights=by_position[inputs + 2] if roles.lowering is not None else None,
        alike={by_position[p]: dims for p, dims in roles.alike.items() if p in by_position},
    )


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
    output = module.graph.output_node()
    returned = zip(output.meta["desc"], output.args[0], strict=True)  # type: ignore[arg-type]
    cotangents = (n.meta.get("desc") for n in module.graph.find_nodes(op="placeholder"))
    candidates = [*returned, *((d.output, None) for d in cotangents if isinstance(d, TangentAOTInput))]
    for descriptor, node in candidates:
        if descriptor is None or _is_gradient(descriptor) or isinstance(descriptor, _AS_IN_GRAPH):
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


def _is_gradient(descriptor: Any) -> bool:
    return isinstance(descriptor, GradAOTOutput) and isinstance(descriptor.grad_of, PlainAOTInput)
