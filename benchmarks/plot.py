"""The ratios as a plot."""

from __future__ import annotations

import pathlib
from typing import Any

from benchmarks.engines import ENGINES

__all__ = ["draw"]


def draw(data: dict[str, Any], path: pathlib.Path) -> bool:
    """The time ratio of every engine, a panel per model; False if there is nothing to show."""
    models = {n: m for n, m in data["models"].items() if any("ratio" in e for e in m["engines"].values())}
    if not models:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [e for e in ENGINES if any("ratio" in m["engines"].get(e, {}) for m in models.values())]
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(1.2 + 2.6 * len(models), 0.8 + 0.32 * len(names)), sharey=True, squeeze=False
    )
    for panel, (model, known) in zip(panels[0], models.items(), strict=True):
        for row, name in enumerate(names):
            cell = known["engines"].get(name, {})
            if "ratio" in cell:
                panel.barh(row, cell["ratio"], color="tab:blue" if name.startswith("ours") else "tab:gray")
                panel.text(cell["ratio"], row, f" {cell['ratio']:.2f}", va="center", fontsize=7)
            elif "error" in cell:
                panel.text(0, row, f" {cell['error'][:22]}", va="center", fontsize=6)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(model, fontsize=9)
        panel.set_xlabel("time ratio", fontsize=8)
        panel.set_yticks(range(len(names)), [ENGINES[n].title for n in names], fontsize=8)
    panels[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
