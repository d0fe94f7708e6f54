"""Time and memory factor of single layers over batch sizes."""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench
from benchmarks.experiments.common import cells, chosen, grid
from benchmarks.layer_models import LAYERS

TITLE = "Single layers"


def run(bench: Bench) -> dict[str, Any]:
    """Every layer with every batch."""
    engines = chosen(bench, ("compiled", "ours", "opacus_hooks", "opacus_functorch", "vmap"))
    batches = (8,) if bench.settings.quick else (16, 128)
    points = [f"{layer}:batch={b}" for layer in LAYERS for b in batches]
    return cells(bench, points, engines, ("time", "memory"), "layers")


def section(data: dict[str, Any]) -> str:
    """Factors over the compiled non-private step: more is worse."""
    text = "Factors of time and of peak memory over the compiled non-private step of the same layer (1 is free).\n"
    base = {point: found.get("compiled", {}).get("memory", {}).get("allocated") for point, found in data.items()}
    table = {
        point: {e: cell | {"base": base[point]} for e, cell in found.items() if e != "compiled"}
        for point, found in data.items()
    }

    def show(cell: dict[str, Any]) -> str:
        allocated = cell.get("memory", {}).get("allocated")
        memory = f", {allocated / cell['base']:.2f}×" if allocated and cell["base"] else ""
        return f"{1 / cell['ratio']:.2f}×{memory}"

    return text + "\n" + grid(table, "layer", show)
