"""Context parallelism by several ways of attention: launches of tests/workers/context_worker.py."""

from __future__ import annotations

import pytest
from launching import launch, passed

pytestmark = pytest.mark.full  # launches of several ranks

FEW = {"attention by_heads", "attention in_a_ring", "without logits, tied, 4", "communication", "refusals"}
REST = {
    "attention gathered", "attention by_dtensor", "without logits, tied, 32", "without logits, own, 4",
    "without logits, own, 32", "inductor", "ghost",
    "two meshes",
}  # fmt: skip


def test_norms_by_all_to_all_and_in_a_ring() -> None:
    """Two ranks, against one backward per example."""
    assert passed(launch(2, "context_worker.py", *FEW)) == FEW


@pytest.mark.slow
def test_other_ways_of_attention_and_heads_without_logits() -> None:
    assert passed(launch(2, "context_worker.py", *REST)) == REST
