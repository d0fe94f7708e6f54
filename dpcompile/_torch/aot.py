"""AOTAutograd's joint graphs: descriptors, copies, further inputs, the cut in two."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch._decomp.decompositions
import torch._dynamo
from torch import fx
from torch._dynamo.source import (
    LocalSource,
)
from torch._functorch._aot_autograd.descriptors import (
    ForwardTokenAOTOutput,
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx.graph import CodeGen

__all__ = [
    "ForwardTokenAOTOutput",
    "GradAOTOutput",
    "InputMutationAOTOutput",
    "PlainAOTInput",
    "PlainAOTOutput",
    "TangentAOTInput",
    "add_inputs",
    "checkpoint_call",
    "copy_graph",
    "flat_graph",
    "is_gradient_of_input",
    "is_selective",
    "keep_source",
    "source_name",
    "partition",
    "plain_graph",
]


def is_gradient_of_input(descriptor: Any) -> int | None:
    """Which input of the captured graph an output of the joint graph is the gradient of; None if of none."""
    if isinstance(descriptor, GradAOTOutput) and isinstance(descriptor.grad_of, PlainAOTInput):
        return descriptor.grad_of.idx
    return None


def partition(joint: fx.GraphModule, forward_outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Forward and backward graphs as Inductor would cut them; ``joint`` is used up. Names of values stay."""
    return min_cut_rematerialization_partition(joint, None, compiler="inductor", num_fwd_outputs=forward_outputs)


def add_inputs(gm: fx.GraphModule, values: dict[str, torch.Tensor]) -> fx.GraphModule:
    """Copy a Dynamo graph and append placeholders, one for each fake tensor in ``values``.

    AOTAutograd asks every placeholder of a Dynamo graph for the source it was read from; the new ones get names that no
    Python local can have.
    """
    extended = fx.GraphModule(gm, copy_graph(gm.graph))
    extended.meta.update(gm.meta)
    for attribute in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, attribute):
            setattr(extended, attribute, getattr(gm, attribute))
    new = extended.graph.find_nodes(op="placeholder")
    for before, after in zip(gm.graph.find_nodes(op="placeholder"), new, strict=True):
        keep_source(before, after)
    last = new[-1] if new else extended.graph._root  # a graph of constants has no inputs
    for name, value in values.items():
        with extended.graph.inserting_after(last):
            last = extended.graph.placeholder(name)
        last.meta["example_value"] = value
        last._dynamo_source = LocalSource(f"<{name}>")  # type: ignore[attr-defined]
    extended.recompile()
    return extended


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph with copies of all nodes, their metadata shared; inputs and outputs are packed as before."""
    copied = fx.Graph()
    result = copied.graph_copy(graph, (nodes := {}), return_output_node=True)
    assert isinstance(result, tuple)
    value, old_output = result
    assert isinstance(old_output, fx.Node)
    output = copied.output(value, type_expr=getattr(old_output, "type", None))
    output.meta = dict(old_output.meta)
    copied._codegen = graph._codegen
    assert nodes
    return copied


def source_name(placeholder: fx.Node) -> str | None:
    """Where Dynamo read an input of its graph, as Python has it (``L['args'][0]``); None for inputs of ours."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", None)
    return name if name is None else str(name() if callable(name) else name)


def keep_source(before: fx.Node, after: fx.Node) -> None:
    """Let a copy of an input remember where Dynamo read it."""
    source = getattr(before, "_dynamo_source", None)
    if source is not None:
        cast(Any, after)._dynamo_source = source


def checkpoint_call(node: fx.Node) -> bool:
    """Whether a node of Dynamo's graph is a call of ``torch.utils.checkpoint.checkpoint``; its body is an attribute."""
    return node.op == "call_function" and node.target is torch.ops.higher_order.tag_activation_checkpoint


def is_selective(body: fx.GraphModule) -> bool:
    """Whether the body of a checkpoint has a policy of what is kept."""
    return "_checkpoint_context_fn" in body.meta


def plain_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph with flat inputs and outputs, under the names that they have."""
    graph = copy_graph(module.graph)
    graph._codegen = CodeGen()
    return fx.GraphModule(module, graph)


def flat_graph(module: fx.GraphModule) -> tuple[fx.GraphModule, list[int | None]]:
    """A joint graph as a plain function of flat inputs, those that it uses.

    Returns:
        The module; for every input its position before joint tracing (None for a cotangent).
    """
    graph = copy_graph(module.graph)
    graph._codegen = CodeGen()
    sources: list[int | None] = []
    for node in graph.find_nodes(op="placeholder"):
        if not node.users:
            graph.erase_node(node)
            continue
        descriptor = node.meta.get("desc")
        sources.append(descriptor.idx if isinstance(descriptor, PlainAOTInput) else None)
    return fx.GraphModule(module, graph), sources
