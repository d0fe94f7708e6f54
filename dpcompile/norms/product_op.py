"""Every example's product and its squared norm as one operation, for CPUs.

Inductor's own code for the norm, a reduction over one long row, is slower than torch's kernel for short ones, and a
fresh result waits for the operating system (see :mod:`dpcompile.workspace`): `python -m benchmarks.products` prints it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpcompile.norms.kept_op import squared_norms
from dpcompile.norms.products import quicker
from dpcompile.onednn import multiply_
from dpcompile.workspace import kept_gradients

__all__ = ["product_with_norms"]


@torch.library.custom_op("dpcompile::product_with_norms", mutates_args=())
def product_with_norms(rows: Tensor, cols: Tensor, reuse: bool) -> tuple[Tensor, Tensor]:
    """``rows^T cols`` of every example and block, and every example's squared norm.

    Args:
        rows: ``[B, K, T, P]``, float32 or float64, any strides.
        cols: ``[B, K, T, D]``, the same.
        reuse: whether the result's memory stays mapped for the next step.

    Returns:
        ``[B, K, P, D]`` and ``[B]``.
    """
    batch, blocks, _, p = rows.shape
    shape = (batch * blocks, p, cols.shape[-1])
    products = kept_gradients.take(shape, rows) if reuse else rows.new_empty(shape)
    multiply = multiply_ if quicker(rows) else torch.bmm
    multiply(rows.flatten(0, 1).mT, cols.flatten(0, 1), out=products)
    result = products.view(batch, blocks, *shape[1:])
    return result, squared_norms(products.view(batch, blocks * p, -1))


@product_with_norms.register_fake
def _(rows: Tensor, cols: Tensor, reuse: bool) -> tuple[Tensor, Tensor]:
    """Shapes only."""
    batch, blocks, _, p = rows.shape
    return rows.new_empty(batch, blocks, p, cols.shape[-1]), rows.new_empty(batch)
