"""What was measured on this machine: the least time of some runs, and figures that are kept on disk."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["place_of", "read", "seconds", "write"]


def seconds(run: Callable[[], object], device: torch.device, runs: int = 6) -> float:
    """The least time of ``runs`` calls, after one to warm up."""
    times = []
    for _ in range(runs + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


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
