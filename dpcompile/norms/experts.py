"""Every example's gradient of the matrices of experts, and its norm.

Shape letters as in :mod:`dpcompile.norms.factors`; E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpcompile.graph.expert_products import each_expert_sum
from dpcompile.graph.labels import Examples
from dpcompile.graph.sizes import Size
from dpcompile.graph.slices import in_front
from dpcompile.kernels.expert_norms import expert_norms
from dpcompile.kernels.kept import squared_norms

__all__ = ["expert_blocks", "expert_gradients", "norms_of_experts", "positions_of_an_expert"]


def expert_blocks(
    left: Tensor, right: Tensor, expert: Tensor, count: int, axis: Examples, batch: int
) -> tuple[Tensor, Tensor]:
    """A block for each expert, ``[B, E, T, P]`` and ``[B, E, T, D]``: rows that are not its own are zeros in it."""
    rows, cols, own = (in_front(x, axis, batch) for x in (left, right, expert))
    numbers = torch.arange(count, device=own.device).reshape(1, count, 1, 1)
    chosen = own[:, None, :, None] == numbers
    zero = torch.zeros((), dtype=rows.dtype, device=rows.device)
    return torch.where(chosen, rows.unsqueeze(1), zero), torch.where(chosen, cols.unsqueeze(1), zero)


def expert_gradients(
    left: Tensor, right: Tensor, expert: Tensor, count: int, axis: Examples, batch: int
) -> tuple[Tensor, Tensor]:
    """Every example's gradient ``[B, E, P, D]``, and its squared norm ``[B]``."""
    rows, cols, own = (in_front(x, axis, batch) for x in (left, right, expert))
    each = each_expert_sum(rows, cols, own, count)
    return each, squared_norms(each)


def norms_of_experts(left: Tensor, right: Tensor, expert: Tensor, count: int, axis: Examples, batch: int) -> Tensor:
    """The norms of :func:`expert_gradients`, without the gradients: ``[B]``, float64."""
    rows, cols, own = (in_front(x, axis, batch) for x in (left, right, expert))
    return expert_norms(rows, cols, own, count)


def positions_of_an_expert(positions: Size, count: int) -> Size:
    """How many of an example's T rows come to each of E experts, where they are spread evenly: for costs."""
    if not isinstance(positions, int):
        return positions
    return 1 if positions == 1 else max(2, -(-positions // count))
