"""Examples per second against the physical batch."""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench
from benchmarks.experiments.common import cells, chosen, grid

TITLE = "Throughput against physical batch"


def run(bench: Bench) -> dict[str, Any]:
    """A small vision transformer and an MLP."""
    engines = chosen(bench, ("compiled", "ours", "opacus_hooks", "opacus_ghost", "vmap", "fastdp"))
    batches = (1, 8) if bench.settings.quick else (1, 4, 16, 64)
    points = [f"{family}:batch={b}" for family in ("vit", "mlp") for b in batches]
    return cells(bench, points, engines, ("time",), "throughput")


def section(data: dict[str, Any]) -> str:
    """Examples per second."""

    def show(cell: dict[str, Any]) -> str:
        return f"{cell['batch'] / cell['times']['minimum']:.0f}/s ({cell['ratio']:.2f})"

    text = "Examples per second, and the time ratio at this batch. "
    return text + "`vit`: d = 192, 2 layers, T = 37; `mlp`: 3 layers of 512.\n\n" + grid(data, "model", show)
