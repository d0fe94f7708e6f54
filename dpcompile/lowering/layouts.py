"""Filters with their channels last: what Inductor makes of them on CPUs, once for all parts of a batch.

Inductor copies filters and images so for every convolution of two dimensions of space, in each forward of its own, and
keeps the copies for the backward: a batch in eight parts would hold eight of each filter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["copied_bytes", "filters_of", "inputs_to_compile", "laid_out", "shared_by_parts"]

_CONVOLUTIONS = ("conv2d", "conv_transpose2d")


def filters_of(gm: fx.GraphModule, inputs: Sequence[Any], parameters: Mapping[int, str]) -> dict[int, str]:
    """The parameters among the inputs of Dynamo's graph that Inductor copies as filters: position -> name.

    Args:
        gm: the graph.
        inputs: its inputs.
        parameters: position -> name.
    """
    return {i: parameters[i] for i in _copied(gm, inputs, "weight") if i in parameters}


def copied_bytes(gm: fx.GraphModule, inputs: Sequence[Any], filters: Mapping[int, str], parts: int) -> int:
    """Bytes of these filters, which all parts share, and of every part's images that Inductor copies too."""
    images = sum(inputs[i].nbytes for i in _copied(gm, inputs, "input"))
    return sum(inputs[i].nbytes for i in filters) + parts * images


def inputs_to_compile(gm: fx.GraphModule, inputs: Sequence[Any], filters: Mapping[int, str]) -> list[Any]:
    """The graph's inputs with these filters as :func:`shared_by_parts` will hand them over.

    They are fake: a live tensor that Dynamo does not know would get symbols for its sizes.
    """
    found = list(inputs)
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if i in filters:
            found[i] = laid_out(node.meta["example_value"]).requires_grad_(inputs[i].requires_grad)
    return found


def shared_by_parts(known: dict[str, Tensor], filters: Mapping[int, str], inputs: Sequence[Any]) -> dict[int, Tensor]:
    """Position -> these filters laid out; what is not ``known`` by name yet is added to it."""
    for i, name in filters.items():
        if name not in known:
            known[name] = laid_out(inputs[i])
    return {i: known[name] for i, name in filters.items()}


def laid_out(value: Tensor) -> Tensor:
    """The values with the channels last, apart from autograd."""
    return value.detach().contiguous(memory_format=torch.channels_last)


def _copied(gm: fx.GraphModule, inputs: Sequence[Any], operand: str) -> list[int]:
    """Positions of inputs that are this operand of a convolution and do not lie as Inductor wants it."""
    used = set()
    for node in gm.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") in _CONVOLUTIONS:
            used.add((dict(zip(("input", "weight"), node.args, strict=False)) | dict(node.kwargs))[operand])
    placeholders = enumerate(gm.graph.find_nodes(op="placeholder"))
    return [i for i, node in placeholders if node in used and _is_copied(inputs[i])]


def _is_copied(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.ndim != 4 or value.device.type != "cpu":
        return False
    return not value.is_contiguous(memory_format=torch.channels_last)
