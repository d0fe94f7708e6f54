"""What each rule costs on top of the non-private backward, as sympy expressions.

Letters: B examples, K blocks (groups, heads), T positions, p rows, d columns, e bytes per element. Ghost norms and
instantiation are from Li et al. 2022 (arXiv:2110.05679), their mix from Bu et al. 2022 (arXiv:2205.10683), keeping and
redoing from Bu et al. 2023 (arXiv:2210.00038, book-keeping).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import sympy

from dpcompile.graph.sizes import Size, product
from dpcompile.kernels.rates import Rates

__all__ = ["DIRECT_TILES", "Cost", "Shape", "costs", "gram_cost", "mapped_cost", "summed_cost"]

DIRECT_TILES = 8  # how many parts of a gradient the direct rule makes, one after the other


@dataclass(frozen=True, slots=True)
class Cost:
    """Extra work of one rule.

    Attributes:
        large: floating point operations in large matrix products (negative: the plain step's, which the rule replaces).
        batched: the same in products of one example each.
        wide: the same in float64, of float32 numbers.
        summed: the same in the products of clipped sums.
        narrow: the same in large products in bfloat16 or float16.
        narrow_batched: the same in products of one example each of such numbers.
        convolved: the same in convolutions.
        grouped: the same in convolutions that make every example's filter gradients.
        filtered: the same in our kernel for these.
        idle: what that kernel computes on empty places of its tiles.
        traffic: bytes read and written.
        fresh: bytes written to memory that the system has just given.
        calls: kernels.
        memory: bytes of results that exist until the clip, or for a moment; not operands, which the plain step has too.
    """

    large: sympy.Expr = sympy.S.Zero
    batched: sympy.Expr = sympy.S.Zero
    wide: sympy.Expr = sympy.S.Zero
    summed: sympy.Expr = sympy.S.Zero
    narrow: sympy.Expr = sympy.S.Zero
    narrow_batched: sympy.Expr = sympy.S.Zero
    convolved: sympy.Expr = sympy.S.Zero
    grouped: sympy.Expr = sympy.S.Zero
    filtered: sympy.Expr = sympy.S.Zero
    idle: sympy.Expr = sympy.S.Zero
    traffic: sympy.Expr = sympy.S.Zero
    fresh: sympy.Expr = sympy.S.Zero
    calls: sympy.Expr = sympy.S.Zero
    memory: sympy.Expr = sympy.S.Zero

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def at(self, hints: Mapping[sympy.Symbol, int]) -> Numbers:
        """The same as numbers."""
        values = (getattr(self, f.name) for f in fields(self))
        return Numbers(*(float(x.subs(hints)) if x.free_symbols else float(x) for x in values))


@dataclass(frozen=True, slots=True)
class Numbers:
    """A :class:`Cost` at given sizes."""

    large: float
    batched: float
    wide: float
    summed: float
    narrow: float
    narrow_batched: float
    convolved: float
    grouped: float
    filtered: float
    idle: float
    traffic: float
    fresh: float
    calls: float
    memory: float

    @property
    def flops(self) -> float:
        """Operations that the plain step does not have; one in float64 counts for two."""
        products = self.large + self.batched + 2 * self.wide + self.summed + self.narrow + self.narrow_batched
        return products + self.convolved + self.grouped + self.filtered

    def seconds(self, rates: Rates) -> float:
        """On a machine."""
        return (
            self.large / rates.large
            + self.batched / rates.batched
            + self.wide / rates.wide
            + self.summed / rates.summed
            + self.narrow / rates.narrow
            + self.narrow_batched / rates.narrow_batched
            + self.convolved / rates.convolution
            + self.grouped / rates.grouped
            + (self.filtered + self.idle) / rates.filters
            + self.traffic / rates.traffic
            + self.fresh / rates.fresh
            + self.calls * rates.call
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a parameter's sites taken together.

    Attributes:
        k: blocks.
        t: positions of all sites.
        p: rows.
        d: columns.
        element: bytes.
        copied: elements per example of the copy that a ghost norm makes.
        one_hot: the rows of one of the sites are an index.
        indexed: those of all of them: ghost norms are those of sums by it, without Gram matrices.
        convolution: the plain gradients are made by a convolution.
        grouped: per-example gradients are too, with the examples among its groups.
        filled: how full the tiles of our filter kernel are, which makes them; 0 where it does not.
        alone: their norms come without them.
        head: one of the sites makes its logits a part of the classes at a time, and makes them anew for the norm.
        panels: parts of a Gram matrix.
        products: the clipped sum is a matrix product, and so ours where the plain step's was torch's.
        patched: of a convolution it is one too, of patches (:func:`dpcompile.planning.choices.is_patched`).
        narrow: the operands are bfloat16 or float16, which the plain step multiplies as they are, and rule "keep" too
            where all sites are products; all other products of ours are of float32 numbers.
        multiplied: positions of those sites that are products, where others look up; None: all.
    """

    k: Size
    t: Size
    p: Size
    d: Size
    element: int = 4
    copied: Size = 0
    one_hot: bool = False
    indexed: bool = False
    convolution: bool = False
    grouped: bool = False
    filled: float = 0.0
    alone: bool = False
    head: bool = False
    panels: int = 1
    products: bool = False
    patched: bool = False
    narrow: bool = False
    multiplied: Size | None = None

    @property
    def terms(self) -> Size:
        """Positions that are multiplied; the rows of the others are an index."""
        return self.t if self.multiplied is None else self.multiplied


def costs(shape: Shape, batch: Size, *, reuse: bool) -> dict[str, Cost]:
    """The extra cost of every rule that a parameter of factored sites can have.

    The Gram matrices of "ghost" are not in it (:func:`gram_cost`): sites may share them.

    Args:
        shape: of the sites.
        batch: B.
        reuse: whether memory of per-example gradients stays mapped from step to step.
    """
    k, t, p, d, e = shape.k, shape.t, shape.p, shape.d, shape.element
    small = product([batch, k, t, d if shape.one_hot else sympy.Min(p, d)]) * e  # the operand that is scaled
    sides = product([batch, k, t, d if shape.one_hot else p + d]) * e
    weights = product([batch, k, p, d])  # one gradient per example
    flops = 2 * weights * shape.terms
    each = _cost(grouped=flops) if shape.grouped else _cost(batched=flops)
    if shape.filled:
        each = _cost(filtered=flops, idle=sympy.sympify(flops) * (1 / shape.filled - 1))
    plain = "convolved" if shape.convolution else "narrow" if shape.narrow else "large"  # the plain step's products
    saved = _cost(**{plain: -sympy.sympify(flops)})
    kept = _cost(narrow_batched=flops) if shape.narrow and not shape.one_hot and each.batched else each
    fresh = 0 if reuse else weights * e
    # Written, read for the norm and for the sum; made for a few examples at a time; or their norm taken at once.
    passes = 5 if shape.grouped else 2 if shape.filled else 3
    mixed = shape.one_hot and not shape.indexed  # dropped products of these are in float64
    dropped = weights * (8 if mixed else e)
    norms = _cost(traffic=2 * dropped, fresh=0 if reuse else dropped, calls=3, memory=dropped)
    grams = product([batch, k, t, t]) * 8  # float64
    tile = weights * e * sympy.Rational(1, DIRECT_TILES)
    scaled = _cost(traffic=2 * small, calls=1) + _sum_cost(shape, batch)
    ghost = _cost(traffic=4 * grams, calls=3 * shape.panels, memory=grams)
    if shape.indexed:
        copied = product([batch, shape.copied]) * e
        ghost = _cost(traffic=2 * sides + 2 * copied, calls=2, fresh=copied, memory=copied)
    if shape.head:
        inner = product([batch, t, t, p + d])  # of both Gram matrices, half of each by symmetry
        products = _cost(batched=inner) if e == 8 else _cost(wide=inner)
        ghost = products + _cost(large=flops, traffic=3 * product([batch, t, p]) * e, memory=grams)
    return {
        "outer": scaled + _cost(traffic=sides, calls=2),
        "ghost": scaled + ghost,
        "keep": kept + saved + _cost(traffic=passes * weights * e, fresh=fresh, calls=3, memory=weights * e),
        "redo": scaled + (_cost(wide=flops) if mixed else each) + (_cost(calls=1) if shape.alone else norms),
        # Its memory is that of all tiles: the compiler may make them all before it takes their norms.
        "direct": scaled
        + _cost(batched=flops, traffic=2 * weights * e + sides, fresh=tile, calls=3 * DIRECT_TILES, memory=weights * e),
    }


def _sum_cost(shape: Shape, batch: Size) -> Cost:
    """The clipped sum as a product of ours, in the place of the plain step's."""
    if not (shape.products or shape.patched):
        return Cost()
    flops = 2 * product([batch, shape.k, shape.terms, shape.p, shape.d])
    patches = product([batch, shape.t, shape.d]) * shape.element if shape.patched else 0
    plain = "convolved" if shape.patched else "narrow" if shape.narrow else "large"
    return _cost(**{plain: -sympy.sympify(flops)}, summed=flops, traffic=3 * patches, calls=1 if shape.patched else 0)


def gram_cost(shape: Shape, batch: Size, width: Size, *, index: bool, copied: Size) -> Cost:
    """One Gram matrix ``[B, K, T, T]`` of vectors of ``width``, half of it by symmetry as far as panels allow.

    Args:
        shape: of the sites.
        batch: B.
        width: P or D.
        index: the vectors of sites that look up are one-hot: equality instead of products.
        copied: elements per example of the copy that it needs (see :class:`Shape`).
    """
    k, t, e = shape.k, shape.t, shape.element
    part = sympy.Rational(shape.panels + 1, 2 * shape.panels)
    grams, copy = product([batch, k, t, t]), product([batch, copied]) * e
    terms = shape.terms if index else t
    flops = 2 * product([batch, k, terms, terms]) * width * part
    traffic = 2 * grams * 8 * part + product([batch, k, terms, width]) * e + 2 * copy
    products = _cost(batched=flops) if e == 8 else _cost(wide=flops)  # Gram matrices are in float64
    return products + _cost(traffic=traffic, fresh=copy, calls=2 * shape.panels, memory=copy)


def mapped_cost(shape: Shape, batch: Size, bases: int) -> Cost:
    """A ghost norm behind a tail that works row by row (:mod:`dpcompile.kernels.mapped_norms`).

    Args:
        shape: of the sites.
        batch: B.
        bases: values of parameters that are multiplied with every column.
    """
    t, p, d, e = shape.t, shape.p, shape.d, shape.element
    grams, seen = product([batch, t, t]), product([batch, t, p, d])
    inner, mapped = 2 * grams * (p + d), 2 * bases * seen
    copied = product([batch, shape.copied]) * e
    traffic = 4 * grams * 8 + product([batch, t, p + d]) * (e + 16) + product([batch, t, bases, p]) * 2 * e
    traffic += 2 * bases * product([p, d]) * e + 2 * copied
    products = _cost(batched=inner + mapped) if e == 8 else _cost(wide=inner, summed=mapped)
    return products + _sum_cost(shape, batch) + _cost(traffic=traffic, fresh=copied, calls=40, memory=copied)


def summed_cost(batch: Size, elements: Size, element: int, *, fresh: bool = False) -> Cost:
    """Per-example gradients that the backward makes anyway on its way to the sum (biases, norm layers)."""
    total = product([batch, elements]) * element
    return _cost(traffic=3 * total, fresh=total if fresh else 0, calls=2, memory=total)


def _cost(**terms: Size) -> Cost:
    return Cost(**{name: sympy.sympify(value) for name, value in terms.items()})
