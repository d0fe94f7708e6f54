"""Products of bfloat16 and float16 matrices of examples on CPUs, in float32, with their norms.

Torch's own product of such matrices rounds its result to their dtype, and widening them first costs what they were made
narrow for. But its library multiplies them block by block into float32 sums (oneDNN, by AMX or AVX512-BF16), which
Inductor's own code for products calls too; here a program of ours goes over the blocks. ``python -m
benchmarks.products`` prints times.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache, partial

import torch
from torch import Tensor

from dpcompile._torch.native import block_products
from dpcompile.kernels.build import kernel

__all__ = ["NARROW", "has_narrow", "narrow_products"]

NARROW = (torch.bfloat16, torch.float16)


def has_narrow(dtype: torch.dtype) -> bool:
    """Whether products of such matrices come out of the kernel: torch has it for this processor, and it was right."""
    return dtype in _LIBRARIES and _LIBRARIES[dtype]() is not None


def narrow_products(rows: Tensor, cols: Tensor, out: Tensor) -> Tensor | None:
    """Write ``rows^T cols`` of every example to ``out``, exact products added up in float32.

    Args:
        rows: ``[B, T, P]``, bfloat16 or float16, on the CPU; any strides.
        cols: ``[B, T, D]``, of the same dtype; any strides.
        out: ``[B, P, D]``, float32, contiguous; memory of its own.

    Returns:
        The squared norms of what ``out`` holds, ``[B]``, float64; or None where there is no such kernel, and ``out``
        is to be written otherwise.
    """
    fits = rows.dtype == cols.dtype and rows.device.type == cols.device.type == "cpu" and rows.numel() and cols.numel()
    library = _LIBRARIES[rows.dtype]() if fits and rows.dtype in _LIBRARIES else None
    return None if library is None else _multiplied(library, rows, cols, out)


_blocks = lru_cache(maxsize=2)(block_products)


def _multiplied(library: ctypes.CDLL, rows: Tensor, cols: Tensor, out: Tensor) -> Tensor | None:
    addresses = _blocks(rows.dtype)
    if addresses is None:
        return None
    norms = torch.empty(rows.shape[0], dtype=torch.float64)
    sizes = (ctypes.c_int64 * 4)(*rows.shape, cols.shape[2])
    strides = [(ctypes.c_int64 * 3)(*side.stride()) for side in (rows, cols)]
    functions = [ctypes.c_void_p(address) for address in addresses]
    sides, results = ([ctypes.c_void_p(x.data_ptr()) for x in pair] for pair in ((rows, cols), (out, norms)))
    threads = ctypes.c_int(torch.get_num_threads())
    return None if library.dp_narrow(*functions, *sides, sizes, *strides, *results, threads) else norms


def _is_right(dtype: torch.dtype, library: ctypes.CDLL) -> bool:
    """Whether products of small integers, which are exact, come out: odd numbers of terms, both orders in memory."""
    for terms, p, d in ((5, 70, 131), (33, 17, 3), (64, 64, 256)):
        rows = torch.arange(2.0 * terms * p).remainder(7).sub(3).reshape(2, terms, p)
        cols = torch.arange(2.0 * terms * d).remainder(5).sub(2).reshape(2, terms, d)
        wanted = rows.double().mT @ cols.double()
        for left in (rows, rows.mT.contiguous().mT):
            for right in (cols, cols.mT.contiguous().mT):
                out = torch.full((2, p, d), torch.nan)
                norms = _multiplied(library, left.to(dtype), right.to(dtype), out)
                if norms is None or not torch.equal(out.double(), wanted):
                    return False
                if not torch.equal(norms, wanted.square().sum((1, 2))):
                    return False
    return True


_LIBRARIES = {dtype: kernel("narrow", contract=True)(partial(_is_right, dtype)) for dtype in NARROW}
