"""Experiments beside the main table: each module has ``TITLE``, ``run(bench) -> data`` and ``section(data) -> text``.

``data`` goes into the JSON as it is, ``section`` makes Markdown of it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["EXPERIMENTS", "experiment"]

EXPERIMENTS = ()


def experiment(name: str) -> ModuleType:
    """The module of an experiment.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"there is no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    return importlib.import_module(f"benchmarks.experiments.{name}")
