"""Python's share of a step: models so small that nothing else remains, of few parameters and of many."""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench
from benchmarks.experiments.common import cells, chosen
from benchmarks.markdown import markdown

TITLE = "Overhead of a step"
_MODELS = ("tiny", "gpt:width=32,context=8,vocabulary=64,depth=8,batch=2")


def run(bench: Bench) -> dict[str, Any]:
    """The MLP 4-8-3, batch 6, and a language model of eight narrow blocks."""
    models = _MODELS[:1] if bench.settings.quick else _MODELS
    return cells(bench, models, chosen(bench, ("eager", "ours")), ("time",), "overhead")


def section(data: dict[str, Any]) -> str:
    """Milliseconds above the compiled non-private step."""
    rows = []
    for model, found in data.items():
        for engine, cell in found.items():
            if "error" in cell:
                rows.append([f"`{model}`", engine, cell["error"], "", ""])
                continue
            mine, base = cell["times"], cell["baseline"]
            figures = (mine["median"], base["median"], mine["median"] - base["median"])
            rows.append([f"`{model}`", engine, *(f"{1e3 * x:.3f}" for x in figures)])
    return "`tiny`: MLP 4-8-3, batch 6; medians in milliseconds.\n\n" + markdown(
        ["model", "engine", "engine's step", "non-private compiled step", "difference"], rows
    )
