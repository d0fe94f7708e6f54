"""``python -m benchmarks.gpu``, rehearsed; and that a run that is cut short or fails still tells."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.record import Record

ROOT = pathlib.Path(__file__).parent.parent
MACHINE = {"gpu": None, "cpu": "a CPU", "versions": {"torch": "2"}}


def record(folder: pathlib.Path, seconds: float = 60.0) -> Record:
    return Record(folder, seconds, {"machine": MACHINE, "revision": "r", "rehearsal": True, "parts": {}})


def broken() -> dict[str, Any]:
    raise RuntimeError("no such kernel")


def test_a_step_that_raises_is_a_row_and_the_next_is_taken(tmp_path: pathlib.Path) -> None:
    own, seen = record(tmp_path), []

    def last() -> dict[str, Any]:
        seen.append(json.loads((tmp_path / "gpu.json").read_text())["parts"]["one"]["rows"])  # what is there already
        return {"right": True, "error of the sums": 1e-7}

    own.part("one", "One", 60.0, {"first": lambda: {"right": False}, "second": broken, "third": last})
    rows = json.loads((tmp_path / "gpu.json").read_text())["parts"]["one"]["rows"]
    assert [r["name"] for r in rows] == ["first", "second", "third"] and seen == [rows[:2]]
    assert rows[1]["error"] == "RuntimeError: no such kernel" and "in broken" in rows[1]["trace"]
    assert own.wrong == ["one: first", "one: second"]
    page = (tmp_path / "gpu.md").read_text()
    assert "# no GPU: a CPU" in page and "A rehearsal" in page and "| third | True |" in page
    assert "in broken" not in page


def test_no_step_begins_when_the_time_is_over(tmp_path: pathlib.Path) -> None:
    own = record(tmp_path, seconds=0.0)
    own.part("one", "One", 60.0, {"first": broken})
    assert own.data["parts"]["one"]["rows"] == [{"name": "first", "error": "not run: no time left"}]
    assert own.wrong == []


def test_a_part_that_cannot_be_made_is_told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.PARTS, "kernels", lambda small, options: broken())
    own = record(tmp_path)
    command._part(own, "kernels", True, {"device": "cpu"})
    assert own.wrong == ["kernels: preparation"]


def test_what_cannot_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--rehearse", "--parts", "kernels,none"])
    assert "there is no part none; there are kernels, noise" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            command.main([])
        assert "torch sees no GPU; --rehearse" in capsys.readouterr().err


def rehearsed(folder: pathlib.Path, *words: str) -> tuple[int, Any]:
    """Exit status, and the parts by name, of a run in a process of its own."""
    line = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--output", str(folder), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DPCOMPILE_RATES": "typical"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    data = json.loads((folder / "gpu.json").read_text())
    assert done.returncode == 2 or "## " in done.stdout, done.stderr[-3000:]
    return done.returncode, data


def test_a_rehearsal_of_noise(tmp_path: pathlib.Path) -> None:
    status, data = rehearsed(tmp_path, "--parts", "noise,waits")
    assert status == 0 and all(row["right"] for row in data["parts"]["noise"]["rows"])
    assert data["rehearsal"] and data["machine"]["gpu"] is None


@pytest.mark.slow
def test_a_rehearsal_of_everything(tmp_path: pathlib.Path) -> None:
    status, data = rehearsed(tmp_path, "--seconds", "1500")
    assert status == 0 and list(data["parts"]) == list(command.PARTS)
    kernels = data["parts"]["kernels"]["rows"]
    assert len(kernels) > 60 and all(row["right"] for row in kernels)
    assert len(data["parts"]["suite"]["rows"]) == 3 and len(data["parts"]["largest"]["rows"]) == 3


@pytest.mark.slow
def test_a_run_that_takes_too_long_is_cut(tmp_path: pathlib.Path) -> None:
    """In the middle of a step, too."""
    status, data = rehearsed(tmp_path, "--parts", "noise,speed", "--seconds", "25")
    assert status == 2 and data["cut"] and "noise" in data["parts"]
