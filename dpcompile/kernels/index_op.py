"""Norms and clipped sums of every example's gradient of a table whose rows are looked up by an index: an embedding.

The gradient's row i is the sum of the cotangents at the positions that looked i up, and all other rows are 0. So an
example's squared norm is that of these sums, ``|sum_{t: index_t = i} c_t|^2`` over all i: T D operations, where Gram
matrices (Li et al. 2022, arXiv:2110.05679, section 4) take T^2 D. On CPUs a kernel of ours makes them, and the clipped
sums, which Inductor adds up element by element in atomic operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpcompile.graph.labels import Examples
from dpcompile.graph.slices import scaled
from dpcompile.kernels.onednn import norms_by_index as norms_by_kernel
from dpcompile.kernels.onednn import sums_by_index as sums_by_kernel
from dpcompile.kernels.rounding import WIDE, gamma, with_floor

__all__ = ["clipped_sums_by_index", "index_norms", "norms_by_index", "sums_and_sizes"]


def index_norms(index: Tensor, cotangents: Tensor) -> Tensor:
    """Squared norms, for tracing; by one operation on CPUs, in a pass over the cotangents.

    **Guarantee.** Positions of equal index are added up, in float64, before a norm is taken; what rounding may move is
    added to it. NaN and infinity stay in their example.

    Args:
        index: integers ``[B, T]``; any numbers, only whether they are equal counts.
        cotangents: ``[B, T, D]``, float32 or float64.

    Returns:
        ``[B]``, float64.
    """
    if cotangents.device.type == "cpu":
        return norms_by_index(index, cotangents)
    return _bounded(*sums_and_sizes(index, cotangents), index.shape[1])


@torch.library.custom_op("dpcompile::norms_by_index", mutates_args=(), tags=[torch.Tag.flexible_layout])
def norms_by_index(index: Tensor, cotangents: Tensor) -> Tensor:
    """:func:`index_norms` on CPUs."""
    found = norms_by_kernel(index, cotangents)
    return _bounded(*(sums_and_sizes(index, cotangents) if found is None else found), index.shape[1])


@norms_by_index.register_fake
def _(index: Tensor, cotangents: Tensor) -> Tensor:
    """Shapes only."""
    return cotangents.new_empty(index.shape[0], dtype=torch.float64)


def _bounded(squared: Tensor, sizes: Tensor, positions: int | torch.SymInt) -> Tensor:
    moved = gamma(positions + 2, WIDE) * sizes.sqrt()
    return with_floor((squared.sqrt() + moved).square(), sizes)


def sums_and_sizes(index: Tensor, cotangents: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms by torch's operations, and sums over the index of squared sums of lengths: ``[B]``, float64.

    The sums of an example stand where its distinct indices would, in order.
    """
    batch, positions, width = cotangents.shape
    ordered, order = index.sort(dim=1)
    first = torch.cat([ordered.new_zeros(batch, 1), (ordered[:, 1:] != ordered[:, :-1]).long()], 1)
    place = torch.zeros_like(order).scatter(1, order, first[:, :positions].cumsum(1))
    place = (place + positions * torch.arange(batch, device=index.device).unsqueeze(1)).flatten()
    values = cotangents.double()
    sums = values.new_zeros(batch * positions, width).index_add(0, place, values.flatten(0, 1))
    lengths = values.square().sum(2).sqrt().flatten()
    sizes = values.new_zeros(batch * positions).index_add(0, place, lengths).square()
    return sums.square().sum(1).reshape(batch, positions).sum(1), sizes.reshape(batch, positions).sum(1)


@torch.library.custom_op("dpcompile::clipped_sums_by_index", mutates_args=(), tags=[torch.Tag.flexible_layout])
def clipped_sums_by_index(weights: Tensor, index: Tensor, cotangents: Tensor, rows: int) -> Tensor:
    """``sum_b weight_b sum_{t: index_bt = i} c_bt`` for every row i, on CPUs.

    **Guarantee.** An example of weight 0 leaves no trace, also where its cotangents are NaN or infinite: no sum takes
    them.

    Args:
        weights: ``[B]``, finite.
        index: integers in ``[0, rows)``, ``[B, T]``.
        cotangents: ``[B, T, D]``.
        rows: of the table.

    Returns:
        ``[rows, D]``.

    Raises:
        IndexError: an index is not that of a row.
    """
    found = sums_by_kernel(weights, index, cotangents, rows)
    if found is not None:
        return found
    values = scaled(cotangents, Examples(0), weights).to(cotangents.dtype).flatten(0, 1)
    return values.new_zeros(rows, values.shape[1]).index_add(0, index.flatten(), values)


@clipped_sums_by_index.register_fake
def _(weights: Tensor, index: Tensor, cotangents: Tensor, rows: int) -> Tensor:
    """Shapes only."""
    return cotangents.new_empty(rows, cotangents.shape[2])
