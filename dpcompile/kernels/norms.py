"""Squared norms of sums of outer products as operators that graphs hold whole.

Shape letters as in :mod:`dpcompile.norms.factors`: the gradient of example b is the sum over t of
``rows[b, k, t, :]^T cols[b, k, t, :]``, one matrix for every k. On CUDA the operators are Triton kernels, where Triton
is there and the operands are not float64; elsewhere torch operations on small panels. Operands may have any strides and
any floating dtype, and they need not have the same one. There is no derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpcompile.kernels import norms_torch
from dpcompile.kernels.on_gpu import has_triton

__all__ = ["direct_norm", "ghost_norm", "ghost_norm_one_hot", "triton_runs"]

_ANY_STRIDES = (torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe)  # examples are counted that are done again


@torch.library.custom_op("dpcompile::direct_norm", mutates_args=(), tags=_ANY_STRIDES)
def direct_norm(rows: Tensor, cols: Tensor) -> Tensor:
    """The squared norm of every example's sum of outer products, which is made a tile at a time and never stored.

    Args:
        rows: ``[B, K, T, P]``.
        cols: ``[B, K, T, D]``.

    **Guarantee.** The result is right, or too large: what rounding can move is added, and where that is not little the
    example is done again in float64.

    Returns:
        ``[B]``, float64. Values that are not finite give a result that is not.
    """
    _check("direct_norm", rows, cols)
    return norms_torch.direct_norm(rows, cols) if _any(rows, cols) else _zeros(rows, cols)


@torch.library.custom_op("dpcompile::ghost_norm", mutates_args=(), tags=_ANY_STRIDES)
def ghost_norm(rows: Tensor, cols: Tensor) -> Tensor:
    """The same from the Gram matrices of rows and columns (Li et al. 2022, arXiv:2110.05679, section 4).

    Neither matrix is stored, and both are symmetric: pairs of tiles off the diagonal are made once and counted twice.

    **Guarantee.** As for :func:`direct_norm`; see :func:`dpcompile.kernels.rounding.gram_unit`.

    Args:
        rows: ``[B, K, T, P]``.
        cols: ``[B, K, T, D]``.

    Returns:
        ``[B]``, float64. Values that are not finite give a result that is not.
    """
    _check("ghost_norm", rows, cols)
    return norms_torch.ghost_norm(rows, cols) if _any(rows, cols) else _zeros(rows, cols)


@torch.library.custom_op("dpcompile::ghost_norm_one_hot", mutates_args=(), tags=_ANY_STRIDES)
def ghost_norm_one_hot(index: Tensor, cols: Tensor) -> Tensor:
    """:func:`ghost_norm` where ``rows[b, k, t, :]`` is one at ``index[b, t]`` and zero elsewhere: an embedding's.

    Args:
        index: integers ``[B, T]``; any numbers, only whether they are equal counts.
        cols: ``[B, K, T, D]``.

    Returns:
        ``[B]``, float64, with the guarantee of :func:`ghost_norm`.
    """
    _check_index(index, cols)
    return norms_torch.ghost_norm(None, cols, index) if cols.numel() else _zeros(cols)


@direct_norm.register_kernel("cuda")
def _direct_cuda(rows: Tensor, cols: Tensor) -> Tensor:
    _check("direct_norm", rows, cols)
    if not _any(rows, cols):
        return _zeros(rows, cols)
    if not triton_runs(rows, cols):
        return norms_torch.direct_norm(rows, cols)
    from dpcompile.kernels.triton import direct as triton_direct

    return triton_direct.direct_norm(rows, cols)


@ghost_norm.register_kernel("cuda")
def _ghost_cuda(rows: Tensor, cols: Tensor) -> Tensor:
    _check("ghost_norm", rows, cols)
    if not _any(rows, cols):
        return _zeros(rows, cols)
    if not triton_runs(rows, cols):
        return norms_torch.ghost_norm(rows, cols)
    from dpcompile.kernels.triton import ghost as triton_ghost

    return triton_ghost.ghost_norm(rows, cols)


@ghost_norm_one_hot.register_kernel("cuda")
def _one_hot_cuda(index: Tensor, cols: Tensor) -> Tensor:
    _check_index(index, cols)
    if not cols.numel():
        return _zeros(cols)
    if not triton_runs(cols):
        return norms_torch.ghost_norm(None, cols, index)
    from dpcompile.kernels.triton import ghost as triton_ghost

    return triton_ghost.ghost_norm_one_hot(index, cols)


@direct_norm.register_fake
def _(rows: Tensor, cols: Tensor) -> Tensor:
    return _zeros(rows, cols)


@ghost_norm.register_fake
def _(rows: Tensor, cols: Tensor) -> Tensor:
    return _zeros(rows, cols)


@ghost_norm_one_hot.register_fake
def _(index: Tensor, cols: Tensor) -> Tensor:
    return _zeros(cols)


def triton_runs(*operands: Tensor) -> bool:
    """Whether the Triton kernels take these operands: Triton is installed, and none of them is wider than float32."""
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return has_triton() and all(o.dtype in narrow for o in operands)


def _zeros(*operands: Tensor) -> Tensor:
    return operands[0].new_zeros(operands[0].shape[0], dtype=torch.float64)


def _any(rows: Tensor, cols: Tensor) -> bool:
    return rows.numel() > 0 and cols.numel() > 0


def _check(name: str, rows: Tensor, cols: Tensor) -> None:
    if rows.ndim != 4 or cols.ndim != 4 or rows.shape[:3] != cols.shape[:3]:
        raise ValueError(f"{name} takes [B, K, T, P] and [B, K, T, D], not {list(rows.shape)} and {list(cols.shape)}")
    _check_floating(name, rows, cols)


def _check_index(index: Tensor, cols: Tensor) -> None:
    if index.ndim != 2 or cols.ndim != 4 or index.shape != (cols.shape[0], cols.shape[2]):
        shapes = f"{list(index.shape)} and {list(cols.shape)}"
        raise ValueError(f"ghost_norm_one_hot takes an index [B, T] and [B, K, T, D], not {shapes}")
    if index.is_floating_point() or index.is_complex():
        raise ValueError(f"ghost_norm_one_hot takes an index of integers, not of {index.dtype}")
    _check_floating("ghost_norm_one_hot", cols)


def _check_floating(name: str, *operands: Tensor) -> None:
    for operand in operands:
        if not operand.is_floating_point():
            raise ValueError(f"{name} takes real floating-point numbers, not {operand.dtype}")
        if operand.device != operands[0].device:
            raise ValueError(f"{name} takes operands on one device, not on {operands[0].device} and {operand.device}")
