"""Gradients of a convolution's filters in full precision, where torch is allowed less.

Torch's setting for convolutions (``torch.backends.cudnn.conv.fp32_precision``, TF32 by default, and
``torch.backends.mkldnn.conv.fp32_precision``) is for the model. A sum in TF32 is not the one that norms were taken for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpcompile.kernels.precision import full_precision

__all__ = ["filters_gradient"]


def filters_gradient(cotangent: Tensor, source: Tensor, shape: Sequence[Any], *options: Any) -> Tensor:
    """The gradient of the filters, for tracing.

    **Guarantee.** Of float32 operands the products are IEEE float32, whatever torch is allowed; on CPUs what it was
    allowed when the graph was made.

    Args:
        cotangent: ``[N, C', *spatial]``.
        source: ``[N, C, *spatial]``.
        shape: of the filters.
        options: stride, padding, dilation, whether it is transposed, output padding and groups of the convolution.
    """
    on_cpu = source.device.type == "cpu"
    allowed = torch.backends.mkldnn.conv.fp32_precision if on_cpu else "tf32"  # type: ignore[attr-defined]
    if source.dtype == torch.float32 and allowed in ("tf32", "bf16"):
        return exact_filters_gradient(cotangent, source, list(shape), *options)
    return _by_torch(cotangent, source, shape, *options)


@torch.library.custom_op("dpcompile::exact_filters_gradient", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def exact_filters_gradient(
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
    """:func:`filters_gradient`, contiguous."""
    with full_precision():
        found = _by_torch(cotangent, source, shape, stride, padding, dilation, transposed, output_padding, groups)
    return found.contiguous()


@exact_filters_gradient.register_fake
def _(cotangent: Tensor, source: Tensor, shape: Sequence[int], *options: Any) -> Tensor:
    """Shapes only."""
    return source.new_empty(shape)


def _by_torch(cotangent: Tensor, source: Tensor, shape: Sequence[Any], *options: Any) -> Tensor:
    filters = source.new_empty(shape)  # only its shape is read
    wanted = [False, True, False]
    return torch.ops.aten.convolution_backward.default(cotangent, source, filters, None, *options, wanted)[1]
