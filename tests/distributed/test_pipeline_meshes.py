"""Stages under FSDP2, tensor parallelism and both: launches of tests/workers/meshed_stages_worker.py."""

from __future__ import annotations

import pytest
from launching import launch, passed

CHECKS = {"InterleavedZeroBubble", "LoopedBFS", "DualPipeV", "a function", "not finite"}
KINDS = ["dp", "tp", "both"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_other_schedules_and_what_is_rare(kind: str) -> None:
    assert passed(launch(4, "meshed_stages_worker.py", kind, *CHECKS)) == CHECKS


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("check", "told"), [("late accident", "OSError: an accident"), ("killed", "SIGKILL")])
def test_a_rank_that_fails_ends_all(check: str, told: str, kind: str) -> None:
    done = launch(4, "meshed_stages_worker.py", kind, check, timeout=240)
    assert done.returncode != 0 and told in done.stderr and "passed" not in done.stdout
