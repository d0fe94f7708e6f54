"""Products of float32 matrices by oneDNN: torch has it in it, and multiplies matrices by it in narrower dtypes only."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from dpcompile._torch.native import onednn_matmul
from dpcompile._torch.tensors import tensor_address
from dpcompile.kernels.build import kernel

__all__ = ["has_onednn", "multiply_"]


def has_onednn() -> bool:
    """Whether :func:`multiply_` is oneDNN's: torch has it, it can be called, and what it gave was right."""
    return _library() is not None


def multiply_(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write ``a @ b`` to ``out``: by oneDNN, or by torch where that cannot be.

    Args:
        a: ``[M, K]`` or ``[B, M, K]``, float32, on the CPU. oneDNN takes it row by row or column by column, dense; what
            lies otherwise is copied, in the order that it has.
        b: ``[K, N]`` or ``[B, K, N]``, the same.
        out: ``[M, N]`` or ``[B, M, N]``, contiguous; memory of its own.
    """
    library = _library() if a.numel() and b.numel() else None
    if library is None or not _multiplied(library, _dense(a), _dense(b), out):
        torch.matmul(a, b, out=out)


def _dense(matrices: Tensor) -> Tensor:
    """The same without gaps. Of columns that are not dense torch would make rows, which takes several times as long."""
    if matrices.is_contiguous() or matrices.mT.is_contiguous():
        return matrices
    by_columns = matrices.stride(-2) < matrices.stride(-1)
    return matrices.mT.contiguous().mT if by_columns else matrices.contiguous()


_address = lru_cache(maxsize=1)(onednn_matmul)


def _multiplied(library: ctypes.CDLL, a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether it did."""
    addresses = (_address(), tensor_address(a), tensor_address(b), tensor_address(out))
    return library.dp_multiply(*(ctypes.c_void_p(address) for address in addresses)) == 0


@kernel("onednn")
def _library(library: ctypes.CDLL) -> bool:
    """Whether products of small integers, which are exact, come out."""
    if _address() is None:
        return False
    left, right = torch.arange(24.0).reshape(2, 3, 4), torch.arange(40.0).reshape(2, 4, 5)
    for a in (left, left.mT.contiguous().mT):
        for b in (right, right.mT.contiguous().mT):
            both, one = torch.full((2, 3, 5), torch.nan), torch.full((3, 5), torch.nan)
            if not (_multiplied(library, a, b, both) and _multiplied(library, a[0], b[0], one)):
                return False
            wanted = (a.unsqueeze(-1) * b.unsqueeze(1)).sum(2)
            if not (torch.equal(both, wanted) and torch.equal(one, wanted[0])):
                return False
    return True
