"""When two captured graphs may share what they are compiled to."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile.regions.region import Scope

__all__ = ["graph_key"]


def graph_key(gm: fx.GraphModule, live: Sequence[Any], scope: Scope, proving: bool) -> Hashable | None:
    """Equal only for graphs that compute the same from inputs of the same kind; None if that cannot be told.

    Two graphs with equal keys have the same operations on the same operands and constants, inputs of equal shapes,
    strides, dtypes, devices and labels, and trainable parameters, frozen ones and other tensors in the same places, of
    which the same are one object. Which parameters they are is not in the key.
    """
    if any(n.op in ("get_attr", "call_module") for n in gm.graph.nodes):
        return None
    first: dict[int, int] = {}
    inputs = []
    for position, value in enumerate(live):
        if not isinstance(value, Tensor):
            return None
        parameter = id(value) in scope.parameters
        kind = "parameter" if parameter else str(scope.label(value))
        if parameter and scope.parameters[id(value)] in scope.shared:
            kind = "shared parameter"
        layout = (tuple(value.shape), value.stride(), value.storage_offset() % 16, value.dtype, value.device)
        inputs.append((layout, value.requires_grad, kind, first.setdefault(id(value), position)))
    fake = [n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder")]
    if any(isinstance(v, Tensor) and not all(isinstance(s, int) for s in v.shape) for v in fake):
        return None
    state = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _autocast(live))
    return (proving, state, tuple(inputs), _operations(gm))


def _autocast(live: Sequence[Any]) -> tuple[Any, ...]:
    kinds = sorted({x.device.type for x in live if isinstance(x, Tensor)})
    return tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds)


def _operations(gm: fx.GraphModule) -> tuple[Any, ...]:
    numbers: dict[fx.Node, int] = {}
    found = []
    for node in gm.graph.nodes:
        numbers[node] = len(numbers)
        if node.op == "placeholder":
            continue
        target = node.target if isinstance(node.target, str) else (id(node.target), repr(node.target))
        found.append((node.op, target, _text(node.args, numbers), _text(node.kwargs, numbers)))
    return tuple(found)


def _text(values: Any, numbers: dict[fx.Node, int]) -> str:
    if isinstance(values, fx.Node):
        return f"%{numbers[values]}"
    if isinstance(values, (list, tuple)):
        inside = ", ".join(_text(v, numbers) for v in values)
        return f"{type(values).__name__}({inside})"
    if isinstance(values, dict):
        return "{" + ", ".join(f"{k!r}: {_text(v, numbers)}" for k, v in values.items()) + "}"
    if isinstance(values, slice):
        return f"slice({_text(values.start, numbers)}, {_text(values.stop, numbers)}, {_text(values.step, numbers)})"
    return f"{type(values).__name__}:{values!r}"
