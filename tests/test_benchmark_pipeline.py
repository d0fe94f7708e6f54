"""``python -m benchmarks.pipeline`` on two ranks, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.pipeline import launch, main, table

JOB = {"chunks": 4, "rows": 2, "tokens": 4, "width": 8, "blocks": 1, "repeats": 1, "backend": "eager"}


def test_the_table() -> None:
    said = {"seconds": 0.002, "idle": [0.25, 0.5], "held": [4, 4], "bytes": [2e6, 8e6]}
    plain = {"seconds": 0.001, "idle": [0.125, 0.5], "held": [None, None], "bytes": [0, 0], "predicted": said}
    private = {**plain, "held": [4, 3], "bytes": [1.5e6, 8e6]}
    text = table({**JOB, "schedule": "1F1B", "plain": plain, "private": private})
    assert "| plain | 1.0 (2.0) | 12% (25%), 50% (50%) | –, – |" in text
    assert "| 4 (4), 3 (4) | 1.5 (2.0), 8.0 (8.0) |" in text


def test_the_pages_prediction_is_what_the_command_prints(capsys: Any) -> None:
    main(["--equal-costs", "--ranks", "4", "--chunks", "32"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|") and "---" not in line]
    page = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    assert len(rows) == 8 and all(row in page for row in rows)


@pytest.mark.slow
def test_what_is_held_is_what_was_predicted() -> None:
    for schedule in ("1F1B", "Interleaved1F1B"):
        data = launch({**JOB, "schedule": schedule}, 2, 600)
        found = data["private"]
        assert found["held"] == list(found["predicted"]["held"]) and found["seconds"] > 0
        assert found["bytes"] == list(found["predicted"]["bytes"])
        assert all(0 < idle < 1 for idle in found["idle"])
