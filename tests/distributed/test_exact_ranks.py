"""Exact noise on gloo ranks: tests/workers/exact_worker.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import launch, passed

pytestmark = pytest.mark.full  # launches of several ranks

CHECKS = {"a step", "order", "what does not fit", "micro-batches", "resuming", "grids apart", "refused"}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_replicas_add_up_integers(world: int, tmp_path: Path) -> None:
    assert passed(launch(world, "exact_worker.py", str(tmp_path))) == CHECKS
