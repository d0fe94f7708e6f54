"""What a captured graph returns: every differentiable output gets memory of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dpcompile._torch.tensors import memory_of
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.sizes import is_one, shape_of, size

__all__ = ["check_differentiable", "detach_all_but", "separate_outputs"]


def check_differentiable(gm: fx.GraphModule) -> None:
    """Raise UnsupportedGraphError if no output needs a gradient: there would be no backward to clip."""
    if not any(_needs_gradient(node) for node in _outputs(gm)):
        raise UnsupportedGraphError(
            "no output of the model depends on its parameters in a way that can be differentiated, so there is no "
            "gradient to clip",
            remedy="look for detach(), no_grad() and rounding on the way to the outputs; where no training is meant, "
            "call the model under torch.no_grad()",
        )


def detach_all_but(gm: fx.GraphModule, kept: int) -> None:
    """Let no output but number ``kept`` need a gradient. The same value twice stays what it is in place ``kept``."""
    output = gm.graph.output_node()
    own: list[object] = []
    for position, node in enumerate(output.args[0]):  # type: ignore[arg-type]
        if position != kept and isinstance(node, fx.Node) and _needs_gradient(node):
            value = _value(node)
            with gm.graph.inserting_before(output):
                detached = gm.graph.call_function(torch.detach, (node,))
            detached.meta = {**node.meta, "example_value": value.detach()}
            node = detached
        own.append(node)
    output.args = (tuple(own),)  # type: ignore[assignment]
    gm.recompile()


def separate_outputs(gm: fx.GraphModule) -> None:
    """Copy every differentiable output that shares memory with an input, with another output, or with itself.

    Of such an output AOTAutograd returns the base, and makes the view itself, outside the graph: a view that picks one
    example for all would not be proved, and the gradient of a view of a parameter would reach it unclipped. And it lays
    a cotangent out as it lays out the output: of positions that share memory only one survives (seen with
    ``Tensor.unfold``, torch 2.11 to 2.15).

    Contract: equal values; no two differentiable outputs, and no such output and input, share memory.
    """
    taken = {memory_of(v) for n in gm.graph.find_nodes(op="placeholder") if isinstance(v := _value(n), Tensor)}
    output = gm.graph.output_node()
    own: list[object] = []
    for node in output.args[0]:  # type: ignore[union-attr]
        if isinstance(node, fx.Node) and _needs_gradient(node):
            value = _value(node)
            if memory_of(value) in taken or _may_overlap(value):
                with gm.graph.inserting_before(output):
                    layout: Any = {"memory_format": torch.contiguous_format}
                    copied = gm.graph.call_function(torch.clone, (node,), layout)
                copied.meta = {**node.meta, "example_value": value.clone(memory_format=torch.contiguous_format)}
                node = copied
            taken.add(memory_of(value))
        own.append(node)
    output.args = (tuple(own),)  # type: ignore[assignment]


def _outputs(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.output_node().args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]


def _value(node: fx.Node) -> Tensor:
    return node.meta.get("example_value")  # type: ignore[return-value]


def _needs_gradient(node: fx.Node) -> bool:
    value = _value(node)
    return isinstance(value, Tensor) and value.requires_grad


def _may_overlap(value: torch.Tensor) -> bool:
    """Whether two positions may share memory, other than by ``expand`` (stride 0), which AOTAutograd sees itself."""
    dims = [(size(s), n) for s, n in zip(value.stride(), shape_of(value), strict=True) if not is_one(n)]
    dims = [(step, n) for step, n in dims if step != 0]
    if not all(isinstance(step, int) and isinstance(n, int) for step, n in dims):
        return not value.is_contiguous()
    extent = 1
    for step, n in sorted(dims):  # type: ignore[type-var]
        if step < extent:  # type: ignore[operator]
            return True
        extent += (n - 1) * step  # type: ignore[operator]
    return False
