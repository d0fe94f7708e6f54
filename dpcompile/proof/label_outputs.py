"""Graphs in which no parameter is trained: proved and labelled, not rewritten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from dpcompile._torch.aot import PlainAOTInput, PlainAOTOutput, TangentAOTInput, is_gradient_of_input
from dpcompile.capture.joint import check_outputs
from dpcompile.capture.roles import Roles
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Examples, Label, Shared
from dpcompile.proof.prove import prove
from dpcompile.proof.replication import check_replication, refuse_ranks_own
from dpcompile.proof.rules import Rows
from dpcompile.proof.scaling import check_scaling
from dpcompile.proof.unowned import erase_cotangents

__all__ = ["label_outputs"]


def label_outputs(
    module: fx.GraphModule, roles: Roles, *, mean: bool
) -> tuple[tuple[Label, ...], Mapping[int, str | None]]:
    """Prove that examples do not mix on the way through, forward and backward.

    Args:
        module: a decomposed joint graph, or a forward alone where nothing needs a gradient.
        roles: of its inputs.
        mean: the loss is a mean over the batch.

    Returns:
        The labels of the captured graph's outputs; positions of outputs that depend on no example, with the user's
        line.

    **Guarantee.** Outputs lie as labelled, and the gradient of every input with an example axis lies like the input if
    the cotangents of the outputs lie like the outputs.
    """
    joint = _named(module, roles)
    if joint is None:
        refuse_ranks_own(module.graph, roles.ranks)
        return _of_no_example(module, roles), {}
    check_outputs(module, roles)
    proof = prove(joint)
    unowned = erase_cotangents(joint, proof)
    if unowned:
        proof = prove(joint)
    check_scaling(joint, proof, mean=mean, twice=False)
    check_replication(joint, proof, roles.ranks)
    module.recompile()
    return tuple(proof.leaving(n) for n in joint.outputs), unowned


def _of_no_example(module: fx.GraphModule, roles: Roles) -> tuple[Label, ...]:
    """Labels of the outputs where all is shared."""
    labels: dict[fx.Node, Label] = {}
    for node in module.graph.nodes:
        descriptor = node.meta.get("desc")
        known = roles.alike.get(descriptor.idx, ()) if isinstance(descriptor, PlainAOTInput) else ()
        labels[node] = Shared(alike=known)
    rows = Rows(labels, roles.batch, {})
    return tuple(
        Shared(alike=rows.alike(v) if isinstance(v, fx.Node) else ())
        for d, v in _described(module)
        if isinstance(d, PlainAOTOutput)
    )


def _described(module: fx.GraphModule) -> list[tuple[Any, Any]]:
    """What a graph returns, with AOTAutograd's descriptors."""
    output = module.graph.output_node()
    return list(zip(output.meta["desc"], output.args[0], strict=True))  # type: ignore[arg-type]


def _named(module: fx.GraphModule, roles: Roles) -> JointGraph | None:
    """The graph with names; None if no example goes into it."""
    by_position: dict[int, fx.Node] = {}
    tangents: dict[Any, fx.Node] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        descriptor = node.meta.get("desc")
        if isinstance(descriptor, PlainAOTInput):
            by_position[descriptor.idx] = node
        elif isinstance(descriptor, TangentAOTInput):
            tangents[descriptor.output] = node
    axes = {
        by_position[p]: roles.layouts.get(p, Examples(dim)) for p, dim in roles.examples.items() if p in by_position
    }
    if not axes:
        return None
    pairs = _described(module)
    forward = {d: v for d, v in pairs if d is not None and is_gradient_of_input(d) is None}
    outputs = [v for d, v in pairs if isinstance(d, PlainAOTOutput)]
    gradients = {
        by_position[p]: v
        for d, v in pairs
        if isinstance(v, fx.Node) and (p := is_gradient_of_input(d)) is not None and p in by_position
    }
    return JointGraph(
        module=module,
        parameters={},
        gradients={},
        example_axes=axes,
        tangent_of={t: forward[d] for d, t in tangents.items() if isinstance(forward.get(d), fx.Node)},
        outputs=tuple(v if isinstance(v, fx.Node) else None for v in outputs),
        mask=next(iter(axes)),
        names={by_position[p]: name for p, name in roles.names.items() if p in by_position},
        norm_slot=-1,
        gradient_slots={},
        sum_slots={},
        batch=roles.batch,
        plain_tangents={
            t: d.idx
            for d, t in tangents.items()
            if isinstance(d, PlainAOTOutput) and isinstance(forward.get(d), fx.Node)
        },
        input_gradients=gradients,
        alike={by_position[p]: dims for p, dims in roles.alike.items() if p in by_position},
    )
