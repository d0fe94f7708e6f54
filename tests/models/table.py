"""What became of every model: a line for each, and how many were right, refused and wrong."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from models.case import Case

__all__ = ["dump", "load", "record", "render"]


@dataclasses.dataclass
class Line:
    """One model under all the rules it was run with; ``error`` is the largest of norms and clipped sums."""

    name: str
    reason: str = ""
    outcome: str = "right"
    sites: int = 0
    rules: Counter[str] = dataclasses.field(default_factory=Counter)
    error: float = 0.0


_LINES: dict[str, Line] = {}
_WORST = ("right", "refused", "wrong")


def record(case: Case, outcome: str, plan: Any = None, error: float = 0.0) -> None:
    """Note one run; a model is as good as its worst run. The rules shown are those of its first plan ("auto")."""
    line = _LINES.setdefault(case.id, Line(case.id, case.reason))
    line.outcome = max(line.outcome, outcome, key=_WORST.index)
    line.error = max(line.error, error)
    if plan is not None and not line.rules:
        line.rules = Counter(plan.rules().values())
        line.sites = len(plan.rows())


def dump() -> str:
    """What was recorded so far, for another process."""
    return json.dumps([dataclasses.asdict(line) for line in _LINES.values()])


def load(dumped: str) -> None:
    """Add what another process recorded."""
    for fields in json.loads(dumped):
        _LINES[fields["name"]] = Line(**{**fields, "rules": Counter(fields["rules"])})


def render(write: Callable[[str], Any]) -> None:
    """Write the table, family by family, and the summary; nothing if nothing was recorded."""
    if not _LINES:
        return
    rows = [("model", "sites", "rules", "max relative error")]
    for line in sorted(_LINES.values(), key=lambda x: x.name):
        rules = " ".join(f"{rule}:{count}" for rule, count in line.rules.most_common())
        verdict = f"{line.error:.1e}" if line.outcome == "right" else f"{line.outcome}: {line.reason}".rstrip(": ")
        rows.append((line.name, str(line.sites or ""), rules, verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        write(" · ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]))
    count = Counter(line.outcome for line in _LINES.values())
    write(", ".join(f"{count[outcome]} {outcome}" for outcome in _WORST))
