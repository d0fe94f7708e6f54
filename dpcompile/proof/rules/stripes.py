"""What the slices of a result are made of: the same question for operands, said beside each operation's rule.

Whether a shared value is the same for every example is asked of the operations that made it, one after the other
(:mod:`dpcompile.proof.rules.rows`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import fx

from dpcompile.graph.labels import Examples, reshape_axis
from dpcompile.graph.sizes import Size, is_one, product
from dpcompile.proof.rules.registry import Call

__all__ = ["Behind", "RowWise", "Stripes", "broadcast", "find_row_wise", "row_wise", "whole_dim"]


@dataclass(frozen=True, slots=True)
class Stripes:
    """The question whether a value is the same at all ``count`` places of ``axis``.

    With ``count == B`` the places are the examples; with a dimension's whole size they are its positions.
    """

    axis: Examples
    count: Size

    @property
    def dim(self) -> int:
        """The dimension."""
        return self.axis.dim

    @property
    def period(self) -> Size:
        """How many positions hold each of the places once."""
        return product([self.count, self.axis.inner])

    def at(self, dim: int) -> Stripes:
        """The same along another dimension."""
        return replace(self, axis=self.axis.at(dim))

    def reshaped(self, old: tuple[Size, ...], new: tuple[Size, ...]) -> Stripes | None:
        """The same before or after a reshape; None if the places are spread over several dimensions."""
        moved = reshape_axis(self.axis, old, new, self.count)
        return None if moved is None else replace(self, axis=moved)


# What must be the same as well; None if the operation makes the places differ.
Behind: TypeAlias = "list[tuple[fx.Node, Stripes]] | None"
RowWise: TypeAlias = "Callable[[Call, Stripes, int], Behind]"
_ROW_WISE: dict[object, RowWise] = {}


def row_wise(*rules_or_names: object) -> Callable[[RowWise], RowWise]:
    """Register what the places of a result are made of, for operations by name or all those of an axis rule."""

    def register(behind: RowWise) -> RowWise:
        for key in rules_or_names:
            assert key not in _ROW_WISE, key
            _ROW_WISE[key] = behind
        return behind

    return register


def find_row_wise(rule_or_name: object) -> RowWise | None:
    """What is registered of an operation by name, or of all those of an axis rule."""
    return _ROW_WISE.get(rule_or_name)


def broadcast(call: Call, operands: list[fx.Node], stripes: Stripes, ndim: int | None = None) -> list:
    """The same question for operands that are broadcast together to ``ndim`` dimensions."""
    ndim = len(call.out_shape) if ndim is None else ndim
    found = []
    for operand in operands:
        shape = call.shape(operand)
        dim = stripes.dim - ndim + len(shape)
        if dim >= 0 and not is_one(shape[dim]):
            found.append((operand, stripes.at(dim)))
    return found


def whole_dim(call: Call, source: fx.Node, dim: int) -> Stripes:
    """The stronger question, whether all positions along a dimension are the same."""
    return Stripes(Examples(dim), call.shape(source)[dim])
