"""Tails that work row by row: what they make of a site's value ``G [P, D]``, and its norm without making it.

A weight may be a function of parameters alone: standardised (Qiao et al. 2019, arXiv:1903.10520), of unit length times
a trained one (Salimans and Kingma 2016, arXiv:1602.07868), scaled, shifted. The gradient behind it is linear in the
site's, and for such functions it is, in every row,

    ``H = s G + sum over j, k of W_j C_jk <W_k, G>``

with numbers ``s`` and ``C_jk`` for each row, where the ``W`` are a row of ones and values of parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from dpcompile.graph.operations import COPIES, RESHAPES, operation_name
from dpcompile.graph.sizes import shape_of
from dpcompile.norms.tables import is_zero
from dpcompile.proof.sites import ParameterGradient

__all__ = ["RowMap", "row_map"]

_MOVES = COPIES | RESHAPES | {"squeeze", "unsqueeze", "expand"}
_Key: TypeAlias = "fx.Node | None"  # of a W; None: the row of ones
_Rows: TypeAlias = dict[_Key, Tensor]  # numbers for each row, float64


class _Unknown(Exception):
    """The tail is of another kind."""


@dataclass(frozen=True, slots=True)
class RowMap:
    """A tail that works row by row.

    Attributes:
        flipped: rows of the parameter are columns of the site.
        scale: ``s [P]``, float64.
        bases: the values of parameters among the ``W``, after the row of ones; each has ``P D`` elements.
        mixed: ``C [1 + bases, 1 + bases, P]``, float64.
    """

    flipped: bool
    scale: Tensor
    bases: tuple[fx.Node, ...]
    mixed: Tensor


@dataclass(frozen=True, slots=True)
class _Sites:
    """The sum of some sites' values, or its transpose."""

    of: frozenset[fx.Node]
    flipped: bool = False


@dataclass(frozen=True, slots=True)
class _Full:
    """``scale G + sum over j, k of W_j C_jk <W_k, G>``, perhaps times a value of parameters."""

    scale: Tensor | None  # None: 0
    mixed: dict[_Key, _Rows] = field(default_factory=dict)
    factor: _Rows | None = None


@dataclass(frozen=True, slots=True)
class _Sums:
    """``sum over k of C_k <W_k, G>``, a number for each row."""

    of: _Rows


def row_map(gradient: ParameterGradient, value_of: Callable[[fx.Node], Tensor], like: Tensor) -> RowMap | None:
    """The tail as numbers and values of parameters, or None where it is of another kind.

    What is found depends on the graph alone, not on values.

    Args:
        gradient: of the parameter.
        value_of: gives the value of a node that depends on parameters alone; which are asked for goes by the graph.
        like: numbers are made on its device.
    """
    values = [gradient.gradient, *(s.value for s in gradient.sites)]
    whole = all(isinstance(n, int) for v in values for n in shape_of(v.meta["val"]))
    if not gradient.tail or not whole or not all(v.meta["val"].is_floating_point() for v in values):
        return None
    try:
        return _Reader(gradient, value_of, like).read()
    except _Unknown:
        return None


class _Reader:
    """Goes through the tail with one of the values above for each node."""

    def __init__(self, gradient: ParameterGradient, value_of: Callable[[fx.Node], Tensor], like: Tensor) -> None:
        self._gradient, self._value_of, self._like = gradient, value_of, like
        shape = shape_of(gradient.gradient.meta["val"])
        self._rows = int(shape[0]) if shape else 0
        elements = prod(int(n) for n in shape_of(gradient.sites[0].value.meta["val"]))
        self._width = elements // self._rows if self._rows else 0
        self._sites = frozenset(s.value for s in gradient.sites)
        self._known: dict[fx.Node, _Sites | _Full | _Sums] = {n: _Sites(frozenset([n])) for n in self._sites}
        self._flipped: bool | None = None

    def read(self) -> RowMap:
        if self._rows * self._width == 0 or self._width == 1:
            raise _Unknown
        for node in self._gradient.tail:
            self._known[node] = self._result(node)
        value = self._known[self._gradient.gradient]
        elements = prod(int(n) for n in shape_of(self._gradient.gradient.meta["val"]))
        if isinstance(value, _Sums) and elements == self._rows:  # a number for each row, as a row of that norm
            value = _Sums(_times(value.of, self._ones() * self._width**-0.5))
        elif elements != self._rows * self._width:
            raise _Unknown
        found = self._full(value)
        if found.factor is not None:
            raise _Unknown
        scale = self._ones() * 0 if found.scale is None else found.scale
        keys = dict.fromkeys(k for j, sums in found.mixed.items() for k in (j, *sums))
        bases = tuple(k for k in keys if k is not None)
        order: list[_Key] = [None, *bases]
        zero = torch.zeros_like(scale)
        mixed = torch.stack([torch.stack([found.mixed.get(j, {}).get(k, zero) for k in order]) for j in order])
        return RowMap(bool(self._flipped), scale, bases, mixed)

    def _result(self, node: fx.Node) -> _Sites | _Full | _Sums:
        name, shape = operation_name(node.target), shape_of(node.meta["val"])
        operands = [n for n in node.all_input_nodes if n in self._known]
        own = [self._known[n] for n in operands]
        shapes = [shape_of(n.meta["val"]) for n in operands]
        spread = any(len(s) != len(shape) or (s != shape and prod(s) != self._rows) for s in shapes)  # type: ignore[arg-type]
        if name in ("add", "sub", "mul", "div") and spread:  # along rows, or more than a number for each row
            raise _Unknown
        if len(own) == 1 and isinstance(own[0], _Sites) and name in ("permute", "transpose", "t") and len(shape) == 2:
            if name == "permute" and [d % 2 for d in node.args[1]] == [0, 1]:  # type: ignore[union-attr]
                return own[0]
            return _Sites(own[0].of, not own[0].flipped)
        if name in ("add", "sub"):
            return self._sum(node, -1.0 if name == "sub" else 1.0)
        value = own[0] if len(own) == 1 else None
        if value is None:
            raise _Unknown
        if name in _MOVES:
            return self._moved(value, node, shape)
        if name == "neg":
            return _scaled(self._linear(value), -self._ones())
        if name in ("sum", "mean"):
            return self._summed(self._full(value), node, name == "mean")
        if name == "where":
            return self._chosen(self._linear(value), node)
        if name in ("mul", "div"):
            return self._product(self._linear(value), node, divides=name == "div")
        raise _Unknown

    def _linear(self, value: _Sites | _Full | _Sums) -> _Full | _Sums:
        return value if isinstance(value, _Sums) else self._full(value)

    def _full(self, value: _Sites | _Full | _Sums) -> _Full:
        if isinstance(value, _Sites):
            if value.of != self._sites or self._flipped not in (None, value.flipped):
                raise _Unknown
            self._flipped = value.flipped
            shapes = {shape_of(n.meta["val"])[:: -1 if value.flipped else 1] for n in value.of}
            if any(s[0] != self._rows or prod(int(n) for n in s) != self._rows * self._width for s in shapes):
                raise _Unknown
            return _Full(self._ones())
        return _Full(None, {None: value.of}) if isinstance(value, _Sums) else value

    def _ones(self) -> Tensor:
        return self._like.new_ones(self._rows, dtype=torch.float64)

    def _moved(self, value: _Sites | _Full | _Sums, node: fx.Node, shape: Any) -> _Sites | _Full | _Sums:
        """The same elements in the same order, with the rows in front; sums may be spread over columns."""
        source, dtype = node.all_input_nodes[0].meta["val"], node.meta["val"].dtype
        before, elements = shape_of(source), prod(int(n) for n in shape)
        reinterpreted = operation_name(node.target) in RESHAPES and source.dtype != dtype
        if not shape or shape[0] != self._rows or not dtype.is_floating_point or reinterpreted:
            raise _Unknown
        if isinstance(value, _Sums):
            if elements == self._rows:
                return value
            if len(before) != len(shape) or elements != self._rows * self._width:
                raise _Unknown
            return self._full(value)
        if elements != self._rows * self._width:
            raise _Unknown
        return value if isinstance(value, _Sites) and before == shape else self._full(value)

    def _sum(self, node: fx.Node, sign: float) -> _Sites | _Full | _Sums:
        alpha, (left, right) = node.kwargs.get("alpha", 1), node.args[:2]
        if left not in self._known or right not in self._known or left is right:
            raise _Unknown
        a, b = self._known[left], self._known[right]  # type: ignore[index]
        if isinstance(a, _Sites) and isinstance(b, _Sites):
            if sign != 1 or alpha != 1 or a.flipped != b.flipped or a.of & b.of:
                raise _Unknown
            return _Sites(a.of | b.of, a.flipped)
        factor = self._ones() * (sign * float(alpha))  # type: ignore[arg-type]
        a, b = self._linear(a), self._linear(b)
        if isinstance(a, _Sums) and isinstance(b, _Sums):
            return _Sums(_added(a.of, _times(b.of, factor)))
        first, second = self._full(a), _scaled(self._full(b), factor)
        if first.factor is not None or second.factor is not None:
            raise _Unknown
        mixed = dict(first.mixed)
        for key, sums in second.mixed.items():
            mixed[key] = _added(mixed.get(key, {}), sums)
        scales = [x.scale for x in (first, second) if x.scale is not None]
        return _Full(sum(scales[1:], start=scales[0]) if scales else None, mixed)

    def _summed(self, value: _Full, node: fx.Node, mean: bool) -> _Sums:
        """Over all but the rows."""
        shape = shape_of(node.all_input_nodes[0].meta["val"])
        dims = node.args[1] if len(node.args) > 1 else None
        if not isinstance(dims, (list, tuple)) or "dtype" in node.kwargs or shape[0] != self._rows:
            raise _Unknown
        rest = {d for d, n in enumerate(shape) if d and n != 1}
        if not rest <= {int(d) % len(shape) for d in dims} <= set(range(1, len(shape))):  # type: ignore[call-overload]
            raise _Unknown
        factor = value.factor or {None: self._ones()}
        found: _Rows = {} if value.scale is None else _times(factor, value.scale)
        for j, sums in value.mixed.items():
            for key, number in factor.items():
                found = _added(found, _times(sums, number * self._inner(j, key)))
        return _Sums(_times(found, self._ones() / self._width) if mean else found)

    def _inner(self, a: _Key, b: _Key) -> Tensor:
        """``<W_a, W_b>`` of every row."""
        if a is None and b is None:
            return self._ones() * self._width
        rows = [self._value_of(k).reshape(self._rows, -1).double() for k in (a, b) if k is not None]
        return (rows[0] * rows[-1]).sum(1) if len(rows) == 2 else rows[0].sum(1)

    def _product(self, value: _Full | _Sums, node: fx.Node, *, divides: bool) -> _Full | _Sums:
        """By a number, a number for each row, or a value of parameters."""
        places = [i for i, n in enumerate(node.args) if not (isinstance(n, fx.Node) and n in self._known)]
        if node.kwargs or len(node.args) != 2 or len(places) != 1 or (divides and places == [0]):
            raise _Unknown
        (place,) = places
        other: Any = node.args[place]
        numbers = self._numbers(other, len(shape_of(node.meta["val"])))
        if numbers is not None:
            return _scaled(value, 1 / numbers if divides else numbers)
        if divides or shape_of(other.meta["val"]) != shape_of(node.meta["val"]) or not self._is_whole(other):
            raise _Unknown
        factor = self._parts(other)
        if isinstance(value, _Full) and (value.scale is not None or set(value.mixed) != {None}):
            if value.factor is not None:
                raise _Unknown
            return _Full(value.scale, value.mixed, factor)
        if isinstance(value, _Full) and value.factor is not None:
            raise _Unknown
        sums = value.of if isinstance(value, _Sums) else value.mixed[None]
        return _Full(None, {k: _times(sums, number) for k, number in factor.items()})

    def _chosen(self, value: _Full | _Sums, node: fx.Node) -> _Full | _Sums:
        """Zero in some of the rows."""
        which, *both = node.args
        places = [i for i, n in enumerate(both) if isinstance(n, fx.Node) and n in self._known]
        shape = shape_of(node.meta["val"])
        if len(both) != 2 or len(places) != 1 or not is_zero(both[1 - places[0]]) or not isinstance(which, fx.Node):
            raise _Unknown
        seen = shape_of(which.meta["val"])
        alike = shape_of(both[places[0]].meta["val"]) == shape  # type: ignore[union-attr]
        if not alike or len(seen) != len(shape) or seen[0] != self._rows or prod(int(n) for n in seen) != self._rows:
            raise _Unknown
        there = self._value_of(which).reshape(-1) if places == [0] else ~self._value_of(which).reshape(-1)
        return _changed(value, lambda x: torch.where(there, x, 0.0))

    def _numbers(self, value: Any, dims: int) -> Tensor | None:
        """Of a number, or of a value that is one number for each row when it is spread over ``dims`` dimensions."""
        if isinstance(value, (int, float)):
            return self._ones() * float(value)
        if not isinstance(value, fx.Node) or not value.meta["val"].is_floating_point():
            raise _Unknown
        shape = shape_of(value.meta["val"])
        elements = prod(int(n) for n in shape)
        if elements == 1:
            return self._ones() * self._value_of(value).reshape(()).double()
        by_row = len(shape) == dims and shape[0] == self._rows and elements == self._rows
        return self._value_of(value).reshape(-1).double() if by_row else None

    def _is_whole(self, node: fx.Node) -> bool:
        shape = shape_of(node.meta["val"])
        return bool(shape) and shape[0] == self._rows and prod(int(n) for n in shape) == self._rows * self._width

    def _parts(self, node: fx.Node) -> _Rows:
        """A value of parameters as a sum of numbers for each row times values that more such sums may have."""
        name = operation_name(node.target) if node.op == "call_function" else ""
        dims, operands = len(shape_of(node.meta["val"])), node.args[:2]
        if not node.meta["val"].is_floating_point():
            raise _Unknown
        numbers = name in ("add", "sub", "mul", "div") and not node.kwargs and len(node.args) == 2
        exact = node.meta["val"].dtype in (torch.float32, torch.float64)  # the clipped sum has it as it was rounded
        if numbers and exact and self._is_of_parameter(node):
            sides = [self._numbers(n, dims) for n in operands]
            wholes = [isinstance(n, fx.Node) and self._is_whole(n) for n in operands]
            left, right = operands
            if wholes[0] and sides[1] is not None:
                found = self._parts(left)  # type: ignore[arg-type]
                if name in ("mul", "div"):
                    return _times(found, sides[1] if name == "mul" else 1 / sides[1])
                return _added(found, {None: sides[1] if name == "add" else -sides[1]})
            if wholes[1] and sides[0] is not None and name in ("mul", "add"):
                found = self._parts(right)  # type: ignore[arg-type]
                return _times(found, sides[0]) if name == "mul" else _added(found, {None: sides[0]})
        return {node: self._ones()}

    def _is_of_parameter(self, node: fx.Node) -> bool:
        """Whether it is made of the parameter and constants alone."""
        seen, stack = set(), [node]
        while stack:
            own = stack.pop()
            if own in seen or own is self._gradient.parameter:
                continue
            if own.op != "call_function":
                return False
            seen.add(own)
            stack.extend(own.all_input_nodes)
        return True


def _added(a: _Rows, b: _Rows) -> _Rows:
    return {k: a[k] + b[k] if k in a and k in b else a[k] if k in a else b[k] for k in {**a, **b}}


def _times(a: _Rows, numbers: Tensor) -> _Rows:
    return {k: v * numbers for k, v in a.items()}


def _scaled(value: _Full | _Sums, numbers: Tensor) -> Any:
    return _changed(value, lambda x: x * numbers)


def _changed(value: _Full | _Sums, change: Callable[[Tensor], Tensor]) -> Any:
    """With other numbers, each a linear function of its own."""
    if isinstance(value, _Sums):
        return _Sums({k: change(v) for k, v in value.of.items()})
    mixed = {j: {k: change(v) for k, v in sums.items()} for j, sums in value.mixed.items()}
    return _Full(None if value.scale is None else change(value.scale), mixed, value.factor)
