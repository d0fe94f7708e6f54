"""Whether a uniform number is below ``exp(-y) / scale``, decided without error, of as many bits as that takes."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import MAX_EMAX, MIN_EMIN, ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction

__all__ = ["BITS", "WORD", "is_below", "leading_zeros"]

BITS = 53  # of a uniform number, that are known at first
WORD = 64  # bits that come at a time, after those


def is_below(known: int, more: Iterator[int], exponent: Fraction, scale: Fraction) -> bool:
    """Whether ``u * scale < exp(-exponent)``, for u uniform in [0, 1).

    Args:
        known: the first :data:`BITS` bits of u, as an integer.
        more: those after them, :data:`WORD` at a time.
        exponent: y, 0 or more.
        scale: above 0.

    **Guarantee.** The answer is that of real numbers: of the bits known so far ``low <= u 2**n < low + 1``, and
    ``exp(-y)`` lies between two decimal numbers; what these do not decide, more bits and digits do. With probability 1
    some do, as u has no atoms.
    """
    low, bits = known, BITS
    while True:
        lower, upper = exp_bounds(exponent, bits)
        if (low + 1) * scale <= lower * 2**bits:
            return True
        if low * scale >= upper * 2**bits:
            return False
        low, bits = low << WORD | next(more), bits + WORD


def exp_bounds(exponent: Fraction, bits: int) -> tuple[Fraction, Fraction]:
    """Numbers not above and not below ``exp(-exponent)``, no further apart than ``2**-bits`` by far.

    ``decimal`` rounds quotients as it is told, and gives of exp the nearest number with so many digits (the General
    Decimal Arithmetic Specification): so one further is beyond the true one.
    """
    if exponent > 2 * bits:  # numbers with so many zeros are long
        return Fraction(0), Fraction(1, 2 ** (2 * bits))
    digits = bits * 302 // 1000 + 20
    found = []
    for rounding in (ROUND_CEILING, ROUND_FLOOR):  # of y, so that exp(-y) comes out too small, and too large
        own = Context(prec=digits, rounding=rounding, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])
        quotient = own.divide(Decimal(exponent.numerator), Decimal(exponent.denominator))
        power = own.exp(quotient.copy_negate())  # a minus sign would round, to the digits of the caller's context
        found.append(own.next_minus(power) if rounding == ROUND_CEILING else own.next_plus(power))
    lower, upper = (Fraction(value) for value in found)
    return max(lower, Fraction(0)), upper


def leading_zeros(more: Iterator[int]) -> int:
    """How many tosses of a fair coin come before the first 1; the rest of the last word is dropped."""
    count = 0
    while not (word := next(more)):
        count += WORD
    return count + WORD - word.bit_length()
