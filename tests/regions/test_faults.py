"""Ranks that fail: one launch of tests/workers/faults_worker.py, which torchrun restarts after every fault."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launching import launch

pytestmark = pytest.mark.full  # a launch of several ranks


def test_faults_end_every_rank_and_the_last_checkpoint_goes_on(tmp_path: Path) -> None:
    """Errors in forward, backward and data, and a rank that is killed; no attempt hangs."""
    done = launch(2, "faults_worker.py", str(tmp_path), options=("--max-restarts", "4", "--monitor-interval", "0.1"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "passed: resumed, caught" in done.stdout
    for error in (
        "RuntimeError: a fault in forward",
        "RuntimeError: a fault in backward",
        "OSError: row",
        "(exitcode: -9) local_rank: 1",
    ):
        assert error in done.stderr, error
    ended = re.findall(r"failed \(exitcode: (-?\d+)\) local_rank: \d", done.stderr)
    # Which rank torchrun sees first is chance: the one that raised, or another, which fails as its peer is gone.
    assert len(ended) == 4 and not {"0", "-11"} & set(ended), ended
