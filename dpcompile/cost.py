"""What each rule costs on top of the non-private backward, as sympy expressions.

Letters: B examples, K blocks (groups, heads), T positions, p rows, d columns, e bytes per element, u elements of an
unfolded copy (the patches of a convolution). Ghost norms and instantiation are from Li et al. 2022 (arXiv:2110.05679),
their mix from Bu et al. 2022 (arXiv:2205.10683), keeping and redoing from Bu et al. 2023 (arXiv:2210.00038,
book-keeping).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from dpcompile.sizes import Size, product

__all__ = ["DIRECT_TILES", "Cost", "Rates", "Shape", "costs", "rates_for"]

DIRECT_TILES = 8  # how many parts of a gradient the direct rule makes, one after the other


@dataclass(frozen=True, slots=True)
class Cost:
    """Extra work of one rule.

    Attributes:
        flops: floating point operations.
        traffic: bytes moved.
        memory: bytes that exist until the clip, or for a moment.
    """

    flops: sympy.Expr
    traffic: sympy.Expr
    memory: sympy.Expr

    def at(self, hints: Mapping[sympy.Symbol, int]) -> tuple[float, float, float]:
        """The three as numbers."""
        return tuple(float(sympy.sympify(x).subs(hints)) for x in (self.flops, self.traffic, self.memory))  # type: ignore


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a parameter's sites taken together."""

    k: Size
    t: Size
    p: Size
    d: Size
    element: int = 4
    unfolded: Size = 0


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does in a second; only the ratio matters to the choice."""

    flops: float
    traffic: float


def rates_for(device: str) -> Rates:
    """Round figures for a CPU with a few cores and for a data-centre GPU."""
    return Rates(3e13, 1.5e12) if device == "cuda" else Rates(1e11, 1e10)


def costs(shape: Shape, batch: Size) -> dict[str, Cost]:
    """The extra cost of every rule that a parameter of factored sites can have."""
    k, t, p, d, e, u = shape.k, shape.t, shape.p, shape.d, shape.element, shape.unfolded
    sides = product([batch, k, t, p + d]) * e  # both operands once
    weights = product([batch, k, p, d])  # one gradient per example
    unfold = product([batch, u]) * e
    tile = weights * sympy.Rational(1, DIRECT_TILES)
    grams = 2 * product([batch, k, t, t])
    return {
        "outer": _cost(2 * product([batch, k, p + d]), 2 * sides, sides),
        "ghost": _cost(grams * (p + d), 3 * sides + 2 * grams * e + 2 * unfold, sides + grams * e + unfold),
        "keep": _cost(4 * weights, 3 * weights * e + 2 * unfold, weights * e + unfold),
        "redo": _cost(2 * weights * (t + 1), 2 * weights * e + 2 * sides + 2 * unfold, sides + weights * e + unfold),
        "direct": _cost(
            2 * weights * (t + 1), 2 * weights * e + 3 * sides + 2 * unfold, sides + tile * e + unfold
        ),
    }


def _cost(flops: Size, traffic: Size, memory: Size) -> Cost:
    return Cost(sympy.sympify(flops), sympy.sympify(traffic), sympy.sympify(memory))


def summed_cost(batch: Size, elements: Size, element: int) -> Cost:
    """Per-example gradients that the backward makes anyway on its way to the sum (biases, norm layers)."""
    total = product([batch, elements])
    return _cost(4 * total, 3 * total * element, total * element)
