"""How a result grows with the operands of its operation, said beside the operation's rule: linear, a product, a sum.

Three questions are answered from it: whether a sum over the examples stays one, whether a value is zero because its
operands are, and by which power of the cotangents a value grows (:mod:`dpcompile.proof.degrees`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from dpcompile.graph.operations import operation_name

__all__ = [
    "Degrees",
    "Growth",
    "Homogeneous",
    "Linear",
    "Product",
    "ProductAndSum",
    "Quotient",
    "Sum",
    "add_growth",
    "find_growth",
    "first",
    "power",
]


class Degrees:
    """By which powers of the cotangents the operands of one operation grow.

    Args:
        node: the operation.
        arguments: its operands by name.
        degrees: of the values before it; a tuple for several results.
        is_zero: whether a value is known to be zeros, which have any degree.
    """

    def __init__(
        self,
        node: fx.Node,
        arguments: Mapping[str, Any],
        degrees: Mapping[fx.Node, Any],
        is_zero: Callable[[fx.Node], bool],
    ) -> None:
        self.node, self.arguments = node, arguments
        self._degrees, self._is_zero = degrees, is_zero

    def of(self, operand: Any) -> float:
        """Of an operand; what is no value of the graph has degree 0."""
        found = self._degrees[operand] if isinstance(operand, fx.Node) else 0.0
        return found[0] if isinstance(found, tuple) else found

    def only(self, *names: str) -> bool:
        """Whether no other operands have a degree."""
        counted = [n for k in names for n in _flat(self.arguments.get(k))]
        return all(not self.of(n) for n in self.node.all_input_nodes if n not in counted)

    def common(self, operands: list[Any]) -> float | None:
        """The degree of operands that are added up, or among which one is chosen; zeros have any."""
        found = {self.of(x) for x in operands if not self._zero(x)}
        return found.pop() if len(found) == 1 else None

    def of_result(self) -> Any:
        """None where it has none."""
        name = operation_name(self.node.target)
        if "::" in name and not name.startswith(("python::", "_c10d_functional::")):
            return max((self.of(n) for n in self.node.all_input_nodes), default=0.0)  # linear: see register_axis_rule
        growth = find_growth(name)
        if growth is None and "backward" in name:
            growth = _BACKWARD
        value = self.node.meta["val"]
        rounds = isinstance(value, torch.Tensor) and not (value.dtype.is_floating_point or value.dtype.is_complex)
        if growth is None or (rounds and growth is not SIGN):
            return None
        return growth.degree(self)

    def _zero(self, operand: Any) -> bool:
        return self._is_zero(operand) if isinstance(operand, fx.Node) else operand is None or operand == 0


@dataclass(frozen=True, slots=True)
class Linear:
    """In one operand (the first, where none is named), with the others fixed.

    Attributes:
        operand: its name.
        first_result: only the first result is; the others do not depend on the operand.
    """

    operand: str | None = None
    first_result: bool = False

    def degree(self, d: Degrees) -> Any:
        """The operand's."""
        if self.operand is None:
            return first(d)
        if not d.only(self.operand):
            return None
        degree = d.of(d.arguments[self.operand])
        return (degree, *(0.0 for _ in d.node.meta["val"][1:])) if self.first_result else degree


@dataclass(frozen=True, slots=True)
class Product:
    """Linear in each of two operands."""

    factors: tuple[str, str]

    def degree(self, d: Degrees) -> float | None:
        """The sum of theirs."""
        return sum(d.of(d.arguments.get(k)) for k in self.factors) if d.only(*self.factors) else None


@dataclass(frozen=True, slots=True)
class Quotient:
    """One operand by another, not rounded to whole numbers."""

    numerator: str
    denominator: str

    def degree(self, d: Degrees) -> float | None:
        """The difference of theirs."""
        if d.arguments.get("rounding_mode") is not None:
            return None
        return d.of(d.arguments[self.numerator]) - d.of(d.arguments[self.denominator])


@dataclass(frozen=True, slots=True)
class Sum:
    """Linear in all of the terms at once: they are added up, put together, or one is chosen by the other operands."""

    terms: tuple[str, ...]

    def degree(self, d: Degrees) -> float | None:
        """The one that all of them have."""
        return d.common(self.among(d.arguments)) if d.only(*self.terms) else None

    def among(self, arguments: Mapping[str, Any]) -> list[Any]:
        """The terms, lists flattened, numbers too."""
        values = [arguments.get(k) for k in self.terms]
        return [x for v in values if v is not None for x in (v if isinstance(v, (list, tuple)) else [v])]


@dataclass(frozen=True, slots=True)
class ProductAndSum:
    """A product with one term added."""

    factors: tuple[str, str]
    added: str

    def degree(self, d: Degrees) -> float | None:
        """That of the product, which the term must have too."""
        product = sum(d.of(d.arguments.get(k)) for k in self.factors)
        added = d.common([d.arguments.get(self.added)])
        return product if added in (None, product) and d.only(*self.factors, self.added) else None


@dataclass(frozen=True, slots=True)
class Homogeneous:
    """Not linear, but a positive factor of the operands comes out as a power of it, which ``degree`` finds."""

    degree: Callable[[Degrees], Any]


Growth: TypeAlias = "Linear | Product | Quotient | Sum | ProductAndSum | Homogeneous"
_GROWTHS: dict[str, Growth] = {}


def add_growth(growth: Growth, *operations: str) -> None:
    """Register it for operations by name (:func:`dpcompile.graph.operations.operation_name`)."""
    for name in operations:
        assert _GROWTHS.setdefault(name, growth) == growth, f"two growths of {name}"


def find_growth(operation: str) -> Growth | None:
    """What is registered of an operation by name."""
    return _GROWTHS.get(operation)


def first(d: Degrees) -> float | None:
    """The degree of the first operand, where the others have none."""
    operands = d.node.all_input_nodes
    return d.of(operands[0]) if not any(d.of(n) for n in operands[1:]) else None


def power(exponent: float | None = None) -> Homogeneous:
    """A power of the first operand; without a number, by the operand that says which."""

    def degree(d: Degrees) -> float | None:
        by = d.arguments["exponent"] if exponent is None else exponent
        return d.of(d.arguments["self"]) * float(by) if isinstance(by, (int, float)) else None

    return Homogeneous(degree)


def _sign(d: Degrees) -> float | None:
    names = [k for k in ("self", "other") if k in d.arguments]
    return 0.0 if len(names) == 1 or d.common([d.arguments[k] for k in names]) is not None else None


def _backward(d: Degrees) -> float | None:
    given = [k for k in d.arguments if k.startswith("grad") and isinstance(d.arguments[k], fx.Node)]
    return d.common([d.arguments[k] for k in given]) if d.only(*given) else None


# Comparisons of values of one degree, and with zero: no positive factor changes them.
SIGN = Homogeneous(_sign)
# Torch's own backwards are linear in the gradients that they are given.
_BACKWARD = Homogeneous(_backward)


def _flat(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _flat(v)
