"""The ratio that the chosen rules allow, at the speeds that were measured of this machine."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.bench import Bench
from benchmarks.engines import BASELINE, budget_for, make_engine
from benchmarks.engines.base import WithLoss
from benchmarks.experiments.common import each_model
from benchmarks.markdown import markdown
from benchmarks.measure import seconds_of
from benchmarks.problem import build
from dpcompile import dp_compile

TITLE = "What the rules allow"


def run(bench: Bench) -> dict[str, Any]:
    """A process per model."""
    return each_model(bench, "benchmarks.experiments.ceilings:bound", "ceilings")


def bound(*, repeats: int, **options: Any) -> dict[str, Any]:
    """The plain step's seconds, and what the plan's operations add to it; without a budget, and under the goals'."""
    problem = build(options["model"], batch=options["batch"], device=options["device"])
    plain = make_engine(BASELINE, problem.again(), **options)
    for _ in range(2):
        plain.step()
    found: dict[str, Any] = {"plain": min(seconds_of(plain.step) for _ in range(repeats))}
    for name, budget in (("free", None), ("budget", budget_for(options["model"]))):
        again = problem.again()
        model = WithLoss(again.model, again.case.loss)
        private: Any = dp_compile(model, memory_budget=budget, backend="eager")
        with torch.enable_grad():
            private.trace(again.inputs, again.targets)
        expected = private.plan.prediction
        found[name] = {"extra": expected.extra_seconds, "parts": private.plan.parts}
        if expected.peak is not None:
            found[name] |= {"peak": expected.peak / expected.plain_peak, "allowed": budget}
    return found


def section(data: dict[str, Any]) -> str:
    """A row per model."""
    rows = []
    for model, found in data.items():
        if "error" in found:
            rows.append([f"`{model}`", found["error"], *[""] * 6])
            continue
        row = [f"`{model}`", f"{1e3 * found['plain']:.1f}"]
        for name in ("free", "budget"):
            extra = found[name]["extra"]
            row += [f"{1e3 * extra:.1f}", f"{found['plain'] / (found['plain'] + extra):.2f}"]
        budget = found["budget"]
        rows.append([*row, f"{budget['peak']:.2f}× of {budget['allowed']:.2f}×", str(budget["parts"])])
    head = [
        "model",
        "plain, ms",
        "added, ms",
        "ratio at best",
        "under the budget, ms",
        "ratio at best",
        "peak",
        "parts",
    ]
    return (
        "The plain step as measured, and what the operations of the plan add to it by their FLOPs, bytes and calls, at "
        "the rates measured of this machine: products of many examples, of one example, convolutions, memory, fresh "
        "memory, kernels. The ratio is what is left if nothing else cost anything.\n\n" + markdown(head, rows)
    )
