"""Experiments beside the main table: each module has ``TITLE``, ``run(bench) -> data`` and ``section(data) -> text``.

``data`` goes into the JSON as it is, ``section`` makes Markdown of it. The section breakdown is part of the main table.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

__all__ = ["EXPERIMENTS", "experiment"]

_PLACES = {
    name: f"benchmarks.experiments.{name}"
    for name in (
        "curves", "throughput", "max_batch", "compile_curves", "precision", "recompiles", "overhead", "prediction",
        "ceilings", "layers", "opacus_models", "vision_models",
    )
}  # fmt: skip
_PLACES["optimizer"] = "benchmarks.optimizer"  # the optimizer step with noise, where that module is there
EXPERIMENTS = tuple(n for n, place in _PLACES.items() if importlib.util.find_spec(place) is not None)


def experiment(name: str) -> ModuleType:
    """The module of an experiment.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"there is no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    return importlib.import_module(_PLACES[name])
