"""Convolutions: every example's gradient and the Gram matrix of patches, without an unfolded copy of the images.

Shape letters as in :mod:`dpcompile.norms.factors`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpcompile.graph.labels import Examples
from dpcompile.graph.slices import in_front
from dpcompile.kernels.filter_op import (
    bounded_filter_norms,
    certain_filter_norms,
    filter_gradients,
    filter_norms,
    grouped_convolution,
)
from dpcompile.kernels.filters import Geometry, fullness
from dpcompile.kernels.gram import gram, gram_norms
from dpcompile.kernels.kept import squared_norms
from dpcompile.kernels.rates import rates_for
from dpcompile.norms.patches import patches

__all__ = [
    "Window",
    "channels_first",
    "channels_last",
    "each_gradient",
    "each_norm",
    "filled",
    "ghost_of_patches",
    "patch_columns",
    "patch_columns_last",
    "patch_gram",
]


@dataclass(frozen=True, slots=True)
class Window:
    """Where a filter looks: one number per spatial dimension, and the groups.

    A transposed convolution is the adjoint of a convolution, so its input and output exchange their parts: the filter
    looks at the *large* images from every position of the *small* ones.
    """

    kernel: tuple[int, ...]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


def filled(value: Tensor, shape: Sequence[int], window: Window) -> float:
    """How full our filter kernel's tiles are; 0 where torch's convolution is to be taken.

    Args:
        value: of the images, or as they are.
        shape: of the filters.
        window: theirs.
    """
    if value.device.type != "cpu" or value.dtype == torch.float64:
        return 0.0
    full = fullness(Geometry(shape, window.stride, window.padding, window.dilation, window.groups))
    return full if rates_for(value.device).own_filters(full) else 0.0


def each_gradient(
    cotangent: Tensor,
    source: Tensor,
    axis: Examples,
    batch: int,
    shape: Any,
    options: Any,
    own: bool,
    reuse: bool,
    kept: bool,
) -> tuple[Tensor, Tensor]:
    """Every example's gradient of the filters, and its squared norm.

    Args:
        cotangent: ``[N, C', *spatial]``.
        source: ``[N, C, *spatial]``.
        axis: the examples along N.
        batch: B.
        shape: of the filters.
        options: stride, padding, dilation (one number for each dimension), whether it is transposed, output padding and
            groups.
        own: whether by our kernel, on CPUs.
        reuse: whether the result's memory stays mapped for the next step, on CPUs.
        kept: whether the clipped sum is made of the result; if not, the norm is right or too large: what rounding may
            have moved is added.

    Returns:
        ``[B, *shape]``, and ``[B]``, float64.
    """
    front, images = in_front(cotangent, axis, batch), in_front(source, axis, batch)
    if source.device.type == "cpu":
        return filter_gradients(front, images, list(shape), *options, own, reuse, kept)
    each = grouped_convolution(front, images, list(shape), *options)
    squared = squared_norms(each)
    return each, squared if kept else bounded_filter_norms(squared, front, images, list(shape), *options)


def each_norm(cotangent: Tensor, source: Tensor, axis: Examples, batch: int, shape: Any, options: Any) -> Tensor:
    """The norms of :func:`each_gradient` by our kernel, without the gradients: ``[B]``."""
    front, images = in_front(cotangent, axis, batch), in_front(source, axis, batch)
    return filter_norms(front, images, list(shape), *options)


def patch_columns(large: Tensor, window: Window, axis: Examples, batch: int, spatial: Sequence[int]) -> Tensor:
    """The patches as columns, unfolded: ``[B, G, F * S, C/G * kernel]``."""
    windows = patches(large, window.kernel, window.stride, window.padding, window.dilation, spatial)
    return positions_in_rows(windows.unflatten(1, (window.groups, -1)).flatten(2, -2), axis, batch)


def patch_columns_last(large: Tensor, window: Window, axis: Examples, batch: int, spatial: Sequence[int]) -> Tensor:
    """The same with the channels last, of one group: ``[B, 1, F * S, kernel * C]``."""
    windows = patches(large, window.kernel, window.stride, window.padding, window.dilation, spatial)
    return positions_in_rows(windows.movedim(1, -2).flatten(1, -2).unsqueeze(1), axis, batch)


def channels_last(filters: Tensor) -> Tensor:
    """Values of filters ``[P, C, *kernel]`` as rows in the order of :func:`patch_columns_last`: ``[P, kernel * C]``.

    It is how Inductor lays filters out on CPUs: a view of what it has.
    """
    return filters.movedim(1, -1).flatten(1)


def channels_first(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`channels_last`, for filters of this shape."""
    return rows.unflatten(1, (*shape[2:], shape[1])).movedim(-1, 1)


def positions_in_rows(value: Tensor, axis: Examples, batch: int) -> Tensor:
    """``[N, G, P, S]`` to ``[B, G, F * S, P]``."""
    front = in_front(value, axis, batch)  # [B, F, G, P, S]
    return front.permute(0, 2, 1, 4, 3).flatten(2, 3)


def ghost_of_patches(
    cotangent: Tensor, source: Tensor, window: Window, axis: Examples, batch: int, shape: Any, options: Any
) -> Tensor:
    """The norms of :func:`each_gradient` from the Gram matrices of cotangents and patches: ``[B]``, float64."""
    small, large = (source, cotangent) if options[3] else (cotangent, source)
    rows = positions_in_rows(small.flatten(2).unflatten(1, (window.groups, -1)), axis, batch)
    totals, sizes = gram_norms(gram(rows, 1), patch_gram(large, window, axis, batch, small.shape[2:]), 1)
    front, images = in_front(cotangent, axis, batch), in_front(source, axis, batch)
    return certain_filter_norms(totals, sizes, front, images, list(shape), *options)


def patch_gram(large: Tensor, window: Window, axis: Examples, batch: int, spatial: Sequence[int]) -> Tensor:
    """All inner products of patches, ``[B, G, F * S, F * S]``, in float64, from those of pixels.

    ``<patch_s, patch_s'> = sum over offsets o of the filter of <pixel_(s+o), pixel_(s'+o)>``: the Gram matrix of the
    pixels, looked at through the filter's window, offset by offset.
    """
    amounts = [a for p in reversed(window.padding) for a in (p, p)]
    images = in_front(F.pad(large, amounts) if any(amounts) else large, axis, batch)  # [B, F, C, *padded]
    frames, padded = images.shape[1], images.shape[3:]
    pixels = images.unflatten(2, (window.groups, -1)).flatten(4).permute(0, 2, 1, 4, 3).flatten(2, 3)
    products = gram(pixels, 1).unflatten(3, (frames, *padded)).unflatten(2, (frames, *padded))
    count = len(window.kernel)
    total: Tensor | None = None
    for offset in itertools.product(*(range(k) for k in window.kernel)):
        seen = products
        for d in range(count):
            start = offset[d] * window.dilation[d]
            end = start + window.stride[d] * (spatial[d] - 1) + 1
            for dim in (3 + d, 4 + count + d):
                seen = torch.ops.aten.slice.Tensor(seen, dim, start, end, window.stride[d])
        total = seen if total is None else total + seen
    assert total is not None
    positions = frames * prod(spatial)
    return total.reshape(batch, window.groups, positions, positions)
