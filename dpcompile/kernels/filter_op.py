"""Every example's gradient of a convolution's filters: by a kernel of ours, or as one convolution by torch.

Torch's has the examples among the groups (Rochette, Manoel and Tramel 2019, arXiv:1912.06015).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpcompile.kernels.exact import norms_of, rounded_again, settled
from dpcompile.kernels.exact_convolution import filters_gradient
from dpcompile.kernels.filters import Geometry, additions, gradients_, takes
from dpcompile.kernels.operators import operator
from dpcompile.kernels.precision import full_precision
from dpcompile.kernels.rounding import WIDE, gamma, linear_slack, unit_of
from dpcompile.kernels.squares import squares_of
from dpcompile.kernels.workspace import kept_gradients

__all__ = ["bounded_filter_norms", "certain_filter_norms", "filter_gradients", "filter_norms", "grouped_convolution"]

_AT_ONCE = 2**20  # elements of images, cotangents and filters that torch works on at once: they stay in the cache


def grouped_convolution(cotangent: Tensor, source: Tensor, shape: Sequence[int], *options: Any) -> Tensor:
    """Every example's gradient of the filters, by torch, in full precision.

    Args:
        cotangent: ``[B, F, C', *spatial]``.
        source: ``[B, F, C, *spatial]``.
        shape: of the filters.
        options: stride, padding, dilation, whether it is transposed, output padding and groups of the convolution.

    Returns:
        ``[B, *shape]``.
    """
    batch = source.shape[0]
    images, cotangents = (x.movedim(0, 1).flatten(1, 2) for x in (source, cotangent))  # [F, B * C, *spatial]
    *others, groups = options
    result = filters_gradient(cotangents, images, (batch * shape[0], *shape[1:]), *others, groups * batch)
    return result.reshape(batch, *shape)


# Operands come as they lie in memory: the kernel takes any strides, and what Inductor chose is what it likes best.
_ANY_STRIDES = (torch.Tag.flexible_layout,)


@operator("filter_gradients", tags=_ANY_STRIDES)
def filter_gradients(
    cotangent: Tensor,
    source: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    own: bool,
    reuse: bool,
    kept: bool = True,
) -> tuple[Tensor, Tensor]:
    """Every example's gradient of the filters and its squared norm, for CPUs.

    Arguments as for :func:`grouped_convolution`, and ``own``: whether our kernel makes it, where it can; ``reuse``:
    whether the result's memory stays mapped for the next step; ``kept``: whether the clipped sum is made of the result.

    **Guarantee.** Kept, the norm is that of the result, as in
    :func:`dpcompile.kernels.product_op.product_with_norms`; else it is right or too large, as in :func:`filter_norms`.

    Returns:
        ``[B, *shape]``, each filter with its channels last in memory, and ``[B]``, float64.
    """
    batch = source.shape[0]
    lying = (batch, shape[0], *shape[2:], shape[1])
    memory = kept_gradients.take(lying, source) if reuse else source.new_empty(lying)
    result = memory.movedim(-1, 2)
    options = (stride, padding, dilation, transposed, output_padding, groups)
    small, large = (source, cotangent) if transposed else (cotangent, source)
    geometry, places = Geometry(shape, stride, padding, dilation, groups), small.shape[3:]
    if own and takes(small, large, memory):
        squared, sizes = gradients_(large, small, geometry, memory)
        roundings = additions(small.shape[1], places)
    else:
        each = (source.numel() + cotangent.numel() + 2 * result.numel()) // max(batch, 1)
        size = max(1, _AT_ONCE // max(each, 1))
        with full_precision():
            for start in range(0, batch, size):
                part = slice(start, start + size)
                result[part] = grouped_convolution(cotangent[part], source[part], shape, *options)
        squared, sizes = norms_of(memory), _sizes(small, large, geometry)
        roundings = small.shape[1] * prod(places)
    if kept:
        wide = (cotangent, source, shape, *options)
        return result, rounded_again(result, squared, sizes, roundings, lambda i: _wide(*wide, [i])[0])
    return result, _settled(squared, roundings, sizes, cotangent, source, shape, *options)


@torch.library.register_fake("dpcompile::filter_gradients")
def _(cotangent: Tensor, source: Tensor, shape: Sequence[int], *options: Any) -> tuple[Tensor, Tensor]:
    """Shapes only."""
    batch = source.shape[0]
    memory = source.new_empty(batch, shape[0], *shape[2:], shape[1])
    return memory.movedim(-1, 2), source.new_empty(batch, dtype=torch.float64)


@operator("filter_norms", tags=_ANY_STRIDES)
def filter_norms(
    cotangent: Tensor,
    source: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """The norms of :func:`filter_gradients` without the gradients: our kernel keeps some filters' at a time.

    **Guarantee.** Right or too large: what rounding may have moved, ``gamma`` of the size, is added, and where that is
    not little the norm is taken in float64.
    """
    small, large = (source, cotangent) if transposed else (cotangent, source)
    options = (stride, padding, dilation, transposed, output_padding, groups)
    if takes(small, large):
        geometry = Geometry(shape, stride, padding, dilation, groups)
        squared, sizes = gradients_(large, small, geometry, None)
        roundings = additions(small.shape[1], small.shape[3:])
        return _settled(squared, roundings, sizes, cotangent, source, shape, *options)
    return filter_gradients(cotangent, source, shape, *options, False, False, False)[1]


@torch.library.register_fake("dpcompile::filter_norms")
def _(cotangent: Tensor, source: Tensor, *options: Any) -> Tensor:
    """Shapes only."""
    return source.new_empty(source.shape[0], dtype=torch.float64)


@operator("certain_filter_norms", tags=_ANY_STRIDES)
def certain_filter_norms(
    totals: Tensor,
    sizes: Tensor,
    cotangent: Tensor,
    source: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """:func:`dpcompile.kernels.gram.certain_norms` of filters, with the same guarantee.

    ``totals`` and ``sizes`` are as there; the others as for :func:`grouped_convolution`.
    """
    small = source if transposed else cotangent
    positions = small.shape[1] * prod(small.shape[3:])
    roundings = shape[0] + 2 * prod(shape[1:]) + positions * (groups + 1) + 8
    options = (stride, padding, dilation, transposed, output_padding, groups)

    def redo(which: Tensor) -> Tensor:
        return _exact(which, sizes, cotangent, source, shape, *options)

    return settled(totals, gamma(roundings, WIDE) * sizes, sizes, redo)


@torch.library.register_fake("dpcompile::certain_filter_norms")
def _(totals: Tensor, sizes: Tensor, *others: Any) -> Tensor:
    """Shapes only."""
    return torch.empty_like(totals)


def bounded_filter_norms(
    squared: Tensor, cotangent: Tensor, source: Tensor, shape: Sequence[int], *options: Any
) -> Tensor:
    """Squared norms of products that are dropped, with what rounding may have moved, for tracing and any device.

    Arguments after ``squared``, ``[B]``, as for :func:`grouped_convolution`.
    """
    stride, padding, dilation, transposed, _, groups = options
    small, large = (source, cotangent) if transposed else (cotangent, source)
    sizes = _sizes(small, large, Geometry(shape, stride, padding, dilation, groups))
    moved = gamma(small.shape[1] * prod(small.shape[3:]), unit_of(source.dtype)) * sizes.sqrt()
    return (squared.sqrt() + moved).square()


def _sizes(small: Tensor, large: Tensor, geometry: Geometry) -> Tensor:
    """Squared sizes ``[B]``: of every place the length of the cotangents times that of the patch.

    Args:
        small: ``[B, F, filters, *places]``.
        large: ``[B, F, channels, *spatial]``.
        geometry: of the filters.
    """
    batch, frames = small.shape[:2]
    groups, dims = geometry.groups, small.ndim - 3

    def by_place(value: Tensor) -> Tensor:  # [B * F * G, 1, *spatial]
        space = value.shape[3:]
        flat = value.flatten(0, 1).unflatten(1, (groups, -1)).flatten(3)
        return squares_of(flat.mT).view(batch * frames * groups, 1, *space)

    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    ones = torch.ones(1, 1, *geometry.shape[2:], dtype=torch.float64, device=large.device)
    patches = convolve(
        by_place(large), ones, None, list(geometry.stride), list(geometry.padding), list(geometry.dilation)
    )
    for d, places in enumerate(small.shape[3:]):
        patches = patches.narrow(2 + d, 0, places)
    lengths = (patches.sqrt() * by_place(small).sqrt()).flatten(1)
    return lengths.view(batch, frames, groups, lengths.shape[1]).sum((1, 3)).square().sum(1)


def _wide(cotangent: Tensor, source: Tensor, shape: Sequence[int], *options: Any) -> Tensor:
    """The gradients of some examples in float64; the last of the options is which."""
    *others, which = options
    return grouped_convolution(cotangent[which].double(), source[which].double(), shape, *others)


def _exact(
    which: Tensor, sizes: Tensor, cotangent: Tensor, source: Tensor, shape: Sequence[int], *options: Any
) -> Tensor:
    small = source if options[3] else cotangent
    squared = norms_of(_wide(cotangent, source, shape, *options, which))
    moved = gamma(small.shape[1] * prod(small.shape[3:]) + 2, WIDE) * sizes[which].sqrt()
    return (squared.sqrt() + moved).square()


def _settled(
    squared: Tensor,
    roundings: int,
    sizes: Tensor,
    cotangent: Tensor,
    source: Tensor,
    shape: Sequence[int],
    *options: Any,
) -> Tensor:
    slack = linear_slack(squared, gamma(roundings, unit_of(source.dtype)), sizes)
    return settled(squared, slack, sizes, lambda which: _exact(which, sizes, cotangent, source, shape, *options))
