"""Which lowering a region gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dpcompile.clipping.groups import Clipping, group_of
from dpcompile.options import AT_ONCE, DEFERRED, TWO_PASS, Lowering

__all__ = ["lowering_of"]


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
