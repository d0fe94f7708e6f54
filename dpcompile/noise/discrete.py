"""Discrete Gaussian noise: integers x with probabilities proportional to ``exp(-x**2 / (2 s**2))``, without error.

Source: Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy" (NeurIPS), for the distribution
and for coins of probability ``exp(-y)`` that no float decides; the proposal here is a histogram in place of a discrete
Laplace distribution, so that 83 to 91 of a hundred are taken.

**Why the law is exact.** Let t be a power of two and ``x = U + t V``, U uniform on 0, ..., t - 1, V = v with
probability ``w[v] / 2**13``, and a sign. The w are integers, but for those from a last one on, which are 1/2, 1/4, ...;
if they add up to less than ``2**13``, nothing is proposed with the probability that is left.
A proposal is taken with probability ``exp(-x**2 / (2 s**2)) / (m w[v])``, which the choice of w makes 1 at most, for a
number m. So x is proposed and taken with probability ``exp(-x**2 / (2 s**2)) / (2**14 t m)``, a constant times the
law; 0 would come twice, and its negative is not taken. Whether it is taken is told by a uniform number of 53 bits and a
float64 with an interval around it that holds the true value; where that is not enough, and in the last cell, exact
arithmetic and further bits tell (`decide`). So w, m and floats decide how often, and never what.

An element's numbers come from ChaCha20 under counters of its own: attempt k of element e is a fourth of the block
``(k, e // 4)`` of ``Stream.DISCRETE``, further bits are blocks ``(e, k, n)`` of ``Stream.DECISIONS``. Decisions are
those of real numbers, so all devices draw the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from dpcompile.errors import PrivacyError
from dpcompile.noise import chacha
from dpcompile.noise.counter import MASK, STEPS, Span, Stream, check_range, check_seed, counter_tag
from dpcompile.noise.decide import is_below, leading_zeros
from dpcompile.noise.normal import batches_of

__all__ = ["LARGEST", "discrete_gaussian", "discrete_pieces"]

LARGEST = 2.0**51  # s: uniform numbers within a cell have 50 bits
_CODES = 2**13  # of cells
_SLACK = 2.0**-39  # relative: float64 and its exp are off by 2**-45 here, or less
_SCRATCH = 2**17  # elements at a time
_LANES = 4  # attempts of neighbours in a block
_ATTEMPTS, _BLOCKS = 2**8, 2**5  # of an element; of more bits for one of them. Beyond both is probability 0 (10**-190)
_ELEMENTS = 2**50


@dataclass(frozen=True, slots=True)
class _Proposal:
    """The histogram.

    Attributes:
        s: of the law.
        width: t, of a cell, a power of two.
        height: m, exact.
        weights: of the cells but the last, which has no end.
    """

    s: float
    width: int
    height: float
    weights: tuple[int, ...]

    def scale(self, cell: int) -> Fraction:
        """What the uniform number is multiplied by before it is compared with ``exp(-y)``."""
        last = len(self.weights)
        if cell < last:
            return Fraction(self.height) * self.weights[cell]
        return Fraction(self.height) / 2 ** (cell - last + 1)

    def exponent(self, magnitude: int) -> Fraction:
        """Of the law at x or -x: y, of which ``exp(-y)`` is taken."""
        return Fraction(magnitude) ** 2 / (2 * Fraction(self.s) ** 2)


@functools.lru_cache(maxsize=8)
def _proposal(s: float) -> _Proposal:
    """Cells of s / 4 to s / 2 (of 1, if s is below 4), and as few codes left over as can be."""
    width = 2 ** max(0, math.frexp(s)[1] - 2)
    ratio = width / s
    above = 1 + 2.0**-20  # of the true height, whatever the machine's exp does
    heights = [above * math.exp(-((v * ratio) ** 2) / 2) for v in range(64)]
    height = sum(heights) / _CODES
    while True:
        height = math.ldexp(math.ceil(math.ldexp(height, 32)), -32)  # few bits: the same on all machines
        last = 1  # where each cell is half as high as the one before, or less
        while heights[last] > height / 2 or ratio**2 * (2 * last + 1) / 2 < 0.6932:
            last += 1
        weights = tuple(math.ceil(h / height) for h in heights[:last])
        if sum(weights) < _CODES:
            return _Proposal(s, width, height, weights)
        height *= 1 + 2.0**-10


def discrete_gaussian(
    seed: int, *, step: int, spans: Sequence[Span], s: float, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Integers of the law above, int64, a tensor ``[numel]`` for each span.

    Args:
        seed: in [0, 2**256).
        step: logical step, in [0, 2**32).
        spans: of which elements.
        s: above 0, at most :data:`LARGEST`.
        device: where.

    Raises:
        PrivacyError: an argument out of range.

    **Guarantee.** Values are independent and of the law, as far as ChaCha20's bits are independent and fair. A value
    is a function of seed, step, parameter, element and s: elements drawn separately equal the same elements drawn
    together, on any device. No call shares a counter block with noise or draws of another kind.

    =============================================  ==================================================
    edge case                                      outcome
    =============================================  ==================================================
    s far below 1                                  0, but for the probability that the law gives to 1
    values far out                                 no largest one: the last cell has no end
    more bits than float64 has                     drawn, and decided in decimals and fractions
    an element beyond 2**50                        refused: its counter would be another one's
    =============================================  ==================================================
    """
    outs = [torch.empty(span.numel, dtype=torch.int64, device=device) for span in spans]
    for i, offset, values in discrete_pieces(seed, step=step, spans=spans, s=s, device=torch.device(device)):
        outs[i][offset : offset + values.numel()].copy_(values)
    return outs


def discrete_pieces(
    seed: int, *, step: int, spans: Sequence[Span], s: float, device: torch.device
) -> Iterator[tuple[int, int, Tensor]]:
    """The same by and by: ``(index of the span, offset in it, values)``."""
    check_seed(seed, secure=True)
    check_range("logical step", step, STEPS)
    for span in spans:
        check_range("start + numel", span.start + span.numel, _ELEMENTS)
    if not 0 < s <= LARGEST:
        raise PrivacyError(
            f"discrete noise of standard deviation {s!r}", remedy=f"take one above 0, {LARGEST:g} at most"
        )
    proposal, key = _proposal(float(s)), chacha.derive_key(seed)
    work = torch.device("cpu") if device.type == "mps" else device  # no float64 there
    for batch in batches_of(spans, _SCRATCH):
        whose = [(spans[i].parameter, first, last) for i, first, last in batch]
        values, at = _drawn(whose, proposal, step, key, work).to(device), 0
        for i, first, last in batch:
            yield i, first - spans[i].start, values[at : at + last - first]
            at += last - first


def _drawn(
    whose: Sequence[tuple[int, int, int]], proposal: _Proposal, step: int, key: Sequence[int], device: torch.device
) -> Tensor:
    """The values of elements ``[first, last)`` of parameters, one after the other."""
    elements = torch.cat([torch.arange(first, last, device=device) for _, first, last in whose])
    parameters = torch.cat([torch.full((last - first,), p, device=device) for p, first, last in whose])
    values = torch.empty_like(elements)
    pending = torch.arange(elements.numel(), device=device)
    words = _first_words(whose, step, key, device)
    for attempt in range(_ATTEMPTS):
        own, owners = elements[pending], parameters[pending]
        if attempt:
            words = _words(own, owners, attempt, step, key)
        found, taken, open_ = _judged(words, proposal)
        values[pending] = found
        unsure = open_.nonzero().view(-1)
        if unsure.numel():
            late = _decided(words[:, unsure], own[unsure], owners[unsure], attempt, proposal, step, key)
            where = [i for i, value in enumerate(late) if value is not None]
            values[pending[unsure[where]]] = torch.tensor([late[i] for i in where], dtype=torch.int64, device=device)
            taken[unsure[where]] = True
        pending = pending[~taken]
        if not pending.numel():
            return values
    raise AssertionError("256 attempts were refused: the generator does not give fair bits")


def _first_words(whose: Sequence[tuple[int, int, int]], step: int, key: Sequence[int], device: torch.device) -> Tensor:
    """Of attempt 0, ``[4, n]``: neighbours share blocks, which are made once."""
    spans = [(first // _LANES, -(-last // _LANES)) for _, first, last in whose]
    blocks = torch.cat([torch.arange(low, high, device=device) for low, high in spans])
    owners = torch.cat(
        [torch.full((high - low,), p, device=device) for (p, _, _), (low, high) in zip(whose, spans, strict=True)]
    )
    made = _blocks(blocks, owners, Stream.DISCRETE, step, key).view(_LANES, 4, -1).permute(1, 2, 0).reshape(4, -1)
    parts, at = [], 0
    for (_, first, last), (low, high) in zip(whose, spans, strict=True):
        begin = at + first % _LANES
        parts.append(made[:, begin : begin + last - first])
        at += (high - low) * _LANES
    return torch.cat(parts, 1)


def _words(elements: Tensor, owners: Tensor, attempt: int, step: int, key: Sequence[int]) -> Tensor:
    """Of a later attempt, ``[4, n]``."""
    made = _blocks(attempt << 48 | elements // _LANES, owners, Stream.DISCRETE, step, key)
    rows = 4 * (elements % _LANES) + torch.arange(4, device=elements.device)[:, None]
    return made.gather(0, rows)


def _blocks(blocks: Tensor, owners: Tensor, stream: Stream, step: int, key: Sequence[int]) -> Tensor:
    """``[16, n]`` words of 32 bits, by number of the block and parameter."""
    steps = torch.full((1,), step, dtype=torch.int64, device=blocks.device)
    return torch.stack(chacha.chacha20([blocks & MASK, blocks >> 32, steps, owners | counter_tag(stream, 0)], key))


def _split(words: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of ``[4, n]`` words: the sign, 13 bits for the cell, 50 for the place in it, 53 of the uniform number."""
    high, low, first, second = words
    return high >> 31, high >> 18 & (_CODES - 1), (high & 0x3FFFF) << 32 | low, first << 21 | second >> 11


def _judged(words: Tensor, proposal: _Proposal) -> tuple[Tensor, Tensor, Tensor]:
    """Proposed integers; whether each is taken for certain; and whether that is open."""
    sign, code, place, uniform = _split(words)
    last, device = len(proposal.weights), words.device
    counts = torch.tensor([*proposal.weights, 1, _CODES - 1 - sum(proposal.weights)], device=device)
    cell = torch.arange(last + 2, device=device).repeat_interleave(counts)[code]
    scale = torch.tensor(
        [*(proposal.height * w for w in proposal.weights), 1.0, 1.0], device=device, dtype=torch.double
    )
    magnitude = (place & (proposal.width - 1)) + cell * proposal.width
    height = torch.exp((magnitude.double() / proposal.s).square_().mul_(-0.5))
    scale = scale[cell]
    surely = (uniform + 1).double() * (2.0**-53 * scale) <= height * (1 - _SLACK)
    not_surely = uniform.double() * (2.0**-53 * scale) >= height * (1 + _SLACK)
    inside = (cell < last) & ~((magnitude == 0) & (sign == 1))
    open_ = (inside & ~surely & ~not_surely) | (cell == last)
    return torch.where(sign == 1, -magnitude, magnitude), surely & inside, open_


def _decided(
    words: Tensor, elements: Tensor, owners: Tensor, attempt: int, proposal: _Proposal, step: int, key: Sequence[int]
) -> list[int | None]:
    """Of a few attempts the integers, None where one is not taken; by exact arithmetic."""
    last, ends = len(proposal.weights), [0]
    for w in proposal.weights:
        ends.append(ends[-1] + w)
    first = _further(elements, owners, attempt, 0, step, key)
    found: list[int | None] = []
    lanes = zip(*(part.tolist() for part in (*_split(words), elements, owners)), strict=True)
    for (sign, code, place, known, element, owner), begin in zip(lanes, first, strict=True):
        more = _bits(begin, element, owner, attempt, step, key)
        cell = next((v for v in range(last) if ends[v] <= code < ends[v + 1]), None)
        if cell is None:
            cell = last + leading_zeros(more)
        magnitude = place % proposal.width + cell * proposal.width
        taken = is_below(known, more, proposal.exponent(magnitude), proposal.scale(cell))
        found.append((-magnitude if sign else magnitude) if taken and not (sign and magnitude == 0) else None)
    return found


def _bits(begin: Sequence[int], element: int, owner: int, attempt: int, step: int, key: Sequence[int]) -> Iterator[int]:
    """Further bits of an attempt, 64 at a time, of which the first are there already."""
    yield from begin
    for block in range(1, _BLOCKS):
        yield from _further(torch.tensor([element]), torch.tensor([owner]), attempt, block, step, key)[0]
    raise AssertionError("16384 bits left a decision open: the generator does not give fair bits")


def _further(
    elements: Tensor, owners: Tensor, attempt: int, block: int, step: int, key: Sequence[int]
) -> list[list[int]]:
    """Eight integers of 64 bits for each element."""
    numbers = (elements * _ATTEMPTS + attempt) * _BLOCKS + block
    made = _blocks(numbers, owners, Stream.DECISIONS, step, key).T.tolist()
    return [[high << 32 | low for high, low in zip(row[::2], row[1::2], strict=True)] for row in made]
