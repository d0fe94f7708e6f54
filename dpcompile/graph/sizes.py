"""Exact arithmetic on tensor sizes, whether they are numbers or symbols."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TypeAlias

import sympy
import torch
from torch import fx

__all__ = ["Size", "divide", "hinted", "is_one", "product", "same", "shape_of", "short", "size", "value_of"]

Size: TypeAlias = "int | sympy.Expr"


def size(value: int | torch.SymInt | sympy.Expr) -> Size:
    """Turn a dimension as torch gives it into a number or a sympy expression."""
    if isinstance(value, torch.SymInt):
        value = value.node.expr
    if isinstance(value, sympy.Expr):
        value = _without_exact_floors(value)
        return int(value) if value.is_Integer else value
    return int(value)


def value_of(number: object) -> Size:
    """The same for one that may stand in the graph as a node."""
    if isinstance(number, fx.Node):
        number = number.meta["val"]
    return size(number)  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _without_exact_floors(value: sympy.Expr) -> sympy.Expr:
    """``(s * t) // t`` is ``s``."""
    floors = [f for f in value.atoms(sympy.Function) if type(f).__name__ == "FloorDiv"]
    exact = {f: q for f in floors if (q := _divide(*f.args)) is not None}  # type: ignore[attr-defined]
    return sympy.expand(value.xreplace(exact)) if exact else value


def shape_of(value: object) -> tuple[Size, ...]:
    """The shape of a (fake) tensor, in exact sizes."""
    assert isinstance(value, torch.Tensor)
    return tuple(size(n) for n in value.shape)


def product(sizes: Iterable[Size]) -> Size:
    """The product; 1 for none."""
    result: Size = 1
    for n in sizes:
        result = result * n  # type: ignore[operator]
    return result


def hinted(value: int | torch.SymInt | sympy.Expr, hints: Mapping[sympy.Symbol, int]) -> int:
    """The size at given values of its symbols."""
    return int(sympy.sympify(size(value)).subs(list(hints.items())))


def same(a: Size, b: Size) -> bool:
    """Whether the two are equal for every value of their symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a == b or sympy.expand(a - b) == 0


def same_shape(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether two shapes are equal for every value of their symbols."""
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def is_one(a: Size) -> bool:
    """Whether the size is 1."""
    return same(a, 1)


def divide(a: Size, b: Size) -> Size | None:
    """``a / b`` if ``b`` divides ``a`` for every value of their symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    return _divide(sympy.sympify(a), sympy.sympify(b))


@lru_cache(maxsize=4096)
def _divide(a: sympy.Expr, b: sympy.Expr) -> Size | None:
    if b == 0:
        return None
    # Floor divisions and the like are unknowns of their own: what cancels with them standing for any integer is exact.
    opaque = sorted(a.atoms(sympy.Function) | b.atoms(sympy.Function), key=sympy.default_sort_key)
    stand_ins = {f: sympy.Dummy(positive=True, integer=True) for f in opaque}
    numbers: tuple[sympy.Expr, sympy.Expr] = a.xreplace(stand_ins), b.xreplace(stand_ins)  # type: ignore[assignment]
    quotient = sympy.cancel(numbers[0] / numbers[1])
    numerator, denominator = sympy.fraction(sympy.together(quotient))
    if denominator != 1:
        return None
    if numerator.free_symbols and not all(c.is_integer for c in sympy.Poly(numerator).coeffs()):
        return None
    if not numerator.free_symbols and not numerator.is_integer:
        return None
    quotient = quotient.xreplace({v: k for k, v in stand_ins.items()})
    return int(quotient) if quotient.is_Integer else quotient


def short(number: float) -> str:
    """A number with three digits and a prefix."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}P"
