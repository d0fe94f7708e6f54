"""The ratios as a plot."""

from __future__ import annotations

import math
import pathlib
from typing import Any

from benchmarks.engines import ENGINES

__all__ = ["draw", "has_ratios"]

_COLUMNS = 4


def has_ratios(data: dict[str, Any]) -> bool:
    """Whether there is anything to draw."""
    return bool(_timed(data))


def draw(data: dict[str, Any], path: pathlib.Path) -> None:
    """Time ratios, a panel per model and a bar per engine; the file's ending says in which format."""
    models = _timed(data)
    if not models:
        return
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same figures, the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    names = [e for e in ENGINES if any(e in m["engines"] for m in models.values())]
    columns, rows = min(_COLUMNS, len(models)), math.ceil(len(models) / _COLUMNS)
    size = (2.0 + 2.4 * columns, rows * (0.7 + 0.24 * len(names)))
    figure, panels = pyplot.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(models) :]:
        panel.set_visible(False)
    for panel, (model, known) in zip(panels.flat, models.items(), strict=False):
        for row, name in enumerate(names):
            cell = known["engines"].get(name, {})
            if "ratio" in cell:
                panel.barh(row, cell["ratio"], color="tab:blue" if name.startswith("ours") else "tab:gray")
                panel.text(cell["ratio"], row, f" {cell['ratio']:.2f}", va="center", fontsize=7)
            elif "error" in cell:
                panel.text(0, row, f" {cell['error'].split(':')[0][:24]}", va="center", fontsize=6)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(model, fontsize=9)
        panel.set_yticks(range(len(names)), [ENGINES[n].title for n in names], fontsize=8)
    panels[0][0].invert_yaxis()
    figure.suptitle("time of the compiled non-private step over the engine's (1: privacy is free)", fontsize=9)
    figure.tight_layout()
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=110, metadata=metadata)
    pyplot.close(figure)


def _timed(data: dict[str, Any]) -> dict[str, Any]:
    return {n: m for n, m in data["models"].items() if any("ratio" in e for e in m["engines"].values())}
