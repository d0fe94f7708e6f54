"""Weights cut over one dimension of a mesh, tokens over another: launches of tests/workers/two_axes_worker.py."""

from __future__ import annotations

import pytest
from launching import launch, passed

pytestmark = pytest.mark.full  # launches of several ranks

FEW = {"gradients", "communication"}
REST = {"tokens over both", "training", "refusals", "by layer", "ghost", "regions", "inductor"}


def test_norms_over_ranks_that_share_layers_and_tokens() -> None:
    """Four ranks, against one backward per example."""
    assert passed(launch(4, "two_axes_worker.py", *FEW)) == FEW


@pytest.mark.slow
def test_options_over_ranks_that_share_layers_and_tokens() -> None:
    """Four ranks: sequence parallelism too, options, and what is refused."""
    assert passed(launch(4, "two_axes_worker.py", *REST)) == REST


@pytest.mark.slow
def test_they_go_with_fsdp() -> None:
    """Eight ranks, two by two by two."""
    few = {"gradients", "tokens over both", "training"}
    assert passed(launch(8, "two_axes_worker.py", *few)) == few
