"""The plan: one rule for every parameter's sites, from their sizes, a mode and a memory budget."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch

from dpcompile.graph.sizes import Size, hinted, is_one, product, shape_of
from dpcompile.graph.slices import accumulation_dtype
from dpcompile.kernels.fused_rates import FusedRates
from dpcompile.kernels.onednn import has_sums_by_index
from dpcompile.kernels.rates import Rates
from dpcompile.norms.factors import Factored, alone, oriented
from dpcompile.planning.cost import Cost, Shape, costs, gram_cost, summed_cost
from dpcompile.planning.modes import MODES, Mode
from dpcompile.planning.replay import Holding, bytes_of, storage_of
from dpcompile.planning.search import Candidate, Limit, choose, fastest, seconds_of
from dpcompile.proof.sites import ParameterGradient

__all__ = ["Choice", "Plan", "Prediction", "make_plan", "panels_of", "short"]


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


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the plan expects of a step (forward and backward).

    Attributes:
        plain_seconds: without privacy.
        extra_seconds: that privacy adds.
        plain_peak: bytes at the peak, without privacy; None if there is no budget, which alone asks for it.
        peak: the same with privacy.
    """

    plain_seconds: float
    extra_seconds: float
    plain_peak: float | None = None
    peak: float | None = None

    @property
    def seconds(self) -> float:
        """Of the private step."""
        return self.plain_seconds + self.extra_seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """Every parameter's rule; ``print(plan)`` shows a row per gradient site.

    Attributes:
        choices: one per parameter.
        batch: B, of one part.
        hints: a value for every symbol.
        clipping: what to print.
        prediction: of time and memory.
        parts: in how many parts the batch runs, one after the other.
        untouched: parameters whose gradient is zero for every example.
        second_backward: whether clipped sums come from a second backward (:mod:`dpcompile.rewriting.second_backward`).
    """

    choices: tuple[Choice, ...]
    batch: Size
    hints: Mapping[sympy.Symbol, int]
    clipping: str
    prediction: Prediction
    parts: int = 1
    untouched: tuple[str, ...] = ()
    second_backward: bool = False

    def rules(self) -> dict[str, str]:
        """Parameter name -> rule."""
        return {c.gradient.name: c.rule for c in self.choices}

    def rows(self) -> list[dict[str, str]]:
        """One row per site: parameter, operation, B, T, p, d, rule, FLOPs, bytes, why."""
        rows = []
        for choice in self.choices:
            numbers = choice.cost.at(self.hints)
            for i, site in enumerate(choice.gradient.sites):
                if choice.forms is not None:
                    k, t, p, d = choice.forms[i].sizes
                    p = product([k, p]) if not is_one(k) else p
                else:
                    shape = shape_of(site.value.meta["val"])
                    t, p, d = "", product(shape[:-1]), (shape[-1] if shape else 1)
                rows.append(
                    {
                        "parameter": choice.gradient.name,
                        "operation": site.kind,
                        "B": str(self.batch),
                        "T": str(t),
                        "p": str(p),
                        "d": str(d),
                        "rule": choice.rule,
                        "FLOPs": short(max(numbers.flops, 0)) if i == 0 else "″",
                        "bytes": short(numbers.memory) if i == 0 else "″",
                        "why": choice.why if i == 0 else f"with site 1 of {choice.gradient.name}",
                    }
                )
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        head = ["parameter", "operation", "B", "T", "p", "d", "rule", "FLOPs", "bytes", "why"]
        widths = {h: max([len(h), *(len(r[h]) for r in rows)]) for h in head}
        lines = ["  ".join(h.ljust(widths[h]) for h in head).rstrip()]
        lines += ["  ".join(r[h].ljust(widths[h]) for h in head).rstrip() for r in rows]
        lines += [f"{name}: its gradient is zero for every example" for name in self.untouched]
        lines.append(f"clipping: {self.clipping}; FLOPs and bytes are what privacy adds to the plain backward")
        expected = self.prediction
        extra = _milliseconds(abs(expected.extra_seconds))
        more = "of them for privacy" if expected.extra_seconds >= 0 else "less than without privacy (by its products)"
        lines.append(f"expected: {_milliseconds(expected.seconds)} a step, {extra} {more}")
        if expected.peak is not None and expected.plain_peak is not None:
            lines[-1] += (
                f"; peak {short(expected.peak)}B, {expected.peak / expected.plain_peak:.2f} of the plain step's"
            )
        if self.parts > 1:
            lines.append(f"memory: the batch runs in {self.parts} parts of {self.batch}")
        return "\n".join(lines)


def make_plan(
    gradients: Sequence[ParameterGradient],
    *,
    batch: Size,
    mode: str,
    rates: Rates,
    hints: Mapping[sympy.Symbol, int],
    clipping: str,
    plain_seconds: float,
    reuse: bool = False,
    fused: FusedRates | None = None,
    limit: Limit | None = None,
    untouched: Sequence[str] = (),
    shared: Collection[str] = (),
) -> Plan:
    """Choose a rule for every parameter.

    Args:
        gradients: what :func:`dpcompile.proof.sites.find_gradients` found.
        batch: B.
        mode: one of :data:`dpcompile.planning.modes.MODES`; "auto" takes the fastest rules that fit the limit.
        rates: of the machine.
        hints: a value for every symbol.
        clipping: what to print.
        plain_seconds: what the step takes without privacy.
        reuse: whether kept gradients may stay mapped from step to step.
        fused: where the fused operators of :mod:`dpcompile.kernels` are faster; None: nowhere.
        limit: of memory.
        untouched: trainable parameters whose gradient is identically zero.
        shared: parameters that other regions use too (:mod:`dpcompile.planning.shared_uses`).
    """
    options = [_options(g, batch, mode, rates, hints, reuse, fused, shared) for g in gradients]
    candidates = [[c for _, c in o] for o in options]
    outcome = choose(candidates, limit)
    free = fastest(candidates) if limit is not None else outcome.picks
    chosen = []
    for parameter, pick, quickest in zip(options, outcome.picks, free, strict=True):
        choice, _ = parameter[pick]
        if not choice.why:
            choice = replace(choice, why=_reason([c for _, c in parameter], pick, quickest))
        if not outcome.fits:
            choice = replace(choice, why=f"the smallest; over the memory budget ({choice.rule})")
        chosen.append(choice)
    seen = outcome.parts if limit is None else max(outcome.parts // limit.seen, 1)
    extra = seconds_of(candidates, outcome.picks, seen)
    expected = Prediction(plain_seconds, extra)
    if limit is not None:
        extra += (outcome.parts - 1) / limit.seen * limit.overhead
        holdings = [o[i].holding for o, i in zip(candidates, outcome.picks, strict=True)]
        peak = limit.peak(holdings, outcome.parts)
        expected = Prediction(plain_seconds * limit.seen, extra * limit.seen, limit.replay.plain_peak(limit.seen), peak)
    twice = MODES[mode].second_backward
    return Plan(tuple(chosen), batch, dict(hints), clipping, expected, outcome.parts, tuple(untouched), twice)


def _options(
    gradient: ParameterGradient,
    batch: Size,
    mode_name: str,
    rates: Rates,
    hints: Mapping[sympy.Symbol, int],
    reuse: bool,
    fused: FusedRates | None,
    shared: Collection[str],
) -> list[tuple[Choice, Candidate]]:
    mode = MODES[mode_name]
    value = gradient.gradient.meta["val"]
    element = 8 if value.dtype == torch.float64 else 4
    weight = product(shape_of(value))
    later = gradient.name in shared
    forced = f"forced by norm={mode_name!r}" if mode_name != "auto" else ""

    def option(
        rule: str, cost: Cost, why: str, forms: Sequence[Factored] | None = None, grams: Mapping[Hashable, Cost] = {},
        panels: int = 1, late: bool = False,
    ) -> tuple[Choice, Candidate]:  # fmt: skip
        own = reuse and rule == "keep"
        total = sum(grams.values(), start=cost)
        quick = (
            fused is not None
            and rule in ("ghost", "direct")
            and fused.faster(rule, hinted(shape.t, hints), hinted(shape.p, hints), hinted(shape.d, hints), value.dtype)
        )
        taken = None if forms is None else tuple(forms)
        choice = Choice(gradient, rule, taken, total, why, panels, own, quick, shared=later)
        seconds = {key: g.at(hints).seconds(rates) for key, g in grams.items()}
        held = _holding(choice, total.at(hints).memory, hints, element, weight)
        if late:
            held = replace(held, operands=_operands(choice, hints), since=())
        choice = replace(choice, holding=held, late=late)
        numbers = cost.at(hints)
        mapping = numbers.fresh / rates.fresh
        return choice, Candidate(rule, numbers.seconds(rates) - mapping, mapping, seconds, held)

    if gradient.sites[0].kind == "whole":
        return [option("whole", summed_cost(1, weight, element), "one example: the sum is its gradient")]
    forms = oriented(gradient, batch)
    if forms is None:
        why = "its sites are sums" if all(s.kind == "sum" for s in gradient.sites) else "through the tail"
        rule = "redo" if mode_name == "redo" and not later else "keep"
        return [option(rule, summed_cost(batch, weight, element, fresh=True), f"per-example gradients, {why}")]
    shape = _together(forms, value, element, hints)
    allowed = {"outer"} if is_one(shape.t) else {"ghost"}
    allowed |= {"keep", "redo"} | ({"direct"} if all(f.one_hot is None for f in forms) else set())
    _, t, p, d = (hinted(n, hints) for n in (1, shape.t, shape.p, shape.d))
    fits = mode.wanted(t, p, d)
    wanted = [r for r in mode.rules if r in allowed and fits(r)] or [_fallback(mode)]
    table = costs(shape, batch, reuse=reuse)
    if later:
        rule = "keep" if mode.rules == ("keep",) else "later"
        table["later"] = table["outer"]
        return [option(rule, table[rule], "other regions use it too", forms)]
    grams = _grams(forms, shape, batch)
    found = [
        option(r, table[r], forced, forms, grams if r == "ghost" else {}, shape.panels if r == "ghost" else 1)
        for r in wanted
    ]
    if "keep" in wanted:  # of two that are equally quick the first is taken, unless it does not fit
        found.append(option("keep", table["keep"], forced, forms, late=True))
    return found


def _fallback(mode: Mode) -> str:
    return "redo" if mode.drop else "keep"


def _together(forms: Sequence[Factored], value: torch.Tensor, element: int, hints: Mapping[sympy.Symbol, int]) -> Shape:
    k, _, p, d = forms[0].sizes
    if any(f.one_hot == "cols" for f in forms):
        p, d = d, p
    t = sum((f.sizes[1] for f in forms), start=0)  # type: ignore[misc]
    filled = min(f.filled for f in forms)
    indexed = all(f.one_hot is not None for f in forms)
    copied: Size = sum((f.unfolded for f in forms), start=0)  # type: ignore[misc]
    if indexed and not has_sums_by_index(value.device, accumulation_dtype(value.dtype)):
        copied = product([t, d])
    return Shape(
        k, t, p, d, element,
        copied=copied,
        one_hot=any(f.one_hot is not None for f in forms),
        indexed=indexed,
        convolution=any(f.site.kind == "convolution_backward" for f in forms),
        grouped=filled == 0 and any(f.each is not None for f in forms),
        filled=filled,
        alone=alone(forms) is not None,
        panels=panels_of(hinted(t, hints)),
        products=element == 4 and all(f.site.kind in ("mm", "bmm") and f.one_hot is None for f in forms),
    )  # fmt: skip


def panels_of(positions: float) -> int:
    """Parts of a Gram matrix: as many as leave each part large enough for a product to run at full speed."""
    return 1 if positions < 64 else 2 if positions < 128 else 4 if positions < 1024 else 8


def _grams(forms: Sequence[Factored], shape: Shape, batch: Size) -> dict[Hashable, Cost]:
    """The two Gram matrices of a ghost norm, by what they are of; none, where sums by an index take their place."""
    if shape.indexed:
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
    nodes = (storage_of(n) for s in choice.gradient.sites for n in s.operands.values())
    return {n.name: bytes_of(n, hints) for n in nodes}


def _reason(candidates: Sequence[Candidate], pick: int, quickest: int) -> str:
    def total(i: int) -> float:
        return candidates[i].time(1) + sum(candidates[i].grams.values())

    if candidates[pick].rule != candidates[quickest].rule:
        slower = _milliseconds(total(pick) - total(quickest))
        return f"fits the memory budget ({candidates[quickest].rule}: {slower} less)"
    others = [(total(i), c.rule) for i, c in enumerate(candidates) if c.rule != candidates[pick].rule]
    if not others:
        return "the only rule"
    seconds, name = min(others)
    return f"{_milliseconds(total(pick))}; {name} {_milliseconds(seconds)}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def short(number: float) -> str:
    """A number with three digits and a prefix."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}P"
