"""The C++ kernels of `kernels/cpp/product.cpp`: products of float32 matrices by oneDNN, and sums and their norms.

Torch has oneDNN in it, and multiplies matrices by it in narrower dtypes only.
"""

from __future__ import annotations

import ctypes
import pathlib
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from dpcompile._torch.native import compile_cpp, onednn_matmul
from dpcompile._torch.tensors import tensor_address

__all__ = [
    "gram_sums",
    "has_onednn",
    "has_sums_by_index",
    "multiply_",
    "norms_by_index",
    "squares",
    "sums_by_index",
    "weighted_sum",
]

_SOURCE = pathlib.Path(__file__).parent / "cpp" / "product.cpp"


def has_onednn() -> bool:
    """Whether :func:`multiply_` is oneDNN's: torch has it, it can be called, and what it gave was right."""
    return _kernel() is not None


def multiply_(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write ``a @ b`` to ``out``: by oneDNN, or by torch where that cannot be.

    Args:
        a: ``[M, K]`` or ``[B, M, K]``, float32, on the CPU; row by row or column by column, else it is copied.
        b: ``[K, N]`` or ``[B, K, N]``, the same.
        out: ``[M, N]`` or ``[B, M, N]``, contiguous; memory of its own.
    """
    kernel = _kernel() if a.numel() and b.numel() else None
    if kernel is None or not kernel(a, b, out):
        torch.matmul(a, b, out=out)


def gram_sums(rows: Tensor, cols: Tensor, panels: int) -> tuple[Tensor, Tensor] | None:
    """What :func:`dpcompile.kernels.gram_op.gram_norms` returns; None where the kernel cannot do it.

    Args:
        rows: ``[B, K, T, T]``, float64, the lower part.
        cols: the same.
        panels: of both.
    """
    library = _library() if rows.device.type == "cpu" else None
    if library is None:
        return None
    rows, cols = rows.contiguous(), cols.contiguous()
    totals, sizes = rows.new_empty(rows.shape[0]), rows.new_empty(rows.shape[0])
    memory = [ctypes.c_void_p(x.data_ptr()) for x in (rows, cols)]
    numbers = [ctypes.c_int64(n) for n in (*rows.shape[:3], panels)]
    results = [ctypes.c_void_p(x.data_ptr()) for x in (totals, sizes)]
    library.dp_gram_norms(*memory, *numbers, *results, ctypes.c_int(torch.get_num_threads()))
    return totals, sizes


def squares(values: Tensor) -> Tensor | None:
    """Sums of squares over the last axis, in float64, in one pass.

    Args:
        values: ``[.., n]``, up to four axes, of any strides.

    Returns:
        ``[..]``, float64; None where the kernel cannot do it: in other dtypes than float32, or without a compiler.
    """
    library = _library() if values.dtype == torch.float32 and values.device.type == "cpu" else None
    if library is None:
        return None
    whole = values.reshape(*[1] * (4 - values.ndim), *values.shape)
    result = torch.empty(values.shape[:-1], dtype=torch.float64)
    sizes, strides = ((ctypes.c_int64 * 4)(*numbers) for numbers in (whole.shape, whole.stride()))
    target, threads = ctypes.c_void_p(result.data_ptr()), ctypes.c_int(torch.get_num_threads())
    library.dp_squares(ctypes.c_void_p(whole.data_ptr()), sizes, strides, target, threads)
    return result


def weighted_sum(rows: Tensor, used: Tensor, weights: Tensor) -> Tensor | None:
    """``sum_k weight_k row_(used_k)``, in one pass over these rows; no other is read.

    Args:
        rows: ``[B, n]``, contiguous, on the CPU.
        used: ``[k]``, int64.
        weights: ``[k]``, of the dtype of ``rows``.

    Returns:
        ``[n]``; None where the kernel cannot do it: in other dtypes than float32, or without a compiler.
    """
    library = _library() if rows.dtype == torch.float32 and rows.is_contiguous() else None
    if library is None:
        return None
    result = rows.new_empty(rows.shape[1])
    columns, count = (ctypes.c_int64(n) for n in (rows.shape[1], len(used)))
    source, places, factors, target = (ctypes.c_void_p(x.data_ptr()) for x in (rows, used, weights, result))
    threads = ctypes.c_int(torch.get_num_threads())
    library.dp_weighted_sum(source, columns, places, factors, count, target, threads)
    return result


def has_sums_by_index(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`norms_by_index` takes such values."""
    return device.type == "cpu" and dtype == torch.float32 and _library() is not None


def norms_by_index(index: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """What :func:`dpcompile.kernels.index_op.sums_and_sizes` returns, without further memory.

    Args:
        index: integers ``[B, T]``.
        values: ``[B, T, D]``, of any strides.

    Returns:
        ``[B]`` twice, float64; None where the kernel cannot do it.
    """
    library = _library() if has_sums_by_index(values.device, values.dtype) else None
    if library is None:
        return None
    found = [torch.empty(values.shape[0], dtype=torch.float64) for _ in range(2)]
    index, threads = index.long().contiguous(), ctypes.c_int(torch.get_num_threads())
    place, targets = ctypes.c_void_p(index.data_ptr()), [ctypes.c_void_p(x.data_ptr()) for x in found]
    library.dp_norms_by_index(place, *_strided(values), *_sizes(values), *targets, threads)
    return found[0], found[1]


def sums_by_index(weights: Tensor, index: Tensor, values: Tensor, rows: int) -> Tensor | None:
    """What :func:`dpcompile.kernels.index_op.clipped_sums_by_index` returns, in one pass; None as above.

    Args:
        weights: ``[B]``, float32.
        index: integers ``[B, T]``.
        values: ``[B, T, D]``, of any strides.
        rows: of the table.

    Raises:
        IndexError: an index is not in ``[0, rows)``.
    """
    library = _library() if has_sums_by_index(values.device, values.dtype) else None
    if library is None or weights.dtype != values.dtype:
        return None
    result = values.new_empty(rows, values.shape[2])
    index, weights = index.long().contiguous(), weights.contiguous()
    places, factors, target = (ctypes.c_void_p(x.data_ptr()) for x in (index, weights, result))
    sizes, threads = [*_sizes(values), ctypes.c_int64(rows)], ctypes.c_int(torch.get_num_threads())
    if library.dp_sums_by_index(places, *_strided(values), factors, *sizes, target, threads):
        raise IndexError(f"an index is not that of one of the table's {rows} rows")
    return result


def _strided(values: Tensor) -> tuple[object, object]:
    return ctypes.c_void_p(values.data_ptr()), (ctypes.c_int64 * values.ndim)(*values.stride())


def _sizes(values: Tensor) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(n) for n in values.shape]


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    try:
        return compile_cpp(_SOURCE.read_text())
    except Exception:  # no compiler: torch's own operations are right too
        return None


@lru_cache(maxsize=1)
def _kernel() -> Callable[[Tensor, Tensor, Tensor], bool] | None:
    """What multiplies, and says whether it did."""
    address, library = onednn_matmul(), _library()
    if address is None or library is None:
        return None
    function = library.dp_multiply
    function.argtypes, function.restype = [ctypes.c_void_p] * 4, ctypes.c_int

    def kernel(a: Tensor, b: Tensor, out: Tensor) -> bool:
        return function(address, tensor_address(a), tensor_address(b), tensor_address(out)) == 0

    return kernel if _is_right(kernel) else None


def _is_right(kernel: Callable[[Tensor, Tensor, Tensor], bool]) -> bool:
    """Whether products of small integers, which are exact, come out."""
    left, right = torch.arange(24.0).reshape(2, 3, 4), torch.arange(40.0).reshape(2, 4, 5)
    for a in (left, left.mT.contiguous().mT):
        for b in (right, right.mT.contiguous().mT):
            both, one = torch.full((2, 3, 5), torch.nan), torch.full((3, 5), torch.nan)
            if not (kernel(a, b, both) and kernel(a[0], b[0], one)):
                return False
            wanted = (a.unsqueeze(-1) * b.unsqueeze(1)).sum(2)
            if not (torch.equal(both, wanted) and torch.equal(one, wanted[0])):
                return False
    return True
