"""Sums of squares, in float64, by kernels of ours: in one pass and without a wide copy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpcompile.kernels.build import kernel
from dpcompile.kernels.on_gpu import proven, runs_triton
from dpcompile.kernels.rounding import CLOSE, FLOOR, linear_slack, with_floor

__all__ = ["kept_norms", "settled_norms", "squared_sizes", "squares_of", "squares_of_vectors", "squares_run_on"]


_LARGE = 2**16  # numbers of an example's gradient that one thread adds up


def squares_of(values: Tensor) -> Tensor:
    """Sums of squares over the last axis, float64: ``[.., n]`` to ``[..]``, of any strides.

    **Guarantee.** No square is lost or overflows: those of float32 numbers lie within float64.
    """
    if runs_triton(values.device):
        if values.ndim <= 4 and values.is_floating_point() and squares_run_on(values.device):
            from dpcompile.kernels.triton import squares

            return squares.squares_of(values)
        return torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64).square()
    library = _library_for(values) if values.ndim <= 4 else None
    if library is None:
        return torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64).square()
    return _squares(library, values)


def squares_of_vectors(vectors: Sequence[Tensor]) -> Tensor:
    """The same of k matrices with as many rows, ``[B, n]`` each, of one dtype: ``[k, B]``."""
    library = _library_for(*vectors) if vectors[0].dtype == torch.float32 else None
    if library is None:
        return torch.stack([squares_of(own) for own in vectors])
    count, batch = len(vectors), vectors[0].shape[0]
    result = torch.empty((count, batch), dtype=torch.float64)
    memory = (ctypes.c_void_p * count)(*(own.data_ptr() for own in vectors))
    shapes = (ctypes.c_int64 * (3 * count))(*(n for own in vectors for n in (*own.stride(), own.shape[1])))
    numbers = (ctypes.c_int64(count), ctypes.c_int64(batch), ctypes.c_void_p(result.data_ptr()))
    library.dp_squares_of_vectors(memory, shapes, *numbers, ctypes.c_int(torch.get_num_threads()))
    return result


def squared_sizes(rows: Tensor, cols: Tensor) -> Tensor | None:
    """:func:`dpcompile.kernels.exact.sizes_of` in one pass, or None where there is no kernel for these tensors."""
    library = _library_for(rows, cols) if rows.ndim == cols.ndim == 4 else None
    if library is None:
        return None
    result = torch.empty(rows.shape[0], dtype=torch.float64)
    sides = (argument for side in (rows, cols) for argument in _arguments(side))
    library.dp_squared_sizes(*sides, ctypes.c_void_p(result.data_ptr()), ctypes.c_int(torch.get_num_threads()))
    return result


def settled_norms(squared: Tensor, slack: Tensor | float, sizes: Tensor, otherwise: Tensor) -> tuple[Tensor, list[int]]:
    """Squared norms with what they may be off and the floor added, and the examples of which that is too much.

    Args:
        squared: ``[B]``, float64.
        slack: ``[B]``, float64, how far each may be off; or the part of their size that the gradients may be off by.
        sizes: ``[B]``, float64, the squared sizes of the gradients.
        otherwise: ``[B]``, float64, what is taken where the size is not finite.

    Returns:
        ``[B]``, float64, and the numbers of the examples whose size is finite and of which the slack is more than
        :data:`dpcompile.kernels.rounding.CLOSE` of the squared norm.
    """
    library = _library_for() if squared.device.type == "cpu" else None
    if library is None:
        known = sizes.isfinite()
        slack = slack if isinstance(slack, Tensor) else linear_slack(squared, slack, sizes)
        certain = (slack <= CLOSE * squared) & squared.isfinite()
        result = with_floor(torch.where(known, squared + slack, otherwise), sizes)
        return result, (known & ~certain).nonzero().flatten().tolist()
    given = [x.contiguous() for x in (squared, sizes, otherwise, *((slack,) if isinstance(slack, Tensor) else ()))]
    result, again = torch.empty_like(given[0]), torch.empty(len(squared), dtype=torch.bool)
    source, spread, other, *off = (ctypes.c_void_p(x.data_ptr()) for x in given)
    numbers = (ctypes.c_double(x) for x in (0.0 if isinstance(slack, Tensor) else slack, CLOSE, FLOOR))
    target = (ctypes.c_void_p(x.data_ptr()) for x in (result, again))
    size = ctypes.c_int64(len(squared))
    count = library.dp_settled_norms(source, *(off or [None]), spread, other, size, *numbers, *target)
    return result, again.nonzero().flatten().tolist() if count else []


def kept_norms(gradients: Tensor, rows: Tensor, cols: Tensor, unit: float) -> tuple[Tensor, list[int]] | None:
    """:func:`settled_norms` of gradients that are sums of outer products of these sides, in one call.

    Args:
        gradients: ``[B, ...]``, float32, contiguous.
        rows: ``[B, K, T, P]``.
        cols: ``[B, K, T, D]``.
        unit: the part of their size that the gradients may be off by.

    Returns:
        As there; None where there is no kernel for these tensors, or an example is too large for one of its threads.
    """
    if gradients.dtype != torch.float32 or gradients.numel() > _LARGE * max(len(gradients), 1):
        return None
    library = _library_for(gradients, rows, cols)
    if library is None:
        return None
    batch = len(gradients)
    result, again = torch.empty(batch, dtype=torch.float64), torch.empty(batch, dtype=torch.bool)
    width = ctypes.c_int64(gradients.numel() // max(batch, 1))
    numbers = (ctypes.c_double(x) for x in (unit, CLOSE, FLOOR))
    target = (ctypes.c_void_p(x.data_ptr()) for x in (result, again))
    source, threads = ctypes.c_void_p(gradients.data_ptr()), ctypes.c_int(torch.get_num_threads())
    count = library.dp_kept_norms(source, width, *_arguments(rows), *_arguments(cols), *numbers, *target, threads)
    return result, again.nonzero().flatten().tolist() if count else []


def _library_for(*values: Tensor) -> ctypes.CDLL | None:
    """The kernels, if they are for all of these tensors: on CPUs, float32 or bfloat16."""
    fits = all(v.device.type == "cpu" and v.dtype in (torch.float32, torch.bfloat16) for v in values)
    return _library() if fits else None


def _squares(library: ctypes.CDLL, values: Tensor) -> Tensor:
    whole = values.reshape(*[1] * (4 - values.ndim), *values.shape)
    result = torch.empty(values.shape[:-1], dtype=torch.float64)
    target, threads = ctypes.c_void_p(result.data_ptr()), ctypes.c_int(torch.get_num_threads())
    library.dp_squares(*_arguments(whole), target, threads)
    return result


def _arguments(values: Tensor) -> tuple[Any, ...]:
    """Of four dimensions: memory, whether it is bfloat16, sizes and strides."""
    sizes, strides = ((ctypes.c_int64 * 4)(*numbers) for numbers in (values.shape, values.stride()))
    return ctypes.c_void_p(values.data_ptr()), ctypes.c_bool(values.dtype == torch.bfloat16), sizes, strides


@kernel("squares")
def _library(library: ctypes.CDLL) -> bool:
    """Whether sums over small integers, which are exact, come out, along both orders in memory."""
    values = torch.arange(120.0).reshape(2, 3, 4, 5)
    wanted = values.double().square().sum(3)
    both = (values, values.mT.contiguous().mT)
    return all(torch.equal(_squares(library, v.to(t)), wanted) for v in both for t in (torch.float32, torch.bfloat16))


@proven("sums of squares", else_told="they are made by torch operations")
def squares_run_on(device: torch.device) -> bool:
    """The same of the Triton kernels, also of rows that are split."""
    from dpcompile.kernels.triton import squares

    values = torch.arange(120.0, device=device).reshape(2, 3, 4, 5)
    long = torch.ones(2, 40_000, device=device)
    wanted = values.double().square().sum(3)
    both = (values, values.mT.contiguous().mT)
    right = all(torch.equal(squares.squares_of(v.to(t)), wanted) for v in both for t in squares.DTYPES)
    vectors = squares.norms_of_vectors([values[0, 0], values[1, 1, :, :3].mT.contiguous().mT])
    known = torch.stack([wanted[0, 0], values[1, 1, :, :3].double().square().sum(1)])
    return right and squares.squares_of(long).tolist() == [40_000.0] * 2 and torch.equal(vectors, known)
