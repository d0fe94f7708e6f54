"""What the planner predicts against what is measured."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from benchmarks.bench import Bench
from benchmarks.engines import BASELINE, make_engine
from benchmarks.markdown import markdown
from benchmarks.measure import interleaved
from benchmarks.problem import build

TITLE = "Prediction against measurement"


def run(bench: Bench) -> dict[str, Any]:
    """A process per model."""
    found = {}
    for model in tqdm(bench.settings.models, desc="prediction", unit="model", disable=bench.shop.inline):
        arguments = {"repeats": bench.settings.repeats} | bench.settings.options(model)
        found[model] = bench.shop.run("benchmarks.experiments.prediction:compare", arguments)
    return found


def compare(*, repeats: int, **options: Any) -> dict[str, Any]:
    """Predicted and measured seconds that privacy adds to a step.

    Returns:
        ``predicted`` (None while plans predict nothing), ``measured`` and ``plain`` (the non-private step).
    """
    problem = build(options["model"], batch=options["batch"], device=options["device"])
    ours, plain = (make_engine(e, problem.again(), **options) for e in ("ours", BASELINE))
    for _ in range(2):
        ours.step()
        plain.step()
    mine, base = interleaved([ours.step, plain.step], repeats=repeats)
    return {"predicted": predicted_seconds(ours.calls.plan), "measured": min(mine) - min(base), "plain": min(base)}


def predicted_seconds(plan: Any) -> float | None:
    """The plan's own prediction of what privacy adds, in seconds; None if plans do not have one."""
    predict: Any = getattr(plan, "predicted_seconds", None)
    return None if predict is None else float(predict())


def section(data: dict[str, Any]) -> str:
    """A row per model."""
    rows = []
    for model, found in data.items():
        if "error" in found:
            rows.append([f"`{model}`", found["error"], "", "", ""])
            continue
        predicted, measured, plain = found["predicted"], found["measured"], found["plain"]
        off = "" if predicted is None else f"{(plain + predicted) / (plain + measured) - 1:+.0%}"
        said = "none" if predicted is None else f"{1e3 * predicted:.1f}"
        rows.append([f"`{model}`", f"{1e3 * plain:.1f}", said, f"{1e3 * measured:.1f}", off])
    head = ["model", "non-private step", "privacy adds, predicted", "privacy adds, measured", "whole step off by"]
    return "Milliseconds.\n\n" + markdown(head, rows)
