"""The plan: one rule for every parameter's sites, the quickest that fit; printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy

from dpcompile.graph.sizes import Size, hinted, is_one, product, shape_of, short
from dpcompile.planning.choices import Choice, options_of
from dpcompile.planning.modes import MODES
from dpcompile.planning.search import Candidate, choose, fastest, seconds_of
from dpcompile.planning.situation import Situation
from dpcompile.proof.sites import ParameterGradient

__all__ = ["Plan", "Prediction", "make_plan"]


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
        machine: what to print of the machine that it is for, if it is not the one at hand.
    """

    choices: tuple[Choice, ...]
    batch: Size
    hints: Mapping[sympy.Symbol, int]
    clipping: str
    prediction: Prediction
    parts: int = 1
    untouched: tuple[str, ...] = ()
    second_backward: bool = False
    machine: str = ""

    def rules(self) -> dict[str, str]:
        """Parameter name -> rule."""
        return {c.gradient.name: c.rule for c in self.choices}

    def exchanged(self) -> float:
        """Bytes that each rank hands over before the clip, for gradients that are sums over ranks."""
        return float(sum(hinted(c.exchange.sent, self.hints) for c in self.choices if c.exchange is not None))

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
        if sums := [c.exchange for c in self.choices if c.exchange is not None]:
            gathered = sum(e.gathered for e in sums)
            lines.append(
                f"between ranks: {len(sums)} gradients are sums over them; before the clip each rank hands over "
                f"{short(self.exchanged())}B: rows and columns of {gathered}, every example's gradients of "
                f"{len(sums) - gathered}"
            )
        if self.parts > 1:
            lines.append(f"memory: the batch runs in {self.parts} parts of {self.batch}")
        if self.machine:
            lines.append(f"for {self.machine}: by its data sheet, nothing was measured")
        return "\n".join(lines)


def make_plan(gradients: Sequence[ParameterGradient], situation: Situation) -> Plan:
    """Choose a rule for every parameter.

    Args:
        gradients: what :func:`dpcompile.proof.sites.find_gradients` found.
        situation: what the choice depends on.
    """
    limit = situation.limit
    options = [options_of(g, situation) for g in gradients]
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
    expected = Prediction(situation.plain_seconds, extra)
    if limit is not None:
        extra += (outcome.parts - 1) / limit.seen * limit.overhead
        holdings = [o[i].holding for o, i in zip(candidates, outcome.picks, strict=True)]
        expected = Prediction(
            situation.plain_seconds * limit.seen,
            extra * limit.seen,
            limit.replay.plain_peak(limit.seen),
            limit.peak(holdings, outcome.parts),
        )
    return Plan(
        tuple(chosen),
        situation.batch,
        dict(situation.hints),
        situation.clipping,
        expected,
        outcome.parts,
        situation.untouched,
        MODES[situation.mode].second_backward,
        situation.machine,
    )


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
