"""What one launch over many tensors is told of them: a table of int64 in the device's memory.

A kernel that were given tensors as arguments would be compiled for their number, and be told of some dozens at most.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpcompile._torch.tensors import add_each_
from dpcompile.kernels.on_gpu import captured

__all__ = ["NUMBERS", "number", "numbers_table", "place_of", "pointer", "programs_of"]

NUMBERS = tl.constexpr(16)  # that stand before the rows


def programs_of(numels: Sequence[int], block: int) -> list[int]:
    """The first program behind each tensor's own, of ``block`` elements each."""
    return list(accumulate(-(-n // block) for n in numels))


def numbers_table(
    integers: Sequence[int],
    reals: Sequence[float],
    rows: Sequence[Sequence[int]],
    device: torch.device,
    tail: Sequence[float] = (),
) -> Tensor:
    """Integers and float64 numbers, rows of one integer for each tensor, and more numbers; waits for no device.

    The copy comes from pinned memory, which torch keeps until it is done. In a CUDA graph, whose replays would read
    that memory again, numbers are arguments of kernels.

    Args:
        integers: of all tensors.
        reals: of all tensors; they stand behind the integers.
        rows: of each tensor something, such as its address. The first row is that of :func:`programs_of`.
        device: where.
        tail: numbers behind the rows.
    """
    head = [*integers, *map(_bits, reals)]
    room = NUMBERS.value - len(head)
    assert room >= 0, "the head is as long as the kernels take it"
    values = [*head, *[0] * room, *(x for row in rows for x in row), *map(_bits, tail)]
    if captured():
        whole = torch.zeros(len(values), dtype=torch.int64, device=device)
        add_each_(list(whole.unbind()), values)
        return whole
    whole = torch.tensor(values, dtype=torch.int64)
    return whole.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else whole


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


@triton.jit
def place_of(table, count, program):
    """The number of the tensor that a program is of, and the first program of it."""
    low, high = program * 0, program * 0 + count
    while low < high:
        middle = (low + high) // 2
        behind = tl.load(table + NUMBERS + middle) <= program
        low = tl.where(behind, middle + 1, low)
        high = tl.where(behind, high, middle)
    return low, tl.load(table + NUMBERS + low - 1, mask=low > 0, other=0)


@triton.jit
def pointer(table, count, ROW: tl.constexpr, i, DTYPE: tl.constexpr):
    """To tensor i, whose address stands in a row."""
    return tl.load(table + NUMBERS + ROW * count + i).to(tl.pointer_type(DTYPE))  # type: ignore


@triton.jit
def number(table, PLACE: tl.constexpr, DTYPE: tl.constexpr):
    """A float64 number of the head, rounded."""
    return tl.load(table + PLACE).to(tl.float64, bitcast=True).to(DTYPE)
