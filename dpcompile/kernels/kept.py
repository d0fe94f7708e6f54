"""Norms and weighted sums of per-example gradients that were kept, as operations.

A model has two of these loops for every bias and norm layer, and one for every matrix. As Inductor's code each is
compiled anew for every model, and on a GPU each is a launch; here they are compiled already, and one launch for all.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dpcompile.graph.labels import Examples
from dpcompile.graph.slices import order_in_memory, scaled
from dpcompile.kernels.build import kernel
from dpcompile.kernels.exact import norms_of
from dpcompile.kernels.on_gpu import proven, runs_triton
from dpcompile.kernels.operators import operator
from dpcompile.kernels.squares import squares_of_vectors, squares_run_on

__all__ = ["FEW", "has_operations", "norms_of_vectors", "squared_norms", "weighted_sums"]

FEW = 4  # so many vectors are left to Inductor, which fuses their loops with what makes them


def has_operations(device: torch.device) -> bool:
    """Whether these operations are for tensors of this device."""
    return device.type == "cpu" or runs_triton(device)


@operator("norms_of_vectors")
def norms_of_vectors(each: Sequence[Tensor]) -> Tensor:
    """Squared norms of every example's vectors.

    Args:
        each: per-example gradients of k parameters, ``[B, n]`` each, of one dtype: float32 or float64.

    Returns:
        ``[k, B]``, float64.
    """
    if squares_run_on(each[0].device):
        from dpcompile.kernels.triton import squares

        return squares.norms_of_vectors(each)
    return squares_of_vectors(each)


@torch.library.register_fake("dpcompile::norms_of_vectors")
def _(each: Sequence[Tensor]) -> Tensor:
    """Shapes only."""
    return each[0].new_empty((len(each), each[0].shape[0]), dtype=torch.float64)


def squared_norms(each: Tensor) -> Tensor:
    """``[B, ...]`` to ``[B]``, float64, for tracing.

    **Guarantee.** No square is lost or overflows: those of float32 numbers lie within float64.
    """
    if each.ndim < 3 or not has_operations(each.device):
        return each.double().square().reshape(each.shape[0], -1).sum(1)
    return norms_of_rows(each.flatten(2))


@operator("norms_of_rows")
def norms_of_rows(rows: Tensor) -> Tensor:
    """Squared norms of every example's ``[P, D]``, in one pass: ``[B, P, D]`` to ``[B]``, float64."""
    return norms_of(rows)


@torch.library.register_fake("dpcompile::norms_of_rows")
def _(rows: Tensor) -> Tensor:
    """Shapes only."""
    return rows.new_empty(rows.shape[0], dtype=torch.float64)


@operator("weighted_sums")
def weighted_sums(weights: Tensor, rows: Sequence[int], each: Sequence[Tensor]) -> list[Tensor]:
    """``sum_i weight_i * gradient_i`` of k parameters.

    **Guarantee.** An example of weight 0 leaves no trace, also where its gradient is NaN or infinite: no sum takes it.

    ================================  ====================================================
    edge case                         outcome
    ================================  ====================================================
    all weights are 0                 zeros
    float64, or there is no compiler  torch's product; of a copy, where some weights are 0
    ================================  ====================================================

    Args:
        weights: ``[groups, B]``, finite.
        rows: for each parameter its row in ``weights``.
        each: per-example gradients, ``[B, ...]`` each, of the dtype of ``weights``.

    Returns:
        The sums, each of the shape of one example's gradient, contiguous.
    """
    if runs_triton(weights.device):
        return _on_gpu(weights, rows, each)
    used = [row.nonzero().flatten() for row in weights]
    values = [row[places] for row, places in zip(weights, used, strict=True)]
    library = _library() if weights.device.type == "cpu" and weights.dtype == torch.float32 else None
    if library is None:
        return [_by_product(values[row], used[row], gradients) for row, gradients in zip(rows, each, strict=True)]
    lying = [(own, None) if own.is_contiguous() else _dense(own) for own in each]
    sums = _sums(library, [own for own, _ in lying], rows, used, values)
    return [total if order is None else _put_back(total, order) for total, (_, order) in zip(sums, lying, strict=True)]


@torch.library.register_fake("dpcompile::weighted_sums")
def _(weights: Tensor, rows: Sequence[int], each: Sequence[Tensor]) -> list[Tensor]:
    """Shapes only."""
    return [gradients.new_empty(gradients.shape[1:]) for gradients in each]


def _on_gpu(weights: Tensor, rows: Sequence[int], each: Sequence[Tensor]) -> list[Tensor]:
    """In one launch, or by torch's operations, which wait for nothing either."""
    if not _sums_run_on(weights.device):
        pairs = zip(rows, each, strict=True)
        return [scaled(gradients, Examples(0), weights[row]).sum(0).contiguous() for row, gradients in pairs]
    from dpcompile.kernels.triton import kept

    lying = [_lying(gradients) for gradients in each]
    totals = kept.weighted_sums(weights, rows, [flat for flat, _, _ in lying])
    return [_put_back(total.view(shape), order) for total, (_, order, shape) in zip(totals, lying, strict=True)]


def _lying(each: Tensor) -> tuple[Tensor, list[int], torch.Size]:
    """``[B, n]``, with the elements of an example as they lie in memory; their axes' order, and the shape in it."""
    lying, order = _dense(each)
    return lying.reshape(each.shape[0], -1), order, lying.shape[1:]


def _dense(each: Tensor) -> tuple[Tensor, list[int]]:
    """``[B, ...]``, contiguous: the axes of an example in the order in which they lie in memory; and that order."""
    order = order_in_memory(each[0])
    return each.permute(0, *(i + 1 for i in order)).contiguous(), order


def _put_back(total: Tensor, order: Sequence[int]) -> Tensor:
    return total.permute(sorted(range(len(order)), key=order.__getitem__)).contiguous()


def _by_product(weights: Tensor, used: Tensor, each: Tensor) -> Tensor:
    flat, order, shape = _lying(each)
    total = torch.mv((flat if len(used) == len(flat) else flat[used]).T, weights)
    return _put_back(total.view(shape), order)


def _sums(
    library: ctypes.CDLL,
    each: Sequence[Tensor],
    rows: Sequence[int],
    used: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """``sum_k weight_k gradient_(used_k)`` in one pass over these examples; no other is read.

    Args:
        library: has the kernel.
        each: ``[B, ...]``, contiguous.
        rows: for each of them, which of the following are its.
        used: numbers of examples.
        weights: theirs.
    """
    count = len(each)
    results = [own.new_empty(own.shape[1:]) for own in each]
    source, target = ((ctypes.c_void_p * count)(*(x.data_ptr() for x in own)) for own in (each, results))
    columns, groups = ((ctypes.c_int64 * count)(*numbers) for numbers in ((x.numel() for x in results), rows))
    starts = (ctypes.c_int64 * (len(used) + 1))(*itertools.accumulate((len(x) for x in used), initial=0))
    places, factors = (torch.cat([*x]) if len(x) > 1 else x[0] for x in (used, weights))
    numbers = ctypes.c_int64(count), ctypes.c_void_p(places.data_ptr()), ctypes.c_void_p(factors.data_ptr()), starts
    library.dp_weighted_sums(source, columns, groups, target, *numbers, ctypes.c_int(torch.get_num_threads()))
    return results


@kernel("kept")
def _library(library: ctypes.CDLL) -> bool:
    """Whether sums over small integers, which are exact, come out, and a row that is not used is not read."""
    each = [torch.arange(7.0 * n).remainder(11).reshape(7, n) for n in (1030, 1, 3000)]
    used, weights = [torch.tensor([0, 1, 2, 4, 5, 6]), torch.arange(7)], [torch.arange(6.0), torch.arange(7.0)]
    rows = [0, 1, 0]
    wanted = [weights[row] @ own[used[row]] for row, own in zip(rows, each, strict=True)]
    each[0][3] = each[2][3] = torch.nan
    return all(torch.equal(a, b) for a, b in zip(_sums(library, each, rows, used, weights), wanted, strict=True))


@proven("weighted sums", else_told="they are made by torch operations")
def _sums_run_on(device: torch.device) -> bool:
    """The same of the Triton kernel."""
    from dpcompile.kernels.triton import kept

    rows, others = torch.arange(7.0 * 300).remainder(11).reshape(7, 300), torch.arange(35.0).reshape(5, 7).T
    weights = torch.tensor([[3.0, 0.0, 1.0, 2.0, 0.0, 5.0, 4.0], [1.0] * 7])
    wanted = [weights[1] @ others, weights[0] @ rows]
    rows[1], rows[4] = torch.inf, torch.nan
    found = kept.weighted_sums(weights.to(device), [1, 0], [others.to(device), rows.to(device)])
    return all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))
