"""What was measured on this machine: the least times of runs, and figures that are kept on disk."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Stopwatch", "place_of", "read", "write"]


_AGREEING, _WITHIN = 3, 1.1  # so many of the quickest runs differ by no more than this factor
_LEAST, _MOST = 6, 200  # runs
_PATIENCE = 0.5  # seconds


class Stopwatch:
    """Times of runs, each the least of as many as it takes.

    Other programs make a run longer, never shorter: so the least time is the machine's, once some runs agree on it. A
    busy machine may leave none that do.

    Attributes:
        busy: whether there was something whose quickest runs did not agree within :data:`_PATIENCE`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.busy = False

    def seconds(self, run: Callable[[], object], device: torch.device) -> float:
        """The least time of a call, after one to warm up."""
        self._time(run, device)
        times: list[float] = []
        while len(times) < _LEAST or not _agree(times):
            if len(times) >= _LEAST and (len(times) >= _MOST or sum(times) >= _PATIENCE):
                self.busy = True
                break
            times.append(self._time(run, device))
        return min(times)

    def _time(self, run: Callable[[], object], device: torch.device) -> float:
        _wait(device)
        start = self._clock()
        run()
        _wait(device)
        return self._clock() - start


def _agree(times: list[float]) -> bool:
    quickest = sorted(times)[:_AGREEING]
    return quickest[-1] <= _WITHIN * quickest[0]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def place_of(name: str) -> pathlib.Path:
    """Where figures of this name are kept: in ``$XDG_CACHE_HOME/dpcompile`` or ``~/.cache/dpcompile``."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "dpcompile" / f"{name}.json"


def read(place: pathlib.Path) -> dict[str, Any]:
    """What a file says: one entry for each machine and setting. A file that cannot be read says nothing."""
    try:
        stored = json.loads(place.read_text())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def write(place: pathlib.Path, name: str, entry: object) -> None:
    """Add an entry, whole or not at all: other processes may write the same.

    Where the file cannot be written, the next process measures again.
    """
    text = json.dumps({**read(place), name: entry}, indent=1)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as draft:
            draft.write(text)
        pathlib.Path(draft.name).replace(place)
    except OSError:
        return
