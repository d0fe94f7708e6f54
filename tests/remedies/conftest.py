"""Writes the list of what is tried, when asked to."""

from __future__ import annotations

import os

import pytest
import remedies


def pytest_sessionfinish(session: pytest.Session) -> None:
    if "DPCOMPILE_LIST_REMEDIES" in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        remedies.write_list()
