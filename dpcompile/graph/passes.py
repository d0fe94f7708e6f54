"""Passes over a captured graph, run one after the other; what they did can be written down, and read.

``DPCOMPILE_TRACE=folder`` writes for every captured graph the graph before the first pass, after each pass that changed
it, and a table with what each pass took. ``DPCOMPILE_LINT=1`` checks after every pass that the graph is well formed.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import fx

from dpcompile.errors import DPCompileError

__all__ = ["Subject", "run_passes"]

_NUMBERS = itertools.count()


class Subject(Protocol):
    """What passes work on: a graph, and whatever they leave for each other."""

    module: fx.GraphModule


Work = TypeVar("Work", bound=Subject)


def run_passes(passes: Sequence[Callable[[Work], None]], work: Work) -> Work:
    """Run every pass on ``work``, in order.

    Args:
        passes: functions that change ``work``; their names and the first lines of their docstrings are what a trace
            says of them.
        work: see there.

    Returns:
        ``work``.

    Raises:
        DPCompileError: a pass refuses the model; or the folder of ``DPCOMPILE_TRACE`` cannot be written to.
    """
    record = _Record.begin(work.module)
    for step in passes:
        start = time.perf_counter()
        try:
            step(work)
        except DPCompileError as refusal:
            if record is not None:
                record.end(step, start, str(refusal))
            raise
        if os.environ.get("DPCOMPILE_LINT"):
            work.module.graph.lint()
        if record is not None:
            record.end(step, start)
    return work


@dataclass(slots=True)
class _Record:
    """What a run of passes leaves in a folder of its own."""

    folder: pathlib.Path
    module: fx.GraphModule
    text: str = ""
    count: int = 0

    @classmethod
    def begin(cls, module: fx.GraphModule) -> _Record | None:
        named = os.environ.get("DPCOMPILE_TRACE")
        if not named:
            return None
        folder = pathlib.Path(named) / f"{os.getpid()}-{next(_NUMBERS):03d}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise DPCompileError(
                f"DPCOMPILE_TRACE is {named!r}, where no folder can be made: {error}",
                remedy="set it to a folder that can be written to, or unset it",
            ) from error
        record = cls(folder, module)
        record._write("captured")
        record._note("pass", "ms", "graph", "what it does")
        return record

    def end(self, step: Callable[..., None], start: float, refusal: str = "") -> None:
        """A pass is over."""
        took = f"{(time.perf_counter() - start) * 1e3:.1f}"
        self.count += 1
        changed = self._write(step.__name__)
        says = (step.__doc__ or "").strip().partition("\n")[0]
        self._note(step.__name__, took, "changed" if changed else "", refusal or says)

    def _write(self, name: str) -> bool:
        """The graph as it is now, if it is another one than before; whether it is."""
        self.module.recompile()
        text = self.module.print_readable(print_output=False)
        changed = text != self.text
        if changed:
            (self.folder / f"{self.count:02d}-{name}.txt").write_text(text)
        self.text = text
        return changed

    def _note(self, name: str, took: str, changed: str, says: str) -> None:
        with (self.folder / "passes.txt").open("a") as file:
            file.write(f"{name:<24} {took:>9}  {changed:<7}  {says}\n".rstrip() + "\n")
