"""Taking examples apart: from an example axis anywhere to examples in front, and weights back onto the axis."""

from __future__ import annotations

import torch
from torch import Tensor

from dpcompile.graph.labels import Examples

__all__ = ["accumulation_dtype", "in_front", "order_in_memory", "scaled"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms and sums are taken in float32, or in the model's own dtype where that is wider."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def _apart(value: Tensor, axis: Examples, batch: int) -> Tensor:
    """``[.., outer * B * inner, ..]`` to ``[.., outer, B, inner, ..]``."""
    outer = axis.outer if isinstance(axis.outer, int) else -1
    inner = axis.inner if isinstance(axis.inner, int) else -1
    if outer == -1 and inner == -1:
        raise NotImplementedError("an example axis between two symbolic sizes")
    return value.unflatten(axis.dim, (outer, batch, inner))


def in_front(value: Tensor, axis: Examples, batch: int) -> Tensor:
    """``[.., outer * B * inner, ..]`` to ``[B, .., outer * inner, ..]``."""
    apart = _apart(value, axis, batch).movedim(axis.dim + 1, 0)
    return apart.flatten(axis.dim + 1, axis.dim + 2)


def scaled(value: Tensor, axis: Examples, weights: Tensor) -> Tensor:
    """Every example's slice times its weight; a weight of 0 gives exact zeros, whatever the slice holds.

    **Guarantee.** An example of weight 0 leaves no trace, also where its values are NaN or infinite (``0 * nan`` would
    be NaN). The result has at least the dtype of ``weights``.

    The result lies in memory as ``value`` does: a compiler gives a product the order of its axes, and would move every
    element of a transposed value to another place.
    """
    order = order_in_memory(value)
    if order != sorted(order):
        back = [order.index(i) for i in range(value.ndim)]
        return scaled(value.permute(order), axis.at(back[axis.dim]), weights).permute(back)
    apart = _apart(value, axis, weights.shape[0])
    trailing = apart.ndim - axis.dim - 2
    weight = weights.reshape(-1, *([1] * trailing))
    product = torch.where(weight == 0, torch.zeros((), dtype=weights.dtype, device=weights.device), apart * weight)
    return product.flatten(axis.dim, axis.dim + 2)


def order_in_memory(value: Tensor) -> list[int]:
    """The axes from the longest stride to the shortest; as they are if a stride is a symbol."""
    strides = value.stride()
    if not all(isinstance(s, int) for s in strides):
        return list(range(value.ndim))
    return sorted(range(value.ndim), key=lambda i: -strides[i])
