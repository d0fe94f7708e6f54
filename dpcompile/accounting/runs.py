"""Runs of equal steps, and other releases: counted together, and rounded where there are too many kinds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from dpcompile.accounting.truncation import Rate

if TYPE_CHECKING:  # it takes as long to import as the rest of the package
    from dp_accounting import DpEvent

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
    """At most so many kinds of steps for each sample rate, none with more noise than it had.

    A schedule gives every step a sigma of its own, and every sigma takes a privacy loss distribution. Within a group
    sigma is the smallest one of the group; groups are equally wide by ratio.
    """
    if len(history) <= most:
        return history
    found: list[tuple[float, Rate, int]] = []
    for rate in dict.fromkeys(q for _, q, _ in history):
        runs = sorted((sigma, n) for sigma, q, n in history if q == rate)
        width = math.log(runs[-1][0] / runs[0][0]) / most or 1.0
        groups: dict[int, tuple[float, int]] = {}
        for sigma, n in runs:  # ascending: the first of a group is its smallest
            place = min(int(math.log(sigma / runs[0][0]) / width), most - 1)
            least, count = groups.get(place, (sigma, 0))
            groups[place] = least, count + n
        found += [(least, rate, count) for least, count in groups.values()]
    return found
