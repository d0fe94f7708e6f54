"""Compile time against batch and against depth."""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench
from benchmarks.experiments.common import cells, chosen, grid

TITLE = "Compile time against batch and depth"


def run(bench: Bench) -> dict[str, Any]:
    """Cold compilations of a language model (d = 128, T = 128)."""
    engines = chosen(bench, ("compiled", "ours", "ours_blocks", "vmap"))
    batches, depths = ((2,), (1, 2)) if bench.settings.quick else ((1, 2, 8, 32), (1, 2, 4, 8))
    small = "gpt:width=128,context=128,vocabulary=256"
    points = [f"{small},batch={b}" for b in batches] + [f"{small},depth={d}" for d in depths]
    return cells(bench, points, engines, ("compile",), "compile time")


def section(data: dict[str, Any]) -> str:
    """Seconds."""

    def show(cell: dict[str, Any]) -> str:
        return cell["compile"].get("error") or f"{cell['compile']['seconds']:.1f} s"

    return "Seconds of the first step, cold.\n\n" + grid(data, "model", show)
