"""Norms and weighted sums of per-example gradients that were kept, as operations, for CPUs.

A model has two of these loops for every bias and norm layer, and one for every matrix. As Inductor's code each is
compiled anew for every model; here they are compiled already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["FEW", "norms_of_vectors", "weighted_sums"]

FEW = 4  # so many vectors are left to Inductor, which fuses their loops with what makes them


@torch.library.custom_op("dpcompile::norms_of_vectors", mutates_args=())
def norms_of_vectors(each: Sequence[Tensor]) -> Tensor:
    """Squared norms of every example's vectors.

    Args:
        each: per-example gradients of k parameters, ``[B, n]`` each, of one dtype: float32 or float64.

    Returns:
        ``[k, B]``.
    """
    return torch.stack([torch.linalg.vector_norm(vectors, dim=1) for vectors in each]).square_()


@norms_of_vectors.register_fake
def _(each: Sequence[Tensor]) -> Tensor:
    """Shapes only."""
    return each[0].new_empty(len(each), each[0].shape[0])


@torch.library.custom_op("dpcompile::weighted_sums", mutates_args=())
def weighted_sums(weights: Tensor, rows: Sequence[int], each: Sequence[Tensor]) -> list[Tensor]:
    """``sum_i weight_i * gradient_i`` of k parameters.

    **Guarantee.** An example of weight 0 leaves no trace, also where its gradient is NaN or infinite: it is not read.

    ==========================  =====================================
    edge case                   outcome
    ==========================  =====================================
    all weights are 0           zeros
    weights 0 between others    a product for every run of the others
    ==========================  =====================================

    Args:
        weights: ``[groups, B]``, finite.
        rows: for each parameter its row in ``weights``.
        each: per-example gradients, ``[B, ...]`` each, of the dtype of ``weights``.

    Returns:
        The sums, each of the shape of one example's gradient, contiguous.
    """
    runs = [_runs(row) for row in weights.tolist()]
    return [_weighted_sum(weights[row], runs[row], gradients) for row, gradients in zip(rows, each, strict=True)]


@weighted_sums.register_fake
def _(weights: Tensor, rows: Sequence[int], each: Sequence[Tensor]) -> list[Tensor]:
    """Shapes only."""
    return [gradients.new_empty(gradients.shape[1:]) for gradients in each]


def _runs(weights: list[float]) -> list[tuple[int, int]]:
    """First and last of neighbouring examples with weights that are not 0, ``[first, last)``."""
    used = [False, *(w != 0 for w in weights), False]
    borders = [i for i in range(len(weights) + 1) if used[i] != used[i + 1]]
    return list(zip(borders[::2], borders[1::2], strict=True))


def _weighted_sum(weights: Tensor, runs: list[tuple[int, int]], each: Tensor) -> Tensor:
    flat = each.reshape(each.shape[0], -1)
    if not runs:
        return each.new_zeros(each.shape[1:])
    first, last = runs[0]
    total = torch.mv(flat[first:last].T, weights[first:last])
    for first, last in runs[1:]:
        total.addmv_(flat[first:last].T, weights[first:last])
    return total.view(each.shape[1:])
