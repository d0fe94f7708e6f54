"""Which units hold a parameter, and which parameters more than one region of a forward uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dpcompile.regions.skeleton import Piece, Skeleton
from dpcompile.regions.units import Unit

__all__ = ["Owners"]


class Owners:
    """The names under which a model holds its parameters.

    What is found here is known before the regions are compiled, so that they hand out what the norm over several
    regions needs. A use that is not found (a block that reads another's parameter) is seen when it runs.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        first = {id(p): name for name, p in module.named_parameters()}
        self._names = {n: first[id(p)] for n, p in module.named_parameters(remove_duplicate=False)}

    def inside(self, unit: Unit) -> Iterator[str]:
        """The parameters within a unit, by their first names in the model."""
        prefix = f"{unit.path}." if unit.path else ""
        return (name for own, name in self._names.items() if own.startswith(prefix))

    def with_two_names(self) -> set[str]:
        """Parameters that lie in two modules."""
        return {name for name, n in Counter(self._names.values()).items() if n > 1}

    def tied(self, root: Unit) -> set[str]:
        """Parameters that lie in two units."""
        units = sorted(_all(root), key=lambda u: -len(u.path))
        found: dict[str, set[str]] = {}
        for own, name in self._names.items():
            holder = next(u.path for u in units if not u.path or own.startswith(f"{u.path}."))
            found.setdefault(name, set()).add(holder)
        return {name for name, holders in found.items() if len(holders) > 1}

    def repeated(self, unit: Unit, skeleton: Skeleton, live: Sequence[Any], parameters: Mapping[int, str]) -> set[str]:
        """Parameters that a unit's graph uses in two pieces, in a piece and in a unit inside, or in two calls."""
        placeholders = skeleton.source.graph.find_nodes(op="placeholder")
        names = {n: parameters.get(id(x)) for n, x in zip(placeholders, live, strict=True) if isinstance(x, Tensor)}
        uses: Counter[str | None] = Counter()
        for step in skeleton.steps:
            if isinstance(step, Piece):
                uses.update({names.get(n) for n in step.inputs})
            else:
                called = next(c for c in unit.children if c.handle == step.args[0])
                uses.update(set(self.inside(called)))
                uses.update({names.get(n) for n in step.all_input_nodes})
        return {name for name, n in uses.items() if name is not None and n > 1}


def _all(unit: Unit) -> Iterator[Unit]:
    yield unit
    for child in unit.children:
        yield from _all(child)
