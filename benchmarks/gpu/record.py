"""What was found so far, as JSON and Markdown: written after every part, so that a run cut short still tells."""

from __future__ import annotations

import json
import os
import pathlib
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.markdown import markdown
from benchmarks.worker import describe

__all__ = ["Record"]


@dataclass(slots=True)
class Record:
    """One run.

    Attributes:
        folder: where ``gpu.json`` and ``gpu.md`` are written.
        seconds: what the whole run may take.
        data: machine, revision, and the parts: rows, seconds, and what went wrong.
    """

    folder: pathlib.Path
    seconds: float
    data: dict[str, Any]
    _start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self._start)

    def part(self, name: str, title: str, share: float, steps: Mapping[str, Callable[[], Mapping[str, Any]]]) -> None:
        """Take the steps of one part, each by itself: what one raises is its row, and the next is taken.

        Args:
            name: of the part.
            title: its heading.
            share: seconds after which no further step of it begins; nor does one when the run's time is over.
            steps: name -> what gives a row.
        """
        start, rows = time.monotonic(), []
        found = self.data["parts"].setdefault(name, {"title": title, "rows": rows})
        for step, take in steps.items():
            spent = time.monotonic() - start
            if spent > share or self.left <= 0:
                rows.append({"name": step, "error": "not run: no time left"})
                continue
            begun = time.monotonic()
            try:
                row = dict(take())
            except Exception as error:
                row = {"error": describe(error), "trace": traceback.format_exc()[-2000:]}
            rows.append({"name": step, **row, "seconds": round(time.monotonic() - begun, 2)})
            self.save()
        found["seconds"] = round(time.monotonic() - start, 2)
        self.save()

    @property
    def wrong(self) -> list[str]:
        """The steps that failed, or whose answer was wrong."""
        return [
            f"{name}: {row['name']}"
            for name, part in self.data["parts"].items()
            for row in part["rows"]
            if "trace" in row or row.get("right") is False
        ]

    def save(self) -> None:
        """Both files, each in one move."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("gpu.json", json.dumps(self.data, indent=1) + "\n"), ("gpu.md", self.page())):
            draft = self.folder / f"{name}.tmp"
            draft.write_text(text)
            os.replace(draft, self.folder / name)

    def page(self) -> str:
        """Markdown: what it ran on, and a table for each part."""
        machine = self.data["machine"]
        where = machine["gpu"] or f"no GPU: {machine['cpu']}"
        lines = [f"# {where}", ""]
        lines.append(", ".join(f"{k} {v}" for k, v in machine["versions"].items()) + f"; {self.data['revision']}")
        if self.data["rehearsal"]:
            lines += ["", "A rehearsal, of small sizes: its times say nothing."]
        for part in self.data["parts"].values():
            lines += ["", f"## {part['title']}", "", _table(part["rows"])]
        return "\n".join(lines) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = list(dict.fromkeys(k for row in rows for k in row if k != "trace"))
    return markdown(head, ([_cell(row.get(k)) for k in head] for row in rows)) if rows else "nothing yet\n"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
