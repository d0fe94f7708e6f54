"""What several experiments do: models of many sizes against a few engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tqdm import tqdm

from benchmarks.bench import Bench
from benchmarks.engines import BASELINE, ENGINES
from benchmarks.markdown import markdown

__all__ = ["asked", "chosen", "cells", "each_model", "grid", "ratio", "title"]


def chosen(bench: Bench, default: Sequence[str]) -> list[str]:
    """The engines of an experiment: those of the default that the command line does not leave out."""
    return [e for e in default if e in bench.settings.engines]


def cells(
    bench: Bench,
    points: Iterable[str],
    engines: Sequence[str],
    parts: Sequence[str],
    what: str,
    *,
    update: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measure every engine on every model.

    Args:
        bench: the run.
        points: models by name.
        engines: by name.
        parts: "time", "memory", "compile".
        what: for the progress bar.
        update: times are those of whole training steps, with noise and optimizer.

    Returns:
        Model -> engine -> what :meth:`benchmarks.bench.Bench.cell` gives.
    """
    wanted = [(point, engine) for point in points for engine in engines]
    found: dict[str, dict[str, Any]] = {}
    for point, engine in tqdm(wanted, desc=what, unit="cell", disable=bench.shop.inline):
        found.setdefault(point, {})[engine] = bench.cell(point, engine, parts, update=update)
    return found


def each_model(bench: Bench, function: str, what: str) -> dict[str, Any]:
    """Run a function in a process of its own for every model.

    Args:
        bench: the run.
        function: ``module:name``; it is given ``repeats`` and the settings' options for the model.
        what: for the progress bar.

    Returns:
        Model -> what the function returns.
    """
    found = {}
    for model in tqdm(bench.settings.models, desc=what, unit="model", disable=bench.shop.inline):
        found[model] = bench.shop.run(function, {"repeats": bench.settings.repeats} | bench.settings.options(model))
    return found


def asked(bench: Bench, families: Iterable[str], default: Iterable[str]) -> list[str]:
    """The points of an experiment: models of its families that the command line names, else the default."""
    known = tuple(families)
    return [m for m in bench.settings.models if m.partition(":")[0] in known] or list(default)


def grid(data: dict[str, dict[str, Any]], first: str, show: Callable[[dict[str, Any]], str]) -> str:
    """A row per point, a column per engine."""
    engines = list(next(iter(data.values())))
    rows = [[point, *(cell.get("error") or show(cell) for cell in found.values())] for point, found in data.items()]
    return markdown([first, *(title(e) for e in engines)], rows)


def ratio(cell: dict[str, Any]) -> str:
    """Time ratio and milliseconds."""
    return f"{cell['ratio']:.2f} ({1e3 * cell['times']['minimum']:.1f} ms)"


def title(engine: str) -> str:
    """What tables call an engine."""
    return ENGINES[engine].title if engine != BASELINE else "non-private, compiled"
