"""A line that says what a wait is for: compilation, calibration, measurements, in so far as they take long.

It is there on a terminal, needs tqdm, and goes away at the end; ``DPCOMPILE_PROGRESS=1`` shows it elsewhere too,
``DPCOMPILE_PROGRESS=0`` nowhere.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["working"]

_DELAY = 2.0  # seconds before the line is there
_EVERY = 0.5
_under_way = threading.Lock()


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say so while the body runs, if it runs longer than a moment; of one within another the outer is told.

    Args:
        what: is done, as in "compiling a graph of 120 operations".
    """
    if not _wanted() or not _under_way.acquire(blocking=False):
        yield
        return
    over = threading.Event()
    teller = threading.Thread(target=_tell, args=(what, over), name="dpcompile progress", daemon=True)
    try:
        teller.start()
        yield
    finally:
        over.set()
        if teller.ident is not None:
            teller.join()
        _under_way.release()


def _wanted() -> bool:
    said = os.environ.get("DPCOMPILE_PROGRESS")
    if said is not None:
        return said != "0"
    with suppress(AttributeError, ValueError):  # no stderr, or one that is closed
        return sys.stderr.isatty()
    return False


def _tell(what: str, over: threading.Event) -> None:
    if over.wait(_DELAY):
        return
    with suppress(ImportError):
        bar = _line(what)
        while not over.wait(_EVERY):
            bar.refresh()
        bar.close()


def _line(what: str) -> Any:
    from tqdm import tqdm

    return tqdm(bar_format="dpcompile: {desc}, {elapsed} so far", desc=what, leave=False)
