"""What leaves a proved graph: outputs, and writes that outlive it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from dpcompile.errors import DPCompileError, ExampleMixingError, UnsupportedGraphError
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Examples, Label, Shared, Summed
from dpcompile.graph.locate import module_of, where
from dpcompile.graph.sizes import is_one, same, shape_of
from dpcompile.proof.rules.registry import Labels

__all__ = ["forbidden_output", "forbidden_write", "kept_number"]


def forbidden_output(position: int, node: fx.Node, label: Label, rows: int = 1) -> DPCompileError | None:
    """Why a loss per example could not find the examples in a differentiable output; None if it can.

    With ``rows`` of the call to each of them it finds rows.

    **Guarantee.** The cotangent of a per-example output can be as much per example, and that of a sum over examples is
    one number: a vector of sums has as only use what is not linear in it, and then every example's gradient depends on
    all of them.
    """
    if isinstance(label, Examples) and label.dim and not (is_one(label.outer) and same(label.inner, rows)):
        return ExampleMixingError(
            f"output {position} of the model has the {label}, interleaved with other positions: a loss would take "
            "parts of several examples for one",
            where=where(node),
            remedy="return values whose examples have a dimension of their own, or are flattened into dimension 0",
        )
    if isinstance(label, Summed) and not all(is_one(n) for n in shape_of(node.meta["val"])):
        return ExampleMixingError(
            f"output {position} of the model is a sum or mean over the examples, and no single number: a loss of it "
            "would make every example's gradient depend on all the others",
            where=where(node),
            remedy="return it per example, or detach() it if it is only looked at; a loss summed over the batch is one "
            "number",
        )
    return None


def forbidden_write(joint: JointGraph, destination: fx.Node, source: fx.Node, label: Label) -> DPCompileError | None:
    """Why a value may not be written into an input; None if it may."""
    name, own = joint.input_name(destination), joint.example_axes.get(destination)
    if destination in joint.parameters.values():
        return UnsupportedGraphError(
            f"the model writes to parameter '{name}' while it is trained: which of its values the gradient belongs to "
            "is not defined",
            where=where(source),
            remedy="compute the value in forward without writing it back, write it between two steps, or freeze it",
        )
    if isinstance(label, Shared) or (own is not None and (label == own or is_one(joint.batch))):
        return None
    if own is not None:
        return ExampleMixingError(
            f"input '{name}' is overwritten with values in which examples do not keep their places ({label}): who "
            "passes it again passes mixed examples",
            where=where(source),
            remedy="do not write to the input; clone it first",
        )
    inside = next((m for n in [source, *source.all_input_nodes] if (m := module_of(n)) is not None), None)
    if inside is not None and issubclass(inside[1], torch.nn.modules.batchnorm._BatchNorm):
        return ExampleMixingError(
            f"{inside[1].__name__} in training mode writes the statistics of the batch into its buffers "
            f"(module {inside[0]})",
            where=where(source),
            remedy="use GroupNorm (dpcompile.replace_batchnorm) or LayerNorm, or call .eval() on BatchNorm layers that "
            "hold running statistics, to freeze these",
        )
    remedy = "remove the in-place write, or compute the statistic outside the private model"
    if inside is not None and issubclass(inside[1], torch.nn.modules.instancenorm._InstanceNorm):
        remedy = f"make the {inside[1].__name__} with track_running_stats=False, or call .eval() on it"
    return ExampleMixingError(
        f"buffer '{name}' is written with values that depend on the examples ({label}): "
        "they would be published with the model, without noise",
        where=where(source),
        remedy=remedy,
    )


def kept_number(node: fx.Node, labels: Mapping[fx.Node, Labels]) -> DPCompileError | None:
    """Why a value may not leave the graph: it holds a Python number that was read out of examples.

    Dynamo hands such a number to the user's code as a Python object. An attribute may keep it, and the next batch meets
    it as a constant, where no proof sees it.
    """
    number = _number_behind(node, labels)
    if number is None:
        return None
    return ExampleMixingError(
        "the model reads a Python number out of the values of examples, and keeps or returns it: the next batch could "
        "meet it as a constant",
        where=where(number),
        remedy="leave it a tensor (no .item(), float() or int()), and keep nothing of a batch in attributes",
    )


def _number_behind(node: fx.Node, labels: Mapping[fx.Node, Labels]) -> fx.Node | None:
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        value = current.meta.get("val")
        if current.op == "call_function" and isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            if not isinstance(labels[current], Shared):
                return current
        found = [n for n in current.all_input_nodes if n not in seen and not isinstance(labels[n], Shared)]
        seen.update(found)
        stack.extend(found)
    return None
