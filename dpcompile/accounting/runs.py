"""Runs of equal steps, and other releases: counted together, and rounded where there are too many kinds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from dpcompile.accounting.truncation import Rate, TruncatedRate

if TYPE_CHECKING:  # it takes as long to import as the rest of the package
    from dp_accounting import DpEvent

_RATES = 8  # so many sample rates are kept apart

__all__ = ["History", "Releases", "merged", "rounded_down"]

History: TypeAlias = "Sequence[tuple[float, Rate, int]]"  # runs of equal steps: sigma, q, how many
Releases: TypeAlias = "Sequence[tuple[DpEvent, int]]"  # what is no such step, and how often


def merged(history: Iterable[tuple[float, Rate, int]]) -> History:
    """Equal steps counted together: their order does not matter to what they cost."""
    counts: dict[tuple[float, Rate], int] = {}
    for sigma, q, n in history:
        counts[sigma, q] = counts.get((sigma, q), 0) + n
    return [(sigma, q, n) for (sigma, q), n in counts.items()]


def rounded_down(history: History, most: int) -> History:
    """At most so many kinds of steps for each sample rate, none with more noise or a smaller rate than it had.

    A schedule gives every step a sigma or a rate of its own, and each takes a privacy loss distribution. Within a group
    sigma is the smallest one of the group; groups are equally wide by ratio. Of more than eight rates there are so many
    kinds in all, and within a group the rate is the largest.

    **Guarantee.** What is returned costs at least what ``history`` does. Gaussian noise of a larger sigma is noise of
    the smaller one, and more. A Poisson sample of rate p < q is, with probability p / q, that of rate q, and else one
    without the example: its outputs with and without the example are mixtures, of the same weights, of those of rate q
    and of two equal ones, and such a mixture is no easier to tell apart (joint convexity of the divergences).

    ======================================  ============================================================
    edge case                               outcome
    ======================================  ============================================================
    rates with a cap                        each is kept apart: no order of them is known
    no more kinds than asked for            unchanged
    ======================================  ============================================================
    """
    if len(history) <= most:
        return history
    plain = [(sigma, q, n) for sigma, q, n in history if not isinstance(q, TruncatedRate)]
    rates = dict.fromkeys(q for _, q, _ in history)
    found: list[tuple[float, Rate, int]] = []
    if len({q for _, q, _ in plain}) > _RATES:
        found = [*_boxes(plain, most)]
        rates = dict.fromkeys(q for q in rates if isinstance(q, TruncatedRate))
    for rate in rates:
        runs = sorted((sigma, n) for sigma, q, n in history if q == rate)
        width = math.log(runs[-1][0] / runs[0][0]) / most or 1.0
        groups: dict[int, tuple[float, int]] = {}
        for sigma, n in runs:  # ascending: the first of a group is its smallest
            place = min(int(math.log(sigma / runs[0][0]) / width), most - 1)
            least, count = groups.get(place, (sigma, 0))
            groups[place] = least, count + n
        found += [(least, rate, count) for least, count in groups.values()]
    return found


def _boxes(runs: Sequence[tuple[float, float, int]], most: int) -> Iterable[tuple[float, float, int]]:
    """So many groups at most, of sigma and rate both: the one that is widest by ratio is halved, over and over."""
    boxes = [list(runs)]
    while len(boxes) < most:
        (wide, axis), i = max((_widest(box), i) for i, box in enumerate(boxes))
        if wide == 0:
            break
        box = boxes.pop(i)
        values = [run[axis] for run in box]
        middle = math.sqrt(min(values)) * math.sqrt(max(values))  # no product, which could overflow
        halves = [run for run in box if run[axis] <= middle], [run for run in box if run[axis] > middle]
        if not all(halves):  # neighbouring numbers of floating point
            least = min(values)
            halves = [run for run in box if run[axis] == least], [run for run in box if run[axis] > least]
        boxes += halves
    return [(min(s for s, _, _ in box), max(q for _, q, _ in box), sum(n for _, _, n in box)) for box in boxes]


def _widest(box: Sequence[tuple[float, float, int]]) -> tuple[float, int]:
    """By the logarithm of which ratio, and whether of sigma (0) or of the rate (1)."""
    ranges = [[run[axis] for run in box] for axis in (0, 1)]
    return max((math.log(max(values)) - math.log(min(values)), axis) for axis, values in enumerate(ranges))
