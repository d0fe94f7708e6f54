"""Clipped sums as integers, multiples of a power of two: the one rounding is that to the grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpcompile.errors import PrivacyError

__all__ = ["BITS", "LARGEST", "ROUNDINGS", "check_grid", "default_bits", "spacing", "to_grid", "within"]

LARGEST = 2**52  # of a sum, in units: float64 holds every integer up to twice that
ROUNDINGS = 1024  # of a sum: the ranks whose sums are rounded one by one, at most
BITS = range(16, 44)
_EXPONENTS = 400  # of C: far from where float64 ends


def check_grid(max_grad_norm: float, bits: int) -> None:
    """Raise PrivacyError if there is no such grid."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise PrivacyError(
            f"bits of the grid is {bits!r}",
            remedy=f"give an integer from {BITS[0]} to {BITS[-1]}, or leave it out",
        )
    if not 2.0**-_EXPONENTS < max_grad_norm < 2.0**_EXPONENTS:
        raise PrivacyError(
            f"max_grad_norm {max_grad_norm!r}, of which a grid is to be a part",
            remedy=f"take one between 2**-{_EXPONENTS} and 2**{_EXPONENTS}, or leave exact=True out",
        )


def default_bits(expected_batch_size: float) -> int:
    """40, or as many fewer as leave room for the sum of four times as many examples, all in one element."""
    return max(BITS[0], min(40, 49 - math.ceil(math.log2(max(expected_batch_size, 1.0)))))


def spacing(max_grad_norm: float, bits: int) -> float:
    """The grid: the largest power of two that is not above C, divided by ``2**bits``."""
    return math.ldexp(1.0, math.frexp(max_grad_norm)[1] - 1 - bits)


def to_grid(total: Tensor, grid: float) -> Tensor:
    """``total / grid``, rounded to integers, as float64.

    **Guarantee.** Each element is off by 1/2 at most, of what is finite and below ``2**500``: division by a power of
    two is exact. Where :func:`within` holds, it is an integer that int64 and float64 hold.
    """
    return total.to(torch.float64).mul(1 / grid).round_()


def within(units: Tensor, largest: int = LARGEST) -> Tensor:
    """Whether all elements are numbers of size ``largest`` at most; a bool ``[]``."""
    return (units.abs() <= largest).all()  # not NaN
