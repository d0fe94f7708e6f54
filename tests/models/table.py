"""What became of every model: a line for each, and how many were right, refused, wrong, and crashed."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from models.case import Case

__all__ = ["add", "line", "render"]


@dataclasses.dataclass
class Line:
    """One model under all the rules it was run with; ``error`` is the largest of norms and clipped sums."""

    name: str
    reason: str = ""
    outcome: str = "right"
    sites: int = 0
    rules: dict[str, int] = dataclasses.field(default_factory=dict)
    error: float = 0.0


_LINES: dict[str, Line] = {}
_WORST = ("right", "refused", "wrong", "crashed")


def line(case: Case, outcome: str, plan: Any = None, error: float = 0.0) -> str:
    """What one run came to, as text that can travel between processes."""
    rules = plan.rules().values() if plan is not None else ()
    sites = len(plan.rows()) if plan is not None else 0
    return json.dumps(dataclasses.asdict(Line(case.id, case.reason, outcome, sites, dict(Counter(rules)), error)))


def add(text: str) -> None:
    """Note one run; a model is as good as its worst run. The rules shown are those of its first plan ("auto")."""
    new = Line(**json.loads(text))
    found = _LINES.setdefault(new.name, new)
    found.outcome = max(found.outcome, new.outcome, key=_WORST.index)
    found.error = max(found.error, new.error)
    if not found.rules:
        found.rules, found.sites = new.rules, new.sites


def render(write: Callable[[str], Any]) -> None:
    """Write the table, family by family, and the summary; nothing if nothing was recorded."""
    if not _LINES:
        return
    rows = [("model", "sites", "rules", "max relative error")]
    for found in sorted(_LINES.values(), key=lambda x: x.name):
        rules = " ".join(f"{rule}:{count}" for rule, count in Counter(found.rules).most_common())
        verdict = f"{found.error:.1e}" if found.outcome == "right" else f"{found.outcome}: {found.reason}".rstrip(": ")
        rows.append((found.name, str(found.sites or ""), rules, verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        write(" · ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]))
    count = Counter(line.outcome for line in _LINES.values())
    write(", ".join(f"{count[outcome]} {outcome}" for outcome in _WORST))
