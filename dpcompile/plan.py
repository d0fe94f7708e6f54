"""The choice: one rule for every parameter's sites, from their sizes, a mode and a memory budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch

from dpcompile.cost import Cost, Rates, Shape, costs, summed_cost
from dpcompile.norms.factors import Factored, oriented
from dpcompile.sites import ParameterGradient
from dpcompile.sizes import Size, is_one, product, shape_of

__all__ = ["Choice", "NORM_MODES", "Plan", "make_plan"]

NORM_MODES = ("auto", "ghost", "instantiate", "redo", "direct")
_FORCED = {"ghost": ("outer", "ghost"), "instantiate": ("keep",), "redo": ("redo",), "direct": ("direct",)}


@dataclass(frozen=True, slots=True)
class Choice:
    """The rule of one parameter.

    Attributes:
        gradient: the parameter's gradient and its sites.
        rule: "outer", "ghost", "keep" (instantiate and keep), "redo" (instantiate, drop, redo the product), "direct"
            (the same a tile at a time), "whole" (a batch of one).
        forms: the sites as outer products, in one orientation; None where they are not.
        cost: of the rule.
        why: in words.
        fused: whether rule "direct" or "ghost" is one operator, where there is one (:mod:`dpcompile.kernels.lowering`).
    """

    gradient: ParameterGradient
    rule: str
    forms: tuple[Factored, ...] | None
    cost: Cost
    why: str
    fused: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """Every parameter's rule; ``print(plan)`` shows a row per gradient site."""

    choices: tuple[Choice, ...]
    batch: Size
    hints: Mapping[sympy.Symbol, int]
    clipping: str
    untouched: tuple[str, ...] = ()

    def rules(self) -> dict[str, str]:
        """Parameter name -> rule."""
        return {c.gradient.name: c.rule for c in self.choices}

    def rows(self) -> list[dict[str, str]]:
        """One row per site: parameter, operation, B, T, p, d, rule, FLOPs, bytes, why."""
        rows = []
        for choice in self.choices:
            flops, _, memory = choice.cost.at(self.hints)
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
                        "FLOPs": _short(flops) if i == 0 else "″",
                        "bytes": _short(memory) if i == 0 else "″",
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
        return "\n".join(lines)


def make_plan(
    gradients: Sequence[ParameterGradient],
    *,
    batch: Size,
    mode: str,
    rates: Rates,
    hints: Mapping[sympy.Symbol, int],
    clipping: str,
    budget: float | None = None,
    untouched: Sequence[str] = (),
) -> Plan:
    """Choose a rule for every parameter.

    Args:
        gradients: what :func:`dpcompile.sites.find_gradients` found.
        batch: B.
        mode: "auto" takes the fastest rules that fit the budget; any other of :data:`NORM_MODES` forces one kind
            wherever it exists.
        rates: of the machine.
        hints: a value for every symbol.
        clipping: what to print.
        budget: bytes that all rules together may hold, or None.
        untouched: trainable parameters whose gradient is identically zero.
    """
    options = [_options(g, batch, mode, rates, hints) for g in gradients]
    chosen = [min(o, key=lambda c: _seconds(c.cost, rates, hints)) for o in options]
    if budget is not None:
        _fit(chosen, options, budget, rates, hints)
    return Plan(tuple(chosen), batch, dict(hints), clipping, tuple(untouched))


def _options(
    gradient: ParameterGradient, batch: Size, mode: str, rates: Rates, hints: Mapping[sympy.Symbol, int]
) -> list[Choice]:
    element = 8 if gradient.gradient.meta["val"].dtype == torch.float64 else 4
    weight = product(shape_of(gradient.gradient.meta["val"]))
    if gradient.sites[0].kind == "whole":
        return [
            Choice(gradient, "whole", None, summed_cost(1, weight, element), "one example: the sum is its gradient")
        ]
    forms = oriented(gradient, batch)
    plain = summed_cost(batch, weight, element)
    if forms is None:
        why = "its sites are sums" if all(s.kind == "sum" for s in gradient.sites) else "through the tail"
        rule = "redo" if mode == "redo" else "keep"
        return [Choice(gradient, rule, None, plain, f"per-example gradients, {why}")]
    table = costs(_together(forms, element), batch)
    t = sum((f.sizes[1] for f in forms), start=0)  # type: ignore[misc]
    allowed = {"outer"} if is_one(t) else {"ghost"}
    allowed |= {"keep", "redo"} | ({"direct"} if all(f.one_hot is None for f in forms) else set())
    wanted = [r for r in _FORCED.get(mode, tuple(table)) if r in allowed] or ["redo" if mode == "direct" else "keep"]
    times = {r: _seconds(table[r], rates, hints) for r in wanted}
    best = min(times, key=times.__getitem__)
    out = []
    for rule in wanted:
        why = f"forced by norm={mode!r}" if mode != "auto" else _reason(rule, best, times)
        out.append(Choice(gradient, rule, tuple(forms), table[rule], why))
    return out


def _together(forms: Sequence[Factored], element: int) -> Shape:
    k, _, p, d = forms[0].sizes
    t = sum((f.sizes[1] for f in forms), start=0)  # type: ignore[misc]
    unfolded = sum((f.unfolded for f in forms), start=0)  # type: ignore[misc]
    return Shape(k, t, p, d, element, unfolded)


def _reason(rule: str, best: str, times: Mapping[str, float]) -> str:
    if rule != best:
        return f"fits the memory budget ({best} is {times[rule] / max(times[best], 1e-30):.1f}x faster)"
    others = [(s, r) for r, s in times.items() if r != rule]
    if not others:
        return "the only rule"
    seconds, name = min(others)
    if not times[rule]:
        return "nothing to do"
    return f"{name} would cost {seconds / max(times[rule], 1e-30):.1f}x"


def _seconds(cost: Cost, rates: Rates, hints: Mapping[sympy.Symbol, int]) -> float:
    flops, traffic, _ = cost.at(hints)
    return flops / rates.flops + traffic / rates.traffic


def _fit(
    chosen: list[Choice],
    options: list[list[Choice]],
    budget: float,
    rates: Rates,
    hints: Mapping[sympy.Symbol, int],
) -> None:
    """Give up the least time per byte until the rules fit; if they cannot, the smallest ones stand, and say so."""

    def memory(choice: Choice) -> float:
        return choice.cost.at(hints)[2]

    while sum(map(memory, chosen)) > budget:
        moves = []
        for i, alternatives in enumerate(options):
            for other in alternatives:
                saved = memory(chosen[i]) - memory(other)
                if saved > 0:
                    slower = _seconds(other.cost, rates, hints) - _seconds(chosen[i].cost, rates, hints)
                    moves.append((slower / saved, i, other))
        if not moves:
            needed = sum(map(memory, chosen))
            chosen[:] = [replace(c, why=f"smallest; all rules need {_short(needed)}B, over budget") for c in chosen]
            return
        _, i, other = min(moves, key=lambda m: m[0])
        chosen[i] = other


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}P"
