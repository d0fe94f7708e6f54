"""Sequence parallelism: launches of tests/workers/sequence_worker.py."""

from __future__ import annotations

import pytest
from launching import launch, passed

pytestmark = pytest.mark.full  # launches of several ranks

FEW = {"regions", "communication", "refusals", "loss parallel, a mean"}
BOTH = {"GPT", "by layer", "a norm twice", "masked", "users", "frozen", "training", "loss parallel", "context"}
ALONE = {
    "loss in the model",
    "loss parallel, a mean",
    "loss parallel in blocks",
    "regions",
    "tied",
    "tied in blocks",
    "one example",
    "inductor",
    "communication",
    "exchanges",
    "refusals",
    "by Gram matrices in context",
}


def test_norms_of_what_is_cut_over_tokens() -> None:
    """Two ranks, against one backward per example; the rest of their checks is slow."""
    assert passed(launch(2, "sequence_worker.py", *FEW)) == FEW


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "checks"), [(2, BOTH | ALONE), (4, BOTH), (4, {"replicas"})])
def test_every_way_to_cut_tokens(ranks: int, checks: set[str]) -> None:
    """Two ranks: sequence parallelism alone. Four: with FSDP2, two by two; with replicas in a process of their own.

    Of two meshes in one process torch 2.13 may take the groups of the first.
    """
    assert passed(launch(ranks, "sequence_worker.py", *checks)) == checks
