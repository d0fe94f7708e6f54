"""The four end-to-end models of the Opacus paper: an epoch, and twenty with the compilation before them."""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench
from benchmarks.experiments.common import asked, cells, chosen, grid
from benchmarks.paper_models import DATASETS

TITLE = "The Opacus paper's models"
EPOCHS = 20  # as in the code of Subramani et al. 2020
_BATCHES = (16, 32, 64, 128, 256, 512, 1024, 2048)
# What a paper says, with its machine, where its text or code was read for it; nothing is quoted from memory.
PAPERS = (
    "Beside these: Subramani et al. 2020 (arXiv:2010.09063; a Titan V GPU, by the README of its code) has up to "
    "50-fold speed-ups of just-in-time compiled, vectorised DP-SGD over the best alternatives then, by its abstract. "
    "The seconds of each bar of its figures, and those of Yousefpour et al. 2021 (arXiv:2109.12298): not checked. The "
    "layers are those of the former's code, and a test asserts the numbers of parameters."
)
_SETTING = (
    "Synthetic data of the datasets' shapes and sizes (MNIST 60,000, CIFAR-10 50,000, IMDb 25,000 reviews of 256 "
    "words), float32. A step is the gradient step with noise and AdamW; answers are compared first. Median step, an "
    "epoch of such steps (not run in full: their number times the median), and the first, cold step.\n\n"
)


def run(bench: Bench) -> dict[str, Any]:
    """Every model with every batch, or what ``--models`` names of them, as ``opacus_mnist:batch=64``."""
    batches = _BATCHES[:1] if bench.settings.quick else _BATCHES
    points = asked(bench, DATASETS, (f"{name}:batch={b}" for name in DATASETS for b in batches))
    engines = chosen(bench, ("compiled", "ours", "opacus_hooks", "opacus_ghost"))
    return cells(bench, points, engines, ("time", "compile"), "the Opacus paper's models", update=True)


def epoch(point: str, cell: dict[str, Any]) -> float:
    """Seconds of a pass over the dataset, from the median step: the last batch counts as a whole one."""
    return -(-DATASETS[point.partition(":")[0]] // cell["batch"]) * cell["times"]["median"]


def cumulative(point: str, cell: dict[str, Any]) -> float:
    """Seconds of the compilation, if there is one, and :data:`EPOCHS` epochs."""
    return cell["compile"].get("seconds", 0.0) + EPOCHS * epoch(point, cell)


def section(data: dict[str, Any]) -> str:
    """A table of steps, epochs and compilations, and one of what all of it comes to."""
    timed = {
        point: {engine: {**cell, "point": point} for engine, cell in found.items()} for point, found in data.items()
    }

    def one(cell: dict[str, Any]) -> str:
        compiled = f", {cell['compile']['seconds']:.1f} s" if "seconds" in cell["compile"] else ""
        return f"{1e3 * cell['times']['median']:.2f} ms, {epoch(cell['point'], cell):.1f} s{compiled}"

    def all_of_it(cell: dict[str, Any]) -> str:
        base = data[cell["point"]].get("compiled", {})
        times = (
            ""
            if "error" in base or not base
            else f" ({cumulative(cell['point'], base) / cumulative(cell['point'], cell):.2f})"
        )
        return f"{cumulative(cell['point'], cell):.0f} s{times}"

    text = _SETTING + grid(timed, "model", one)
    text += f"\nThe first step and {EPOCHS} epochs, and the non-private compiled run's over it.\n\n"
    return text + grid(timed, "model", all_of_it) + f"\n{PAPERS}\n"
