"""What a value between the model's outputs and the loss has to do with the examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dpcompile.graph.labels import Examples, Shared, Summed

__all__ = ["EVERY", "NOT_LINEAR", "Mixes", "Of", "OneExample", "Outer", "Unknown", "Value", "combined"]

EVERY = "every"
NOT_LINEAR = "it is no linear function of a sum over all examples"


@dataclass(frozen=True, slots=True)
class Of:
    """Slices along a dimension belong to single examples.

    Attributes:
        axis: how they lie; its sizes are numbers.
        picked: which examples; two values of other ones have slices of different examples side by side.
    """

    axis: Examples
    picked: object = EVERY

    @property
    def plain(self) -> bool:
        """Whether an example has one slice."""
        return self.axis.outer == 1 and self.axis.inner == 1


@dataclass(frozen=True, slots=True)
class OneExample:
    """All of it belongs to the example of this number."""

    index: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """Nothing is known, so nothing that is made of it is refused."""


Outer: TypeAlias = "Shared | Of | OneExample | Summed | Unknown"


@dataclass(frozen=True, slots=True)
class Value:
    """A label, and the shape of what it is of."""

    label: Outer
    shape: tuple[int, ...]


class Mixes(Exception):  # noqa: N818  (no error of the user's: what the walk found)
    """The operation at hand mixes examples: in which way, and what to do if more is known than helps in general."""

    def __init__(self, how: str, remedy: str | None = None) -> None:
        super().__init__(how)
        self.how, self.remedy = how, remedy


def combined(values: Sequence[Value], ndim: int, *, linear: bool) -> Outer:
    """The label of an elementwise operation's result of ``ndim`` dimensions; inputs broadcast from the right.

    Args:
        values: of its differentiable inputs.
        ndim: of the result.
        linear: whether it is linear in all inputs together.

    Raises:
        Mixes: an element of the result is no sum of terms that belong to single examples.
    """
    labels = [_moved(v.label, ndim - len(v.shape)) for v in values if not isinstance(v.label, Shared)]
    if not labels:
        return Shared()
    if any(isinstance(x, Unknown) for x in labels):
        return Unknown()
    first = labels[0]
    if all(x == first for x in labels) and (linear or not isinstance(first, Summed)):
        return first
    if linear:
        return Summed()
    if all(isinstance(x, Summed) for x in labels):
        raise Mixes(NOT_LINEAR)
    if any(isinstance(x, Summed) for x in labels):
        raise Mixes("it combines a sum over all examples with values of single examples")
    if any(isinstance(x, Of) and not x.plain for x in labels):
        return Unknown()
    raise Mixes("it combines values of different examples")


def _moved(label: Outer, by: int) -> Outer:
    return Of(label.axis.at(label.axis.dim + by), label.picked) if isinstance(label, Of) else label
