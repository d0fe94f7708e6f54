"""Python's share of a step: a model so small that nothing else remains."""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench
from benchmarks.experiments.common import cells, chosen
from benchmarks.markdown import markdown

TITLE = "Overhead of a step"


def run(bench: Bench) -> dict[str, Any]:
    """The MLP 4-8-3, batch 6."""
    return cells(bench, ["tiny"], chosen(bench, ("eager", "ours")), ("time",), "overhead")["tiny"]


def section(data: dict[str, Any]) -> str:
    """Milliseconds above the compiled non-private step."""
    rows = []
    for engine, cell in data.items():
        if "error" in cell:
            rows.append([engine, cell["error"], "", ""])
            continue
        mine, base = cell["times"], cell["baseline"]
        figures = (mine["median"], base["median"], mine["median"] - base["median"])
        rows.append([engine, *(f"{1e3 * x:.3f}" for x in figures)])
    return "MLP 4-8-3, batch 6; medians in milliseconds.\n\n" + markdown(
        ["engine", "engine's step", "non-private compiled step", "difference"], rows
    )
