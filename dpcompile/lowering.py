"""How a region's backward comes to clipped sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dpcompile.clipping import Clipping, group_of

__all__ = ["AT_ONCE", "DEFERRED", "TWO_PASS", "Lowering", "clip_groups", "lowering_of"]

DEFERRED, AT_ONCE, TWO_PASS = "deferred", "at once", "two passes"


@dataclass(frozen=True, slots=True)
class Lowering:
    """What becomes of the backward of one region.

    Attributes:
        kind: "deferred": norms first, then, once the whole backward is over, clipped sums from what was kept. "at
            once": every clip group of the region lies within it, so that weights and sums are computed right there.
            "two passes": norms first, nothing is kept, and a second backward has the clipped sums.
        groups: at once: for every parameter, in order, the number of its clip group.
    """

    kind: str = DEFERRED
    groups: tuple[int, ...] = ()


def clip_groups(names: Iterable[str], clipping: Clipping) -> dict[str, frozenset[str]]:
    """Clip group -> the parameters in it."""
    found: dict[str, set[str]] = {}
    for name in names:
        found.setdefault(group_of(clipping, name), set()).add(name)
    return {group: frozenset(members) for group, members in found.items()}


def lowering_of(
    names: Sequence[str], clipping: Clipping, members: Mapping[str, frozenset[str]], kind: str = DEFERRED
) -> Lowering:
    """The lowering of a region with these parameters.

    **Guarantee.** A region is clipped at once only if no parameter outside it is in a clip group of its own.

    Args:
        names: of the region's trainable parameters.
        clipping: of the model.
        members: clip group -> all trainable parameters of the model in it.
        kind: what was chosen for the model; "two passes" holds for all regions.
    """
    found: dict[str, int] = {}
    numbers = tuple(found.setdefault(group_of(clipping, n), len(found)) for n in names)
    own = frozenset(names)
    if kind == TWO_PASS or callable(clipping) or not all(members[g] <= own for g in found):
        return Lowering(kind if kind == TWO_PASS else DEFERRED)
    return Lowering(AT_ONCE, numbers)
