"""Norms of every example's gradient of the matrices of experts, a stretch of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dpcompile.graph.expert_products import experts_of_examples, stretches
from dpcompile.kernels.rounding import WIDE, gamma

__all__ = ["expert_norms"]

_ANY_STRIDES = (torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe)  # rows are counted
_CANCELS = 1e-5  # of the squared size: below it Gram matrices round too much


@torch.library.custom_op("dpcompile::expert_norms", mutates_args=(), tags=_ANY_STRIDES)
def expert_norms(left: Tensor, right: Tensor, expert: Tensor, count: int) -> Tensor:
    """``sum_e |sum_{t: expert_bt = e} left_bt right_bt^T|^2`` for every example b.

    By Gram matrices of an example's rows with one expert (Li et al. 2022, arXiv:2110.05679, section 4), or by their
    product, where this takes fewer operations or the terms cancel.

    **Guarantee.** Right or too large, whatever the values: all is float64, and what rounding may move is added. NaN and
    infinity stay in their example.

    Args:
        left: ``[B, T, P]``.
        right: ``[B, T, D]``.
        expert: integers, ``[B, T]``; E or more for no expert.
        count: E.

    Returns:
        ``[B]``, float64.

    Raises:
        IndexError: a number below 0.
    """
    batch, own = expert.shape[0], experts_of_examples(expert, count)
    rows, cols = left.flatten(0, 1), right.flatten(0, 1)
    squared = left.new_zeros(batch, dtype=torch.float64)
    for number, which in stretches(own, batch * count):
        squared[number // count] += _squared_norm(rows[which].double(), cols[which].double())
    return squared


def _squared_norm(rows: Tensor, cols: Tensor) -> Tensor:
    """Of ``rows^T cols``, ``[T, P]`` and ``[T, D]``, not below that of the real numbers."""
    positions, p, d = rows.shape[0], rows.shape[1], cols.shape[1]
    size = (rows.square().sum(1).sqrt() * cols.square().sum(1).sqrt()).sum().square()
    if positions * (p + d) < p * d:
        total = ((rows @ rows.mT) * (cols @ cols.mT)).sum()
        if not total < _CANCELS * size:
            return total + gamma(p + d + 2 * positions + 8, WIDE) * size
    moved = gamma(positions + 2, WIDE) * size.sqrt()
    return ((rows.mT @ cols).square().sum().sqrt() * (1 + gamma(p * d + 4, WIDE)) + moved).square()


@expert_norms.register_fake
def _(left: Tensor, right: Tensor, expert: Tensor, count: int) -> Tensor:
    """Shapes only."""
    return left.new_empty(left.shape[0], dtype=torch.float64)
