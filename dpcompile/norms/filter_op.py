"""Every example's gradient of a convolution's filters: as one convolution with the examples among the groups.

(Rochette, Manoel and Tramel 2019, arXiv:1912.06015.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpcompile.workspace import kept_gradients

__all__ = ["filter_gradients", "grouped_convolution"]

_AT_ONCE = 2**20  # elements of images, cotangents and filters that are worked on at once: they stay in the cache


def grouped_convolution(cotangent: Tensor, source: Tensor, shape: Sequence[int], *options: Any) -> Tensor:
    """Every example's gradient of the filters.

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


@torch.library.custom_op("dpcompile::filter_gradients", mutates_args=())
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
    reuse: bool,
) -> Tensor:
    """:func:`grouped_convolution` of some examples at a time, for CPUs: contiguous, in memory that may stay mapped."""
    batch = source.shape[0]
    result = kept_gradients.take((batch, *shape), source) if reuse else source.new_empty(batch, *shape)
    each = (source.numel() + cotangent.numel() + 2 * result.numel()) // max(batch, 1)
    size = max(1, _AT_ONCE // max(each, 1))
    options = (stride, padding, dilation, transposed, output_padding, groups)
    for start in range(0, batch, size):
        part = slice(start, start + size)
        result[part] = grouped_convolution(cotangent[part], source[part], shape, *options)
    return result


@filter_gradients.register_fake
def _(cotangent: Tensor, source: Tensor, shape: Sequence[int], *options: Any) -> Tensor:
    """Shapes only."""
    return source.new_empty(source.shape[0], *shape)
