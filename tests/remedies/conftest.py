"""Writes the list of what is tried, when asked to; and a process group of one rank."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import remedies
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if "DPCOMPILE_LIST_REMEDIES" in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        remedies.write_list()


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
