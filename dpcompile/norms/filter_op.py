"""Every example's gradient of a convolution's filters: by a kernel of ours, or as one convolution by torch.

Torch's has the examples among the groups (Rochette, Manoel and Tramel 2019, arXiv:1912.06015).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpcompile.filters import Geometry, gradients_, takes
from dpcompile.norms.kept_op import squared_norms
from dpcompile.workspace import kept_gradients

__all__ = ["filter_gradients", "filter_norms", "grouped_convolution"]

_AT_ONCE = 2**20  # elements of images, cotangents and filters that torch works on at once: they stay in the cache


def grouped_convolution(cotangent: Tensor, source: Tensor, shape: Sequence[int], *options: Any) -> Tensor:
    """Every example's gradient of the filters, by torch.

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
    filters = source.new_empty((batch * shape[0], *shape[1:]))  # only its shape is read
    *others, groups = options
    _, result, _ = torch.ops.aten.convolution_backward.default(
        cotangents, images, filters, None, *others, groups * batch, [False, True, False]
    )
    return result.reshape(batch, *shape)


# Operands come as they lie in memory: the kernel takes any strides, and what Inductor chose is what it likes best.
@torch.library.custom_op("dpcompile::filter_gradients", mutates_args=(), tags=[torch.Tag.flexible_layout])
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
) -> tuple[Tensor, Tensor]:
    """Every example's gradient of the filters and its squared norm, for CPUs.

    Arguments as for :func:`grouped_convolution`, and ``own``: whether our kernel makes it, where it can; ``reuse``:
    whether the result's memory stays mapped for the next step.

    Returns:
        ``[B, *shape]``, each filter with its channels last in memory, and ``[B]``.
    """
    batch = source.shape[0]
    lying = (batch, shape[0], *shape[2:], shape[1])
    memory = kept_gradients.take(lying, source) if reuse else source.new_empty(lying)
    result = memory.movedim(-1, 2)
    small, large = (source, cotangent) if transposed else (cotangent, source)
    if own and takes(small, large, memory):
        return result, gradients_(large, small, Geometry(shape, stride, padding, dilation, groups), memory)
    each = (source.numel() + cotangent.numel() + 2 * result.numel()) // max(batch, 1)
    size = max(1, _AT_ONCE // max(each, 1))
    options = (stride, padding, dilation, transposed, output_padding, groups)
    for start in range(0, batch, size):
        part = slice(start, start + size)
        result[part] = grouped_convolution(cotangent[part], source[part], shape, *options)
    return result, squared_norms(memory)


@filter_gradients.register_fake
def _(cotangent: Tensor, source: Tensor, shape: Sequence[int], *options: Any) -> tuple[Tensor, Tensor]:
    """Shapes only."""
    batch = source.shape[0]
    memory = source.new_empty(batch, shape[0], *shape[2:], shape[1])
    return memory.movedim(-1, 2), source.new_empty(batch)


@torch.library.custom_op("dpcompile::filter_norms", mutates_args=(), tags=[torch.Tag.flexible_layout])
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
    """The norms of :func:`filter_gradients` without the gradients: our kernel keeps some filters' at a time."""
    small, large = (source, cotangent) if transposed else (cotangent, source)
    if takes(small, large):
        return gradients_(large, small, Geometry(shape, stride, padding, dilation, groups), None)
    options = (stride, padding, dilation, transposed, output_padding, groups)
    return filter_gradients(cotangent, source, shape, *options, False, False)[1]


@filter_norms.register_fake
def _(cotangent: Tensor, source: Tensor, *options: Any) -> Tensor:
    """Shapes only."""
    return source.new_empty(source.shape[0])
