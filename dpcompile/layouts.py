"""Filters with their channels last: what Inductor makes of them on CPUs, once for all parts of a batch.

Inductor copies filters and images so for every convolution of two dimensions of space, in each forward of its own, and
keeps the copies for the backward: a batch in eight parts would hold eight of each filter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["copied_bytes", "filters_of", "laid_out"]

_CONVOLUTIONS = ("conv2d", "conv_transpose2d")


def filters_of(gm: fx.GraphModule, inputs: Sequence[Any], parameters: Mapping[int, str]) -> dict[int, str]:
    """The parameters among the inputs of Dynamo's graph that Inductor copies as filters: position -> name.

    Args:
        gm: the graph.
        inputs: its inputs.
        parameters: position -> name.
    """
    used = {filters for _, filters in _operands(gm)}
    places = [i for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if node in used]
    return {i: parameters[i] for i in places if i in parameters and _is_copied(inputs[i])}


def copied_bytes(gm: fx.GraphModule, inputs: Sequence[Any], filters: Mapping[int, str], parts: int) -> int:
    """Bytes of these filters, which all parts share, and of every part's images that Inductor copies too."""
    used = {images for images, _ in _operands(gm)}
    places = [i for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if node in used]
    images = sum(inputs[i].nbytes for i in places if _is_copied(inputs[i]))
    return sum(inputs[i].nbytes for i in filters) + parts * images


def laid_out(value: Tensor) -> Tensor:
    """The values with the channels last, apart from autograd."""
    return value.detach().contiguous(memory_format=torch.channels_last)


def _operands(gm: fx.GraphModule) -> Iterator[tuple[Any, Any]]:
    """Images and filters of every convolution."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") in _CONVOLUTIONS:
            named = dict(zip(("input", "weight"), node.args, strict=False)) | dict(node.kwargs)
            yield named["input"], named["weight"]


def _is_copied(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.ndim != 4 or value.device.type != "cpu":
        return False
    return not value.is_contiguous(memory_format=torch.channels_last)
