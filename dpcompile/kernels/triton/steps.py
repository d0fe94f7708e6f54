"""Noise, division and an optimizer's update as one Triton kernel over all tensors: `kernels/cpp/gaussian.cpp`'s work.

Importing this module imports Triton. Sources: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2;
Sutskever et al. 2013, section 2 (momentum, as torch has it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpcompile.kernels.triton.normals import normals
from dpcompile.kernels.triton.table import NUMBERS, number, numbers_table, place_of, pointer, programs_of

__all__ = ["ADAM", "MEAN", "MOMENTUM", "SGD", "step_", "step_kernel"]

MEAN, ADAM, SGD, MOMENTUM = "mean", "adam", "sgd", "momentum"
_BLOCK = 1024  # elements of a program
_WARPS = 4
# In the head of the table: step, seed, and from here on standard deviation, divisor and what the update needs.
_REALS = tl.constexpr(3)
# Rows of the table: programs, sizes, starts, tags, and from here on addresses.
_ADDRESSES = tl.constexpr(4)


@triton.jit
def _over(a, b, DTYPE: tl.constexpr):
    """``a / b``, rounded to nearest."""
    if DTYPE == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _root(a, DTYPE: tl.constexpr):
    """The square root, rounded to nearest."""
    if DTYPE == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def _adam(w, m, v, gradient, table, DTYPE: tl.constexpr):
    """New weight and means; the head holds decay, l2, 1 - beta1, beta2, 1 - beta2, step size, scale, eps."""
    decay, l2 = number(table, _REALS + 2, DTYPE), number(table, _REALS + 3, DTYPE)
    rate1, beta2 = number(table, _REALS + 4, DTYPE), number(table, _REALS + 5, DTYPE)
    rate2, step_size = number(table, _REALS + 6, DTYPE), number(table, _REALS + 7, DTYPE)
    scale, eps = number(table, _REALS + 8, DTYPE), number(table, _REALS + 9, DTYPE)
    g = tl.fma(w, l2 + tl.zeros_like(w), gradient)
    m = tl.fma(g - m, rate1 + tl.zeros_like(w), m)
    v = tl.fma(g * rate2, g, v * beta2)
    below = tl.fma(_root(v, DTYPE), scale + tl.zeros_like(w), eps + tl.zeros_like(w))
    return w * decay - _over(step_size * m, below, DTYPE), m, v


@triton.jit
def _momentum(w, gradient, buffer, table, DTYPE: tl.constexpr):
    """New weight and buffer; the head holds rate, l2, momentum, 1 - dampening, whether it is new, whether Nesterov."""
    g = gradient + w * number(table, _REALS + 3, DTYPE)
    momentum, share = number(table, _REALS + 4, DTYPE), number(table, _REALS + 5, DTYPE)
    buffer = tl.where(number(table, _REALS + 6, DTYPE) != 0, g, buffer * momentum + g * share)
    g = tl.where(number(table, _REALS + 7, DTYPE) != 0, g + buffer * momentum, buffer)
    return w - g * number(table, _REALS + 2, DTYPE), buffer


@triton.jit
def step_kernel(
    table, count, KIND: tl.constexpr, DRAW: tl.constexpr, GIVEN: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: ``BLOCK`` elements of one tensor.

    Args:
        table: see the constants of this file. Addresses: of totals, of weights and state, of noise that was drawn.
        count: tensors.
        KIND: of update.
        DRAW: whether noise is drawn.
        GIVEN: the row of the addresses of noise that was drawn before; 0: none was.
        DTYPE: of all tensors.
        BLOCK: elements, even.
    """
    program = tl.program_id(0)
    i, before = place_of(table, count, program)  # type: ignore
    rows = table + NUMBERS + i
    size, start = tl.load(rows + count), tl.load(rows + 2 * count)
    base = (program - before).to(tl.int64) * BLOCK - (start & 1)  # counter blocks begin at even elements
    at = base + tl.arange(0, BLOCK)
    inside = (at >= 0) & (at < size)
    totals = pointer(table, count, _ADDRESSES, i, DTYPE)
    x = tl.load(totals + at, mask=inside, other=0.0)
    std, divisor = number(table, _REALS, DTYPE), number(table, _REALS + 1, DTYPE)
    if DRAW:
        block = ((start + base) >> 1) + tl.arange(0, BLOCK // 2)
        step, tag = tl.load(table).to(tl.uint32), tl.load(rows + 3 * count).to(tl.uint32)
        key0, key1 = tl.load(table + 1).to(tl.uint32), tl.load(table + 2).to(tl.uint32)
        z = normals(block, step, tag, key0, key1).to(DTYPE)
        x = tl.fma(z, std + tl.zeros_like(x), x)
    if GIVEN:
        z = tl.load(pointer(table, count, GIVEN, i, DTYPE) + at, mask=inside, other=0.0)
        x = tl.fma(z, std + tl.zeros_like(x), x)
    x = _over(x, divisor + tl.zeros_like(x), DTYPE)
    tl.store(totals + at, x, mask=inside)
    if KIND != "mean":
        weights = pointer(table, count, _ADDRESSES + 1, i, DTYPE)
        w = tl.load(weights + at, mask=inside, other=0.0)
        if KIND == "adam":
            means = pointer(table, count, _ADDRESSES + 2, i, DTYPE)
            squares = pointer(table, count, _ADDRESSES + 3, i, DTYPE)
            m, v = tl.load(means + at, mask=inside, other=0.0), tl.load(squares + at, mask=inside, other=0.0)
            w, m, v = _adam(w, m, v, x, table, DTYPE)
            tl.store(means + at, m, mask=inside)
            tl.store(squares + at, v, mask=inside)
        elif KIND == "momentum":
            buffers = pointer(table, count, _ADDRESSES + 2, i, DTYPE)
            w, buffer = _momentum(w, x, tl.load(buffers + at, mask=inside, other=0.0), table, DTYPE)
            tl.store(buffers + at, buffer, mask=inside)
        else:
            w = w - (x + w * number(table, _REALS + 3, DTYPE)) * number(table, _REALS + 2, DTYPE)
        tl.store(weights + at, w, mask=inside)


def step_(
    kind: str,
    totals: Sequence[Tensor],
    others: Sequence[Sequence[Tensor]] = (),
    *,
    tags: Sequence[int],
    starts: Sequence[int],
    std: float,
    divisor: float,
    seed: int,
    step: int,
    rates: Sequence[float] = (),
    drawn: Sequence[Tensor] | None = None,
) -> None:
    """``totals = (totals + std * noise) / divisor``, and an update with that: one launch, which nothing waits for.

    Args:
        kind: :data:`MEAN`, :data:`ADAM`, :data:`SGD` or :data:`MOMENTUM`.
        totals: of one device and dtype, float32 or float64, contiguous.
        others: of each kind its tensors: weights; Adam's means and means of squares, or momentum's buffers.
        tags: last words of the counters, one for each tensor.
        starts: the index, in its whole parameter, of each tensor's first element.
        std: of the noise; 0: none is drawn.
        divisor: of the sums.
        seed: in [0, 2**64).
        step: in [0, 2**32).
        rates: what stands in the table behind standard deviation and divisor.
        drawn: noise in the place of what seed and step give.
    """
    places = [start & 1 for start in starts]
    ends = programs_of([t.numel() + place for t, place in zip(totals, places, strict=True)], _BLOCK)
    kinds = [totals, *others, *([] if drawn is None else [drawn])]
    addresses = [[t.data_ptr() for t in tensors] for tensors in kinds]
    like = totals[0]
    if not ends[-1]:
        return
    table = numbers_table(
        [step, seed & 0xFFFFFFFF, seed >> 32],
        [std, divisor, *rates],
        [ends, [t.numel() for t in totals], starts, tags, *addresses],
        like.device,
    )
    with torch.cuda.device_of(like):
        cast(Any, step_kernel)[(ends[-1],)](
            table,
            len(totals),
            KIND=kind,
            DRAW=std != 0 and drawn is None,
            GIVEN=0 if drawn is None else _ADDRESSES.value + 1 + len(others),
            DTYPE=tl.float64 if like.dtype == torch.float64 else tl.float32,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
