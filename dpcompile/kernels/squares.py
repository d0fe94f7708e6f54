"""Sums of squares, in float64, by kernels of ours: in one pass and without a wide copy."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dpcompile.kernels.build import kernel
from dpcompile.kernels.on_gpu import proven, runs_triton

__all__ = ["squares_of", "squares_run_on"]


def squares_of(values: Tensor) -> Tensor:
    """Sums of squares over the last axis, float64: ``[.., n]`` to ``[..]``, of any strides.

    **Guarantee.** No square is lost or overflows: those of float32 numbers lie within float64.
    """
    if runs_triton(values.device):
        if values.ndim <= 4 and values.is_floating_point() and squares_run_on(values.device):
            from dpcompile.kernels.triton import squares

            return squares.squares_of(values)
        return torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64).square()
    fits = values.dtype in (torch.float32, torch.bfloat16) and values.device.type == "cpu" and values.ndim <= 4
    library = _library() if fits else None
    if library is None:
        return torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64).square()
    return _squares(library, values)


def _squares(library: ctypes.CDLL, values: Tensor) -> Tensor:
    whole = values.reshape(*[1] * (4 - values.ndim), *values.shape)
    result = torch.empty(values.shape[:-1], dtype=torch.float64)
    sizes, strides = ((ctypes.c_int64 * 4)(*numbers) for numbers in (whole.shape, whole.stride()))
    target, threads = ctypes.c_void_p(result.data_ptr()), ctypes.c_int(torch.get_num_threads())
    narrow = ctypes.c_bool(values.dtype == torch.bfloat16)
    library.dp_squares(ctypes.c_void_p(whole.data_ptr()), narrow, sizes, strides, target, threads)
    return result


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
