"""Norms and clipped sums of every example's gradient of a table whose rows are looked up by an index: an embedding.

The gradient's row i is the sum of the cotangents at the positions that looked i up, and all other rows are 0. So an
example's squared norm is that of these sums, ``|sum_{t: index_t = i} c_t|^2`` over all i: T D operations, where Gram
matrices (Li et al. 2022, arXiv:2110.05679, section 4) take T^2 D. Kernels of ours make them; on CPUs one makes the
clipped sums too, which Inductor adds up element by element in atomic operations.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dpcompile.graph.labels import Examples
from dpcompile.graph.slices import scaled
from dpcompile.kernels.build import kernel
from dpcompile.kernels.on_gpu import proven, runs_triton
from dpcompile.kernels.operators import operator
from dpcompile.kernels.rounding import WIDE, gamma, with_floor

__all__ = ["LEFT_OUT", "clipped_sums_by_index", "has_sums_by_index", "index_norms", "norms_by_index", "sums_and_sizes"]

LEFT_OUT = -(2**62)  # the index of a position that counts for nothing, whatever its cotangent is; on CPUs


def has_sums_by_index(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our kernel takes such values."""
    return device.type == "cpu" and dtype == torch.float32 and _library() is not None


def index_norms(index: Tensor, cotangents: Tensor) -> Tensor:
    """Squared norms, for tracing; by one operation, in a pass over the cotangents, where there is a kernel.

    **Guarantee.** Positions of equal index are added up, in float64, before a norm is taken; what rounding may move is
    added to it. NaN and infinity stay in their example.

    Args:
        index: integers ``[B, T]``; any numbers, only whether they are equal counts, and whether they are
            :data:`LEFT_OUT`.
        cotangents: ``[B, T, D]``, float32 or float64.

    Returns:
        ``[B]``, float64.
    """
    if cotangents.device.type == "cpu" or runs_triton(cotangents.device):
        return norms_by_index(index, cotangents)
    return _bounded(*sums_and_sizes(index, cotangents), index.shape[1])


@operator("norms_by_index", tags=[torch.Tag.flexible_layout])
def norms_by_index(index: Tensor, cotangents: Tensor) -> Tensor:
    """:func:`index_norms` on CPUs and GPUs."""
    if runs_triton(cotangents.device):
        if cotangents.numel() and _norms_run_on(cotangents.device):
            from dpcompile.kernels.triton import by_index

            return _bounded(*by_index.sums_and_sizes(index, cotangents), index.shape[1])
        return _bounded(*sums_and_sizes(index, cotangents), index.shape[1])
    library = _library() if has_sums_by_index(cotangents.device, cotangents.dtype) else None
    found = sums_and_sizes(index, cotangents) if library is None else _norms(library, index, cotangents)
    return _bounded(*found, index.shape[1])


@torch.library.register_fake("dpcompile::norms_by_index")
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
    values = _without_left_out(index, cotangents).double()
    sums = values.new_zeros(batch * positions, width).index_add(0, place, values.flatten(0, 1))
    lengths = values.square().sum(2).sqrt().flatten()
    sizes = values.new_zeros(batch * positions).index_add(0, place, lengths).square()
    return sums.square().sum(1).reshape(batch, positions).sum(1), sizes.reshape(batch, positions).sum(1)


def _without_left_out(index: Tensor, cotangents: Tensor) -> Tensor:
    return torch.where((index == LEFT_OUT).unsqueeze(2), 0.0, cotangents) if index.dtype == torch.int64 else cotangents


@operator("clipped_sums_by_index", tags=[torch.Tag.flexible_layout])
def clipped_sums_by_index(weights: Tensor, index: Tensor, cotangents: Tensor, rows: int) -> Tensor:
    """``sum_b weight_b sum_{t: index_bt = i} c_bt`` for every row i, on CPUs.

    **Guarantee.** An example of weight 0 leaves no trace, also where its cotangents are NaN or infinite: no sum takes
    them.

    Args:
        weights: ``[B]``, finite.
        index: integers in ``[0, rows)``, or :data:`LEFT_OUT`, ``[B, T]``.
        cotangents: ``[B, T, D]``.
        rows: of the table.

    Returns:
        ``[rows, D]``.

    Raises:
        IndexError: an index is not that of a row.
    """
    library = _library() if has_sums_by_index(cotangents.device, cotangents.dtype) else None
    if library is not None and weights.dtype == cotangents.dtype:
        return _sums(library, weights, index, cotangents, rows)
    values = scaled(_without_left_out(index, cotangents), Examples(0), weights).to(cotangents.dtype).flatten(0, 1)
    places = torch.where(index == LEFT_OUT, 0, index) if index.dtype == torch.int64 and rows else index
    return values.new_zeros(rows, values.shape[1]).index_add(0, places.flatten(), values)


@torch.library.register_fake("dpcompile::clipped_sums_by_index")
def _(weights: Tensor, index: Tensor, cotangents: Tensor, rows: int) -> Tensor:
    """Shapes only."""
    return cotangents.new_empty(rows, cotangents.shape[2])


def _norms(library: ctypes.CDLL, index: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`sums_and_sizes` without further memory."""
    found = [torch.empty(values.shape[0], dtype=torch.float64) for _ in range(2)]
    index, threads = index.long().contiguous(), ctypes.c_int(torch.get_num_threads())
    place, targets = ctypes.c_void_p(index.data_ptr()), [ctypes.c_void_p(x.data_ptr()) for x in found]
    library.dp_norms_by_index(place, *_strided(values), *_sizes(values), ctypes.c_int64(LEFT_OUT), *targets, threads)
    return found[0], found[1]


def _sums(library: ctypes.CDLL, weights: Tensor, index: Tensor, values: Tensor, rows: int) -> Tensor:
    """:func:`clipped_sums_by_index` in one pass."""
    result = values.new_empty(rows, values.shape[2])
    index, weights = index.long().contiguous(), weights.contiguous()
    places, factors, target = (ctypes.c_void_p(x.data_ptr()) for x in (index, weights, result))
    sizes = [*_sizes(values), ctypes.c_int64(rows), ctypes.c_int64(LEFT_OUT)]
    threads = ctypes.c_int(torch.get_num_threads())
    if library.dp_sums_by_index(places, *_strided(values), factors, *sizes, target, threads):
        raise IndexError(f"an index is not that of one of the table's {rows} rows")
    return result


def _strided(values: Tensor) -> tuple[object, object]:
    return ctypes.c_void_p(values.data_ptr()), (ctypes.c_int64 * values.ndim)(*values.stride())


def _sizes(values: Tensor) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(n) for n in values.shape]


@kernel("by_index")
def _library(library: ctypes.CDLL) -> bool:
    """Whether sums over small integers, which are exact, come out, of values in both orders in memory."""
    index, weights = torch.tensor([[0, 2, 0, LEFT_OUT], [1, LEFT_OUT, 2, 1]]), torch.tensor([2.0, 0.0])
    values = torch.zeros(2, 4, 4)
    values[..., 0] = torch.tensor([[3.0, 5.0, 4.0, torch.inf], [-2.0, 9.0, 7.0, 2.0]])
    norms, sizes = torch.tensor([74.0, 49.0]).double(), torch.tensor([74.0, 65.0]).double()
    sums = torch.zeros(3, 4)
    sums[:, 0] = torch.tensor([14.0, 0.0, 10.0])
    for value in (values, values.mT.contiguous().mT):
        found = _norms(library, index, value)
        if not (torch.equal(found[0], norms) and torch.equal(found[1], sizes)):
            return False
        if not torch.equal(_sums(library, weights, index, value, 3), sums):
            return False
    return True


@proven("norms by index", else_told="they are made by torch operations")
def _norms_run_on(device: torch.device) -> bool:
    """The same of the Triton kernel, of norms."""
    from dpcompile.kernels.triton import by_index

    index = torch.tensor([[0, 2, 0], [1, 2, 1]], device=device)
    values = torch.zeros(2, 3, 130, device=device)
    values[..., 129] = torch.tensor([[3.0, 5.0, 4.0], [-2.0, 7.0, 2.0]], device=device)
    known = [[74.0, 49.0], [74.0, 65.0]]
    both = (values, values.mT.contiguous().mT)
    return all([x.tolist() for x in by_index.sums_and_sizes(index, v)] == known for v in both)
