"""The rules that a parameter may have, from the sizes of its sites and a mode."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch

from dpcompile.graph.sent_products import no_gradient_of_one_example
from dpcompile.graph.sizes import Size, hinted, is_one, product, shape_of
from dpcompile.graph.slices import accumulation_dtype
from dpcompile.kernels.by_index import has_sums_by_index
from dpcompile.kernels.narrow import NARROW
from dpcompile.norms.factors import Factored, alone, bare, oriented
from dpcompile.norms.mapped import Mapped, mapped
from dpcompile.norms.over_ranks import takes_positions
from dpcompile.planning.cost import Cost, Shape, costs, gram_cost, mapped_cost, summed_cost
from dpcompile.planning.exchanges import Exchange, added_up, exchange_of
from dpcompile.planning.modes import MODES, Mode
from dpcompile.planning.replay import Holding, bytes_of, storage_of
from dpcompile.planning.search import Candidate
from dpcompile.planning.situation import Situation
from dpcompile.proof.sites import ParameterGradient

__all__ = ["Choice", "options_of", "panels_of"]


@dataclass(frozen=True, slots=True)
class Choice:
    """The rule of one parameter.

    Attributes:
        gradient: the parameter's gradient and its sites.
        rule: "outer", "ghost", "keep" (instantiate and keep), "redo" (instantiate, drop, redo the product), "direct"
            (the same a tile at a time), "whole" (a batch of one), "later" (the parameter has uses in other regions: the
            norm is taken of their sum, when the backward is over).
        forms: the sites as outer products, in one orientation; None where they are not.
        cost: of the rule, its own Gram matrices included.
        why: in words.
        panels: in how many parts Gram matrices are made.
        reuse: whether kept gradients stay mapped from step to step.
        holding: what it holds until the clip.
        shared: other regions use the parameter too.
        late: kept gradients are made when the backward is over, to fit a budget.
        exchange: what ranks do first, of a gradient that is a sum over them; None of any other.
        mapped: of rule "ghost", the tail that the norm is taken behind, if it does more than move the gradient.
        patched: the clipped sum is a product of patches (:func:`is_patched`).
        fused: whether rule "direct" or "ghost" is one operator, where there is one (:mod:`dpcompile.norms.fused`).
    """

    gradient: ParameterGradient
    rule: str
    forms: tuple[Factored, ...] | None
    cost: Cost
    why: str
    panels: int = 1
    reuse: bool = False
    fused: bool = False
    holding: Holding = Holding({}, (), 0.0, 0.0, 0.0)
    shared: bool = False
    late: bool = False
    exchange: Exchange | None = None
    mapped: Mapped | None = None
    patched: bool = False


def options_of(gradient: ParameterGradient, situation: Situation) -> list[tuple[Choice, Candidate]]:
    """The rules that a parameter may have, each with its cost; one at least."""
    return _Options(gradient, situation).all()


class _Options:
    """One parameter's rules: what they cost, and what they hold."""

    def __init__(self, gradient: ParameterGradient, situation: Situation) -> None:
        self._gradient, self._situation = gradient, situation
        self._value: torch.Tensor = gradient.gradient.meta["val"]
        self._element = 8 if self._value.dtype == torch.float64 else 4
        self._weight = product(shape_of(self._value))
        self._later = gradient.name in situation.shared
        self._exchange: Exchange | None = None

    def all(self) -> list[tuple[Choice, Candidate]]:
        """See :func:`options_of`."""
        sites, mode = self._gradient.sites, self._situation.mode
        if sites[0].kind == "whole":
            cost = summed_cost(1, self._weight, self._element)
            return [self._option("whole", cost, "one example: the sum is its gradient")]
        found = exchange_of(self._gradient, self._situation)
        if found is None:
            forms = oriented(self._gradient, self._situation.batch)
            forms = bare(forms) if forms is not None and not self._later else forms
        else:
            self._exchange, forms = found
        if forms is None and any(s.form == "experts of ranks" for s in sites):
            no_gradient_of_one_example()
        if forms is None:
            why = "its sites are sums" if all(s.kind == "sum" for s in sites) else "through the tail"
            why = why if self._exchange is None else str(self._exchange)
            rule = "redo" if mode == "redo" and not self._later else "keep"
            cost = summed_cost(self._situation.batch, self._weight, self._element, fresh=True)
            kept = self._option(rule, cost, f"per-example gradients, {why}")
            return self._behind_tail(kept) or [kept]
        return self._of_products(forms)

    def _behind_tail(self, kept: tuple[Choice, Candidate]) -> list[tuple[Choice, Candidate]]:
        """The rules of a gradient behind a tail that works row by row; none, where it does not."""
        situation = self._situation
        found = None if self._exchange or self._later else mapped(self._gradient, situation.batch)
        if found is None:
            return []
        mode, shape = MODES[situation.mode], _together(found.forms, self._value, self._element, situation)
        fits = mode.wanted(*(hinted(n, situation.hints) for n in (shape.t, shape.p, shape.d)))
        if not ("ghost" in mode.rules and fits("ghost")):
            return []
        cost = mapped_cost(shape, situation.batch, found.bases)
        choice, candidate = self._option("ghost", cost, "", found.forms)
        ghost = replace(choice, mapped=found, patched=shape.patched), candidate
        if "keep" not in mode.rules:
            return [ghost]
        return [(replace(kept[0], why=""), kept[1]), ghost]

    def _of_products(self, forms: Sequence[Factored]) -> list[tuple[Choice, Candidate]]:
        situation = self._situation
        mode, hints = MODES[situation.mode], situation.hints
        shape = _together(forms, self._value, self._element, situation)
        allowed = {"outer"} if is_one(shape.t) else {"ghost"}
        allowed |= {"keep", "redo"} | ({"direct"} if all(f.one_hot is None for f in forms) else set())
        on_ranks = any(f.on_ranks for f in forms)
        if shape.head or on_ranks:  # anything else holds what its logits were taken apart for, or lies elsewhere
            allowed = {"ghost"}
        _, t, p, d = (hinted(n, hints) for n in (1, shape.t, shape.p, shape.d))
        fits = mode.wanted(t, p, d)
        wanted = [r for r in mode.rules if r in allowed and fits(r)] or [_fallback(mode, shape)]
        if self._exchange is not None:  # what was gathered is less than the gradients are
            wanted = [r for r in wanted if takes_positions(r, forms)] or wanted
        table = costs(shape, situation.batch, reuse=situation.reuse)
        if on_ranks:
            return [self._option("ghost", table["ghost"], "its rows are sent to other ranks", forms, shape)]
        if self._later:
            rule = "keep" if mode.rules == ("keep",) else "later"
            table["later"] = table["outer"]
            return [self._option(rule, table[rule], "other regions use it too", forms, shape)]
        forced = f"forced by norm={situation.mode!r}" if situation.mode != "auto" else ""
        found = [self._option(rule, table[rule], forced, forms, shape) for rule in wanted]
        if "keep" in wanted:  # of two that are equally quick the first is taken, unless it does not fit
            found.append(self._option("keep", table["keep"], forced, forms, shape, late=True))
        return found

    def _option(
        self,
        rule: str,
        cost: Cost,
        why: str,
        forms: Sequence[Factored] | None = None,
        shape: Shape | None = None,
        *,
        late: bool = False,
    ) -> tuple[Choice, Candidate]:
        """One rule; ``shape`` is that of ``forms`` together."""
        hints, rates = self._situation.hints, self._situation.rates
        grams: dict[Hashable, Cost] = {}
        panels = 1
        if rule == "ghost" and forms is not None and shape is not None:
            grams, panels = _grams(forms, shape, self._situation.batch), shape.panels
        total = sum(grams.values(), start=cost)
        exchange = self._exchange
        if exchange is not None and forms is not None and not takes_positions(rule, forms):
            exchange = added_up(self._gradient, self._situation)
        choice = Choice(
            self._gradient,
            rule,
            None if forms is None else tuple(forms),
            total,
            why,
            panels=panels,
            reuse=self._situation.reuse and rule == "keep",
            fused=shape is not None and self._is_fused(rule, shape),
            shared=self._later,
            late=late,
            exchange=exchange,
            patched=shape is not None and shape.patched,
        )
        held = _holding(choice, total.at(hints).memory, hints, self._element, self._weight)
        if late:
            held = replace(held, operands=_operands(choice, hints), since=())
        numbers = cost.at(hints)
        mapping = numbers.fresh / rates.fresh
        seconds = {key: gram.at(hints).seconds(rates) for key, gram in grams.items()}
        candidate = Candidate(rule, numbers.seconds(rates) - mapping, mapping, seconds, held)
        return replace(choice, holding=held), candidate

    def _is_fused(self, rule: str, shape: Shape) -> bool:
        fused, hints = self._situation.fused, self._situation.hints
        if fused is None or rule not in ("ghost", "direct") or shape.head:
            return False
        t, p, d = (hinted(n, hints) for n in (shape.t, shape.p, shape.d))
        return fused.faster(rule, t, p, d, self._value.dtype)


def _fallback(mode: Mode, shape: Shape) -> str:
    if not mode.drop:
        return "keep"
    return "ghost" if shape.head else "redo"


def is_patched(forms: Sequence[Factored], value: torch.Tensor, batch: Size, hints: Mapping[sympy.Symbol, int]) -> bool:
    """Whether the clipped sum of filters is made as a matrix product, of cotangents and patches, on CPUs.

    So it is where patches are no more than the filters: there they are little to copy.

    Args:
        forms: of the parameter's sites.
        value: its gradient.
        batch: B.
        hints: sizes of symbols.
    """
    if value.device.type != "cpu" or value.dtype != torch.float32:
        return False
    filters = all(f.site.form == "filters" and f.last is not None for f in forms)
    return filters and all(hinted(product([batch, f.sizes[1]]), hints) <= hinted(f.sizes[2], hints) for f in forms)


def _together(forms: Sequence[Factored], value: torch.Tensor, element: int, situation: Situation) -> Shape:
    hints = situation.hints
    k, _, p, d = forms[0].sizes
    if any(f.one_hot == "cols" for f in forms):
        p, d = d, p
    t = sum((f.sizes[1] for f in forms), start=0)  # type: ignore[misc]
    filled = min(f.filled for f in forms)
    products = [f for f in forms if f.one_hot is None]
    indexed = all(f.one_hot is not None for f in forms)
    copied: Size = sum((f.unfolded for f in forms), start=0)  # type: ignore[misc]
    if indexed and not has_sums_by_index(value.device, accumulation_dtype(value.dtype)):
        copied = product([t, d])
    return Shape(
        k, t, p, d, element,
        copied=copied,
        one_hot=any(f.one_hot is not None for f in forms),
        indexed=indexed,
        convolution=any(f.site.form == "filters" for f in forms),
        grouped=filled == 0 and any(f.each is not None for f in forms),
        filled=filled,
        alone=alone(forms) is not None,
        panels=panels_of(hinted(t, hints)),
        products=element == 4 and all(f.site.form == "product" for f in products),
        patched=is_patched(forms, value, situation.batch, hints),
        head=any(f.site.form == "head" for f in forms),
        narrow=all(o.meta["val"].dtype in NARROW for f in products for o in f.operands),
        multiplied=sum((f.sizes[1] for f in products), start=0),  # type: ignore[misc]
    )  # fmt: skip


def panels_of(positions: float) -> int:
    """Parts of a Gram matrix: as many as leave each part large enough for a product to run at full speed."""
    return 1 if positions < 64 else 2 if positions < 128 else 4 if positions < 1024 else 8


def _grams(forms: Sequence[Factored], shape: Shape, batch: Size) -> dict[Hashable, Cost]:
    """The two Gram matrices of a ghost norm, by what they are of; none, where sums by an index take their place."""
    if shape.indexed or shape.head:
        return {}
    _, _, p, d = forms[0].sizes
    operands = list(zip(*(f.operands for f in forms), strict=True))  # of all sites: first operands, second operands
    flipped = forms[0].flipped
    rows, cols = (operands[1], operands[0]) if flipped else (operands[0], operands[1])
    copied = sum((f.unfolded for f in forms), start=0)  # type: ignore[misc]
    kind = forms[0].site.kind
    return {
        (kind, rows, shape.panels): gram_cost(shape, batch, p, index=shape.one_hot, copied=0),
        (kind, cols, shape.panels): gram_cost(shape, batch, d, index=False, copied=copied),
    }


def _holding(choice: Choice, memory: float, hints: Mapping[sympy.Symbol, int], element: int, weight: Size) -> Holding:
    result = hinted(weight, hints) * element
    since = tuple(s.operation.name for s in choice.gradient.sites)
    operands = _operands(choice, hints) if choice.rule not in ("keep", "whole") else {}
    kept = memory if choice.rule == "keep" else 0.0
    return Holding(operands, since, kept, memory - kept, result)


def _operands(choice: Choice, hints: Mapping[sympy.Symbol, int]) -> dict[str, float]:
    forms = choice.forms
    if choice.rule != "keep" and forms is not None and all(f.one_hot is not None for f in forms):
        operands = (n for f in forms for n in f.operands)
    else:
        operands = (n for s in choice.gradient.sites for n in s.operands.values())
    return {n.name: bytes_of(n, hints) for n in map(storage_of, operands)}
