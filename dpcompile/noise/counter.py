"""Random numbers as a function of where they are used: no generator, no state, no order of drawing.

A value depends on (seed, stream, logical step, parameter, index of the element) alone. So a shard draws its own
elements, every world size and every resumed run draws the same noise, and no state is saved. Sources: Salmon et al.
2011 (Philox, counter-based generators), RFC 8439 (ChaCha20), Box and Muller 1958.

The counter of a block, four 32-bit words, low word first::

    word 0, 1   index of the block: 64 bits
    word 2      logical step
    word 3      parameter (24 bits), stream (8 bits, on top)

A Philox block of 128 bits gives 2 values, a ChaCha20 block of 512 bits gives 8.

The seed is a secret: whoever has it can subtract the noise. So is everything that holds it (optimizer checkpoints).
"""

from __future__ import annotations

import enum
import itertools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from dpcompile.errors import PrivacyError

__all__ = ["MASK", "STEPS", "Span", "Stream", "check_range", "check_seed", "counter_tag", "fresh_seed", "refuse_twice"]
MASK = 0xFFFFFFFF
_PARAMETER_BITS = 24
STEPS, _PARAMETERS, _ELEMENTS = 2**32, 2**_PARAMETER_BITS, 2**63


class Stream(enum.Enum):
    """What the numbers are for. Each purpose has counters of its own; the values are part of the noise's definition."""

    GRADIENT = 0
    SAMPLING = 1
    WORKERS = 2
    VOTES = 3
    PARTS = 4
    TRUNCATION = 5
    USERS = 6
    DISCRETE = 7
    DECISIONS = 8
    TREE = 9
    BUFFERED = 10


@dataclass(frozen=True, slots=True)
class Span:
    """Elements ``[start, start + numel)`` of one parameter, flattened in row-major order.

    Raises:
        PrivacyError: a negative number, or one too large for the counter.
    """

    parameter: int
    numel: int
    start: int = 0

    def __post_init__(self) -> None:
        check_range("parameter index", self.parameter, _PARAMETERS)
        check_range("number of elements", self.numel, _ELEMENTS)
        check_range("start", self.start, _ELEMENTS)
        check_range("start + numel", self.start + self.numel, _ELEMENTS)


def counter_tag(stream: Stream, parameter: int) -> int:
    """The last word of the counter."""
    check_range("parameter index", parameter, _PARAMETERS)
    return stream.value << _PARAMETER_BITS | parameter


def fresh_seed(*, secure: bool = False) -> int:
    """A seed from the operating system's entropy (``secrets``): 64 bits, or 256 for ``secure``."""
    return secrets.randbits(256 if secure else 64)


def check_seed(seed: int, *, secure: bool = False) -> None:
    """Raise PrivacyError unless ``seed`` is an integer that is used whole, without truncation."""
    check_range("seed", seed, 2 ** (256 if secure else 64))


def check_range(what: str, value: int, limit: int) -> None:
    """Raise PrivacyError unless ``value`` is an integer in ``[0, limit)``; a seed is not shown."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        given = "the seed (not shown)" if what == "seed" else f"{what} {value!r}"  # a seed is a secret, also in a log
        raise PrivacyError(
            f"{given} is not an integer in [0, 2**{limit.bit_length() - 1}): it would meet numbers already in use",
            remedy="give an integer in that range"
            + (", such as dpcompile.noise.fresh_seed() returns" if what == "seed" else ""),
        )


def refuse_twice(spans: Sequence[Span]) -> None:
    """Raise PrivacyError if an element is in two spans."""
    ordered = sorted((s.parameter, s.start, s.numel) for s in spans)
    if any(p == other and first + n > after for (p, first, n), (other, after, _) in itertools.pairwise(ordered)):
        indices = [s.parameter for s in spans]
        raise PrivacyError(
            f"a parameter index occurs twice among {indices}: two tensors would get the same noise",
            remedy="give every tensor an index of its own, or elements of its own",
        )
