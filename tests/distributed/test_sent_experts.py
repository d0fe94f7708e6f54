"""Experts on ranks that have batches of their own: launches of tests/workers/sent_worker.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import launch, passed

pytestmark = pytest.mark.full  # launches of several ranks

FEW = {"one backward each", "some nowhere", "few refusals"}
ALL = FEW | {
    "one expert", "capacity of an example", "twice", "transposed", "frozen", "by layer", "forced ghost",
    "forced instantiation", "inductor", "outliers", "users", "narrow", "checkpointed", "training", "loading", "resumed",
    "plain", "communication", "all refusals", "misplaced", "at other products",
}  # fmt: skip


def test_rows_are_sent_to_experts(tmp_path: Path) -> None:
    """Two ranks, against one backward per example; the rest of their checks is slow."""
    assert passed(launch(2, "sent_worker.py", str(tmp_path), *FEW)) == FEW


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_routing_and_option(ranks: int, tmp_path: Path) -> None:
    """Each rank holds other experts; on four also two by two, where each expert lies on two in parts."""
    both = {"two by two", "training, two by two", "resumed, two by two"} if ranks == 4 else set()
    assert passed(launch(ranks, "sent_worker.py", str(tmp_path))) == ALL | both
