"""In how many parts a batch may run, where a memory budget asks for it; :mod:`dpcompile.runtime.parts` runs them."""

from __future__ import annotations

from typing import TypeVar

from torch import fx

from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Examples
from dpcompile.graph.sizes import is_one
from dpcompile.proof.prove import Proof

__all__ = ["InParts", "allowed_parts", "asked_parts", "behind"]

E = TypeVar("E", bound=BaseException)


class InParts(Exception):
    """Stops a compilation: the plan wants the batch in ``parts`` parts."""

    def __init__(self, parts: int) -> None:
        super().__init__(f"the plan wants the batch in {parts} parts")
        self.parts = parts


def asked_parts(error: BaseException | None) -> int | None:
    """What an :class:`InParts` behind this error asked for, or None."""
    found = behind(error, InParts)
    return None if found is None else found.parts


def behind(error: BaseException | None, kind: type[E]) -> E | None:
    """The error of this kind that this one came of, or None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, kind):
            return error
        seen.add(id(error))
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return None


def allowed_parts(joint: JointGraph, proof: Proof) -> list[int]:
    """In how many parts the batch may run: the divisors of B that leave two examples or more to a part.

    Only 1 where parts could be told from the whole: where the size of the batch is a symbol, where the graph writes to
    something, and where an output is not a concatenation over the examples.
    """
    if not isinstance(joint.batch, int) or any(True for _ in joint.mutations()):
        return [1]
    if not all(axis.outer == 1 for axis in joint.example_axes.values()):
        return [1]
    for node in joint.outputs:
        label = proof.of(node) if isinstance(node, fx.Node) else None
        if not (isinstance(label, Examples) and is_one(label.outer)):
            return [1]
    return [1, *(n for n in range(2, joint.batch // 2 + 1) if joint.batch % n == 0)]
