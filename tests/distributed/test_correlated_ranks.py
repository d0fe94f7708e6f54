"""Correlated noise on gloo ranks: tests/workers/correlated_worker.py, on one rank and then on two."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import launch, passed

pytestmark = pytest.mark.full  # launches of several ranks


def test_any_number_of_ranks_comes_to_the_same(tmp_path: Path) -> None:
    """Weights after steps of shards and of replicas, and of runs that one rank saved and two resumed."""
    for world in (1, 2):
        assert passed(launch(world, "correlated_worker.py", str(tmp_path))) == {"bands", "buffers", "tree"}


@pytest.mark.slow
def test_four_ranks_come_to_the_same(tmp_path: Path) -> None:
    for world in (1, 4):
        assert passed(launch(world, "correlated_worker.py", str(tmp_path))) == {"bands", "buffers", "tree"}
