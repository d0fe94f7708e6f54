"""Cost in B, T, d and depth: whether the ratio stays flat."""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench
from benchmarks.experiments.common import cells, chosen, grid, ratio

TITLE = "Cost in batch, length, width and depth"
_CURVES = {
    "batch": (2, 4, 8, 16, 32),
    "context": (64, 128, 256, 512, 1024),
    "width": (64, 128, 256, 512),
    "depth": (1, 2, 4, 8),
}


def run(bench: Bench) -> dict[str, Any]:
    """A language model (d = 256, 2 layers, T = 256, V = 1024, batch 4) with one size changed at a time."""
    engines = chosen(bench, ("compiled", "ours", "ours_budget"))
    found = {}
    for size, values in _CURVES.items():
        values = values[:2] if bench.settings.quick else values
        found[size] = cells(bench, [f"gpt:{size}={v}" for v in values], engines, ("time", "memory"), f"curve in {size}")
    return found


def section(data: dict[str, Any]) -> str:
    """A table per size."""
    text = "A language model (d = 256, 2 layers, T = 256, V = 1024, batch 4), one size changed at a time: time ratio, "
    text += "milliseconds of a step, and megabytes at the peak.\n"

    def show(cell: dict[str, Any]) -> str:
        allocated = cell.get("memory", {}).get("allocated")
        return ratio(cell) + (f", {allocated / 1e6:.0f} MB" if allocated else "")

    for size, points in data.items():
        text += "\n" + grid(points, size, show)
    return text
