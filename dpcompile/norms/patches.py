"""The patches of an image that a convolution's filters see, in any number of dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

__all__ = ["patches"]


def patches(
    images: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    positions: Sequence[int],
) -> Tensor:
    """All patches, as a strided view of the padded images.

    Args:
        images: ``[N, C, *spatial]``.
        kernel: its size, one number per spatial dimension, and so for the others.
        stride: of the filter.
        padding: zeros on both sides.
        dilation: of the filter.
        positions: how many places the filter takes along each spatial dimension.

    Returns:
        ``[N, C, *kernel, prod(positions)]``.
    """
    amounts = [a for p in reversed(padding) for a in (p, p)]
    windows = F.pad(images, amounts) if any(amounts) else images
    count = len(kernel)
    for d in range(count):
        span = dilation[d] * (kernel[d] - 1) + 1
        windows = windows.unfold(2 + d, span, stride[d]).narrow(2 + d, 0, positions[d])[..., :: dilation[d]]
    # [N, C, *positions, *kernel] -> [N, C, *kernel, positions]
    order = [0, 1, *range(2 + count, 2 + 2 * count), *range(2, 2 + count)]
    return windows.permute(order).flatten(2 + count)
