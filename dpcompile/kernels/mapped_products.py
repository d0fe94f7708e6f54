"""Norms behind a function that works row by row, by float32 products: for those that can be told to be right.

As in :mod:`dpcompile.kernels.mapped_norms`, with ``a_jo = <w_jo, g_o>``:

    ``|h|^2 = |s g|^2 + sum_o sum_jk a_jo M_jko a_ko``, ``M_o = 2 s_o C_o + C_o^T G_o C_o``, ``G_jlo = <w_jo, w_lo>``

Only the products of the parameters with the columns, by far the most of the work, are float32. How far an ``a`` may be
off is known beforehand, and what comes of it once the ``a`` are: little, where they are small beside ``|w| |g|``, as
they mostly are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpcompile.kernels.build import kernel
from dpcompile.kernels.gram import gram
from dpcompile.kernels.products import blocked_product_
from dpcompile.kernels.rounding import TINY, WIDE, gamma, unit_of
from dpcompile.kernels.squares import squares_of

__all__ = ["Found", "by_products"]

_ROWS = 256  # of a parameter that the kernel works on at once
_MOST = 8  # bases, in the kernel
_BLOCK = 2304  # terms of a float32 product that are added up at a time, and up to twice as many
_AT_ONCE = 2**22  # elements of products and columns that exist at once


class Found(NamedTuple):
    """Squared norms, how far each may be off, and the squared size of each gradient: ``[B]``, float64."""

    squared: Tensor
    slack: Tensor
    sizes: Tensor


def by_products(rows: Tensor, cols: Tensor, scale: Tensor, bases: Sequence[Tensor], mixed: Tensor) -> Found | None:
    """Squared norms as :func:`dpcompile.kernels.mapped_norms.mapped_norms` has them, or None where there is no kernel.

    **Guarantee.** Each is off by ``slack`` at most, for all values and orders of additions; not finite where the
    operands are not, or a product overflows.
    """
    library = _library() if _fits(rows, cols, bases) else None
    return None if library is None else _found(library, rows, cols, scale, bases, mixed)


def _fits(rows: Tensor, cols: Tensor, bases: Sequence[Tensor]) -> bool:
    return (
        bool(bases)
        and len(bases) <= _MOST
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (rows, cols, *bases))
    )


def _found(
    library: ctypes.CDLL, rows: Tensor, cols: Tensor, scale: Tensor, bases: Sequence[Tensor], mixed: Tensor
) -> Found:
    batch, _, positions, p = rows.shape
    width, count = cols.shape[-1], len(bases) + 1
    weights = [w.reshape(p, width).contiguous() for w in bases]
    form = _form(library, scale, mixed, _inner(library, weights))
    lengths, of_rows = squares_of(cols[:, 0]).sqrt(), squares_of(rows[:, 0]).sqrt()
    spread = (lengths * of_rows).sum(1).square()
    wide = gamma(2 * width + 2 * positions + p + count * (count + 8) + 32, WIDE) * 1.001
    most = scale.abs().amax() if p else scale.new_zeros(())
    parts = []
    step = max(1, _AT_ONCE // max(1, positions * (width + p * count + positions)))
    for i in range(0, batch, step):
        own, columns = rows[i : i + step, 0].contiguous(), cols[i : i + step]
        scaled = own.double() * scale
        ghost = (torch.bmm(scaled, scaled.mT) * gram(columns, 1)[:, 0]).sum((1, 2))
        mapped, slack = _sums(library, own, columns[:, 0], lengths[i : i + step], weights, form, wide)
        parts.append((ghost + mapped, slack))
    if not parts:
        return Found(*(rows.new_zeros(0, dtype=torch.float64) for _ in range(3)))
    squared, slack = (torch.cat(x) for x in zip(*parts, strict=True))
    return Found(squared, (slack + wide * most.square() * spread) * 1.001, form.longest.square() * spread)


class _Form(NamedTuple):
    """``M [n, n, P]``, the sum of its absolute terms, ``|w_j| [n, P]``, and the most that a row may become longer."""

    values: Tensor
    sizes: Tensor
    lengths: Tensor
    longest: Tensor


def _form(library: ctypes.CDLL, scale: Tensor, mixed: Tensor, inner: Tensor) -> _Form:
    """Of ``G [n, n, P]``."""
    count, p = len(inner), inner.shape[2]
    memory = torch.empty((2 * count + 2, count, p), dtype=torch.float64)
    values, sizes, lengths, longer = memory.split((count, count, 1, 1))
    scale, mixed = scale.contiguous(), mixed.contiguous()  # held while the kernel reads them
    library.dp_mapped_form(
        *(_address(x) for x in (scale, mixed, inner)),
        *(ctypes.c_int64(n) for n in (count, p)),
        *(_address(x) for x in (values, sizes, lengths, longer)),
        ctypes.c_int(torch.get_num_threads()),
    )
    return _Form(values, sizes, lengths[0], longer[0, 0].amax() if p else scale.new_zeros(()))


def _inner(library: ctypes.CDLL, weights: Sequence[Tensor]) -> Tensor:
    """``G``."""
    (p, width), count = weights[0].shape, len(weights) + 1
    inner = torch.empty((count, count, p), dtype=torch.float64)
    memory = (ctypes.c_void_p * len(weights))(*(w.data_ptr() for w in weights))
    sizes = (ctypes.c_int64(n) for n in (count, p, width))
    library.dp_rows_inner(memory, *sizes, _address(inner), ctypes.c_int(torch.get_num_threads()))
    return inner


def _sums(
    library: ctypes.CDLL,
    rows: Tensor,
    cols: Tensor,
    lengths: Tensor,
    weights: Sequence[Tensor],
    form: _Form,
    wide: float,
) -> tuple[Tensor, Tensor]:
    """``sum_o a_o^T M_o a_o`` and how far it may be off, of examples ``[b, T, P]`` and ``[b, T, D]``: ``[b]``."""
    (batch, positions, p), width = rows.shape, cols.shape[-1]
    flat = cols.reshape(batch * positions, width)
    seen = rows.new_empty(len(weights), batch * positions, p)
    terms = max([blocked_product_(flat, w.T, out, _BLOCK) for w, out in zip(weights, seen, strict=True)])
    ones, lengths = flat.sum(1, dtype=torch.float64), lengths.contiguous()
    found = torch.empty((2, batch, -(-p // _ROWS)), dtype=torch.float64)
    numbers = (gamma(terms + 2, unit_of(torch.float32)) * 1.001, wide, width * TINY)
    library.dp_mapped_sums(
        *(_address(x) for x in (rows, seen, ones, lengths, form.values, form.sizes, form.lengths)),
        *(ctypes.c_int64(n) for n in (batch, positions, p, len(weights) + 1)),
        *(ctypes.c_double(x) for x in numbers),
        _address(found[0]),
        _address(found[1]),
        ctypes.c_int(torch.get_num_threads()),
    )
    squared, slack = found.sum(2)
    return squared, slack


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@kernel("mapped")
def _library(library: ctypes.CDLL) -> bool:
    """Whether sums over small integers, which are exact, come out, in more than one block of rows."""
    p, width = _ROWS + 3, 5
    rows = (torch.arange(2.0 * 3 * p) % 7 - 3).reshape(2, 1, 3, p)
    cols = (torch.arange(2.0 * 3 * width) % 5 - 2).reshape(2, 1, 3, width)
    bases = [(torch.arange(float(p * width)) % n - 2).reshape(p, width) for n in (5, 6)]
    scale = torch.arange(p, dtype=torch.float64) % 3 - 1
    mixed = (torch.arange(9 * p, dtype=torch.float64) % 4 - 1).reshape(3, 3, p)
    each = rows[:, 0].double().mT @ cols[:, 0].double()
    wide = torch.stack([each.new_ones(p, width), *(w.double() for w in bases)])
    sums = torch.einsum("kpd,bpd->bkp", wide, each)
    wanted = (scale[:, None] * each + torch.einsum("jpd,jkp,bkp->bpd", wide, mixed, sums)).square().sum((1, 2))
    found = _found(library, rows, cols, scale, bases, mixed)
    return torch.equal(found.squared, wanted) and bool(
        (found.slack >= 0).all() and (found.slack <= 1e-3 * wanted).all()
    )
