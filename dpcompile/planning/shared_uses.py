"""Parameters that several regions use in one forward: the norm of the sum of what the uses give.

The gradients of the uses add before the norm is taken, so cross terms count. Every region hands out, of each use, the
operands of its sites (where these are products of rows and columns) or the per-example gradients; the norm is taken
when the backward is over. The clipped sum is linear in the uses: each region computes its own, and they are added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile.graph.slices import accumulation_dtype
from dpcompile.kernels.kept import squared_norms
from dpcompile.kernels.products import product
from dpcompile.kernels.rates import rates_for
from dpcompile.norms.factors import Factored
from dpcompile.norms.ghost import Sides, ghost
from dpcompile.planning.choices import Choice, panels_of
from dpcompile.planning.cost import Shape, costs, gram_cost
from dpcompile.planning.modes import MODES
from dpcompile.planning.plan import Plan

__all__ = ["HandedOut", "Part", "Redone", "Use", "factor_operands", "joint_norm", "uses_of"]

_SCRATCH = 2**26  # bytes that a chunk of examples may take, if the parameter is not larger


@dataclass(frozen=True, slots=True)
class Use:
    """How a region hands out its part of a parameter's gradient.

    Attributes:
        forms: the sites as outer products, whose operands are handed out; None where it is per-example gradients.
        shape: of the parameter.
        dtype: to compute in.
    """

    forms: tuple[Factored, ...] | None
    shape: tuple[int, ...]
    dtype: torch.dtype


def uses_of(plan: Plan) -> dict[str, Use]:
    """Of every parameter of a region that other regions use too."""
    found = {}
    for choice in plan.choices:
        if choice.shared:
            value = choice.gradient.gradient.meta["val"]
            forms = choice.forms if choice.rule == "later" else None
            shape = tuple(int(n) for n in value.shape)
            found[choice.gradient.name] = Use(forms, shape, accumulation_dtype(value.dtype))
    return found


def factor_operands(choice: Choice) -> list[fx.Node]:
    """What a region hands out of a choice with the rule "later"."""
    return [n for f in choice.forms or () for n in f.operands]


@dataclass(frozen=True, slots=True)
class HandedOut:
    """What one use handed out in one backward.

    Attributes:
        use: how.
        values: operands of the forms in their order, or one tensor ``[B, *shape]``.
    """

    use: Use
    values: Sequence[Tensor]

    def sides(self, batch: int, dtype: torch.dtype | None = None) -> list[Sides]:
        """Rows and columns of every site, in ``dtype`` or the dtype to compute in."""
        remaining, found = list(self.values), []
        for form in self.use.forms or ():
            own = [remaining.pop(0) for _ in form.operands]
            own = [v.to(dtype or self.use.dtype) if v.is_floating_point() else v for v in own]
            found.append(Sides(*form.build(*own, batch), one_hot=form.one_hot))
        return found

    def gradients(self, batch: int) -> Callable[[int, int], Tensor]:
        """A function from a range of examples to their gradients ``[n, *shape]``, in float64.

        The clipped sum is another than the one whose norm is taken, so that is one of the real numbers.
        """
        forms, shape = self.use.forms, self.use.shape
        if forms is None:
            return lambda start, end: self.values[0][start:end].double()
        sides = self.sides(batch, torch.float64)

        def some(start: int, end: int) -> Tensor:
            total: Any = 0
            for form, own in zip(forms, sides, strict=True):
                part = Sides(own.rows[start:end], own.cols[start:end], own.one_hot)
                total = total + _rearranged(_products(part, form), form, shape)
            return total

        return some


@dataclass(frozen=True, slots=True)
class Redone:
    """A use in a region that was compiled before anybody knew that there are others: it runs once for every example.

    Attributes:
        weighted: from weights ``[B]`` to the weighted sum of the use's gradients; zero if None.
        like: a tensor on the device of the weights, of their dtype.
    """

    weighted: Callable[[Tensor], Tensor]
    like: Tensor

    def gradients(self, batch: int) -> Callable[[int, int], Tensor]:
        """A function from a range of examples to their gradients ``[n, *shape]``."""

        def some(start: int, end: int) -> Tensor:
            chosen = torch.eye(batch, device=self.like.device, dtype=self.like.dtype)
            return torch.stack([self.weighted(chosen[i]).to(torch.float64, copy=True) for i in range(start, end)])

        return some


Part = HandedOut | Redone


def joint_norm(parts: Sequence[Part], batch: int, mode: str) -> Tensor:
    """The squared norm ``[B]`` of every example's sum over all uses of one parameter.

    Contract: ``parts`` are all uses that the backward reached, at least one.

    **Guarantee.** The result, float64, is ``|sum_u g_iu|^2`` or too large, cross terms included: ghost norms of rows
    and columns concatenated along T (an embedding with a linear layer in closed form), or the norm of the sum itself,
    some examples at a time. Squared norms of uses are never added.
    """
    handed = [p for p in parts if isinstance(p, HandedOut)]
    layouts = {f.layout for p in handed for f in p.use.forms or ()}
    alike = len(handed) == len(parts) and len(layouts) == 1 and all(p.use.forms is not None for p in handed)
    if alike:
        sides = [s for p in handed for s in p.sides(batch)]
        shape = _shape(sides, handed[0].use)
        if _prefers_ghost(shape, batch, mode, sides[0].cols.device):
            per_example = int(shape.k) * int(shape.t) ** 2 * shape.element
            chunks = _chunks(batch, 3 * per_example, prod(handed[0].use.shape) * shape.element)
            found = [ghost(_some(sides, start, end), shape.panels) for start, end in chunks]
            return torch.cat(found)
    functions = [p.gradients(batch) for p in parts]
    size = max((prod(p.use.shape) * torch.float64.itemsize for p in handed), default=0)
    chunks = _chunks(batch, 2 * size, size) if len(handed) == len(parts) else [(i, i + 1) for i in range(batch)]
    found = []
    for start, end in chunks:
        total: Any = 0
        for function in functions:
            total = total + function(start, end)
        found.append(squared_norms(total))
    return torch.cat(found)


def _chunks(batch: int, per_example: int, allowed: int) -> list[tuple[int, int]]:
    """Ranges of examples that take no more than the parameter's own size, or a little."""
    step = max(1, max(allowed, _SCRATCH) // max(per_example, 1))
    return [(start, min(start + step, batch)) for start in range(0, batch, step)]


def _some(sides: Sequence[Sides], start: int, end: int) -> list[Sides]:
    return [Sides(s.rows[start:end], s.cols[start:end], s.one_hot) for s in sides]


def _shape(sides: Sequence[Sides], use: Use) -> Shape:
    """The sizes of all uses together."""
    assert use.forms is not None
    k, _, p, d = use.forms[0].sizes
    positions = sum((s.cols if s.one_hot == "rows" else s.rows).shape[2] for s in sides)
    hot = any(s.one_hot is not None for s in sides)
    return Shape(
        k,
        positions,
        p,
        d,
        use.dtype.itemsize,
        one_hot=hot,
        indexed=all(s.one_hot is not None for s in sides),
        multiplied=sum(s.rows.shape[2] for s in sides if s.one_hot is None),
        panels=panels_of(positions),
    )


def _prefers_ghost(shape: Shape, batch: int, mode: str, device: torch.device) -> bool:
    """Whether Gram matrices are what the mode asks for, or quicker than products where it leaves the choice."""
    known = MODES[mode]
    fits = known.wanted(float(shape.t), float(shape.p), float(shape.d))
    ghosts, products = (
        any(r in known.rules and fits(r) for r in rs) for rs in (("ghost",), ("keep", "redo", "direct"))
    )
    if ghosts != products:
        return ghosts
    table, rates = costs(shape, batch, reuse=False), rates_for(device)
    widths = () if shape.indexed else ((shape.p, shape.one_hot), (shape.d, False))
    grams = [gram_cost(shape, batch, n, index=hot, copied=0) for n, hot in widths]
    by_ghost = sum(grams, start=table["ghost"]).at({}).seconds(rates)
    return by_ghost <= table["redo"].at({}).seconds(rates)


def _products(sides: Sides, form: Factored) -> Tensor:
    """``sum_t rows_t^T cols_t`` of every example: ``[n, K, P, D]``."""
    if sides.one_hot is None:
        return product(sides.rows.mT, sides.cols)
    index, dense = sides.by_index()
    size = int(form.sizes[2 if sides.one_hot == "rows" else 3])
    total = dense.new_zeros(len(dense), size, dense.shape[-1])
    total.scatter_add_(1, index.long().unsqueeze(-1).expand(-1, -1, dense.shape[-1]), dense)
    return (total if sides.one_hot == "rows" else total.mT).unsqueeze(1)


def _rearranged(products: Tensor, form: Factored, shape: tuple[int, ...]) -> Tensor:
    """From the site's own shape to the parameter's, as the tail does."""
    chain = form.chain
    if chain == ("identity",):
        return products.reshape(len(products), *shape)
    value = products.reshape(len(products), *form.site.value.meta["val"].shape)
    for move in chain:
        if move[0] == "permute":
            value = value.permute(0, *(d + 1 for d in move[1]))
        else:
            value = value.reshape(len(products), *(int(n) for n in move[2]))
    return value
