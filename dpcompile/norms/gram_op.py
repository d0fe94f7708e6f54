"""The sum over the products of two Gram matrices as one operation, for CPUs.

As Inductor's loops, the sums of several sites are fused into one, and their Gram matrices exist all at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpcompile.onednn import sum_of_products

__all__ = ["gram_norms"]


@torch.library.custom_op("dpcompile::gram_norms", mutates_args=())
def gram_norms(
    rows: Tensor,
    rows_left: Tensor | None,
    rows_right: Tensor | None,
    cols: Tensor,
    cols_left: Tensor | None,
    cols_right: Tensor | None,
) -> Tensor:
    """``sum_tt' R_tt' C_tt'``, and how far it may be off.

    **Guarantee.** To the sum, in float64, ``eps |R C| + |R| slack_C + slack_R |C|`` is added for every product: see
    :func:`dpcompile.norms.ghost.ghost`. NaN and infinity stay what they are.

    Args:
        rows: ``R [B, K, T, T']``, float32.
        rows_left: ``[B, K, T]``, or None where ``R`` is exact.
        rows_right: ``[B, K, T']``: an element of ``R`` is off by at most ``left_t right_t'``.
        cols: ``C``, the same.
        cols_left: ``[B, K, T]`` or None, as that of the rows.
        cols_right: ``[B, K, T']`` or None, as that of the rows.

    Returns:
        ``[B]``.
    """
    batch, blocks, positions, others = torch.broadcast_shapes(rows.shape, cols.shape)
    matrices = [x.expand(batch, blocks, positions, others).contiguous() for x in (rows, cols)]
    lengths = [
        rows.new_zeros(batch, blocks, n) if x is None else x.expand(batch, blocks, n).contiguous()
        for x, n in ((rows_left, positions), (rows_right, others), (cols_left, positions), (cols_right, others))
    ]
    result = rows.new_empty(batch)
    sum_of_products(matrices, lengths, result)
    return result


@gram_norms.register_fake
def _(rows: Tensor, *others: Tensor | None) -> Tensor:
    """Shapes only."""
    return rows.new_empty(rows.shape[0])
