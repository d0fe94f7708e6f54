"""What the planner predicts against what is measured."""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench
from benchmarks.engines import BASELINE, make_engine
from benchmarks.experiments.common import each_model
from benchmarks.markdown import markdown
from benchmarks.measure import interleaved
from benchmarks.problem import build

TITLE = "Prediction against measurement"


def run(bench: Bench) -> dict[str, Any]:
    """A process per model."""
    return each_model(bench, "benchmarks.experiments.prediction:compare", "prediction")


def compare(*, repeats: int, **options: Any) -> dict[str, Any]:
    """Seconds of a step, predicted and measured, private and not.

    The prediction covers the model's graph; the loss is outside of it and inside of what is measured.
    """
    problem = build(options["model"], batch=options["batch"], device=options["device"])
    ours, plain = (make_engine(e, problem.again(), **options) for e in ("ours", BASELINE))
    for _ in range(2):
        ours.step()
        plain.step()
    mine, base = interleaved([ours.step, plain.step], repeats=repeats)
    expected = ours.calls.plan.prediction
    return {
        "plain": min(base),
        "private": min(mine),
        "plain_predicted": expected.plain_seconds,
        "private_predicted": expected.seconds,
    }


def section(data: dict[str, Any]) -> str:
    """A row per model."""
    rows = []
    for model, found in data.items():
        if "error" in found:
            rows.append([f"`{model}`", found["error"], *[""] * 5])
            continue
        row = [f"`{model}`"]
        for name in ("plain", "private"):
            measured, predicted = found[name], found[f"{name}_predicted"]
            row += [f"{1e3 * predicted:.1f}", f"{1e3 * measured:.1f}", f"{predicted / measured - 1:+.0%}"]
        rows.append(row)
    head = ["model", "non-private, predicted", "measured", "off by", "private, predicted", "measured", "off by"]
    return "Milliseconds of a step.\n\n" + markdown(head, rows)
