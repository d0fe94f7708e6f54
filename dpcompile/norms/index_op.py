"""Norms and clipped sums of every example's gradient of a table whose rows are looked up by an index: an embedding.

The gradient's row i is the sum of the cotangents at the positions that looked i up, and all other rows are 0. So an
example's squared norm is that of these sums, ``|sum_{t: index_t = i} c_t|^2`` over all i: T D operations, where Gram
matrices (Li et al. 2022, arXiv:2110.05679, section 4) take T^2 D. On CPUs a kernel of ours makes them, and the clipped
sums, which Inductor adds up element by element in atomic operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpcompile.axis import Examples
from dpcompile.norms.slices import scaled
from dpcompile.onednn import norms_by_index as norms_by_kernel
from dpcompile.onednn import sums_by_index as sums_by_kernel

__all__ = ["clipped_sums_by_index", "index_norms", "norms_by_index", "norms_by_sums"]


def index_norms(index: Tensor, cotangents: Tensor) -> Tensor:
    """Squared norms, for tracing; by one operation on CPUs, in a pass over the cotangents.

    **Guarantee.** Positions of equal index are added up before a norm is taken. NaN and infinity stay in their example.

    Args:
        index: integers ``[B, T]``; any numbers, only whether they are equal counts.
        cotangents: ``[B, T, D]``, float32 or float64.

    Returns:
        ``[B]``, of the dtype of the cotangents.
    """
    return norms_by_index(index, cotangents) if cotangents.device.type == "cpu" else norms_by_sums(index, cotangents)


@torch.library.custom_op("dpcompile::norms_by_index", mutates_args=(), tags=[torch.Tag.flexible_layout])
def norms_by_index(index: Tensor, cotangents: Tensor) -> Tensor:
    """:func:`index_norms` on CPUs."""
    found = norms_by_kernel(index, cotangents)
    return norms_by_sums(index, cotangents) if found is None else found


@norms_by_index.register_fake
def _(index: Tensor, cotangents: Tensor) -> Tensor:
    """Shapes only."""
    return cotangents.new_empty(index.shape[0])


def norms_by_sums(index: Tensor, cotangents: Tensor) -> Tensor:
    """The same by torch's operations: the sums of an example stand where its distinct indices would, in order."""
    batch, positions, width = cotangents.shape
    ordered, order = index.sort(dim=1)
    first = torch.cat([ordered.new_zeros(batch, 1), (ordered[:, 1:] != ordered[:, :-1]).long()], 1)
    place = torch.zeros_like(order).scatter(1, order, first[:, :positions].cumsum(1))
    place = place + positions * torch.arange(batch, device=index.device).unsqueeze(1)
    sums = cotangents.new_zeros(batch * positions, width).index_add(0, place.flatten(), cotangents.flatten(0, 1))
    return sums.square().sum(1).reshape(batch, positions).sum(1)


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
