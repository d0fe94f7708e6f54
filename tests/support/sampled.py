"""Whether this run is the sample that `pytest` takes without a path."""

import os

__all__ = ["SAMPLED", "VARIABLE"]

VARIABLE = "DPCOMPILE_TESTS_SAMPLED"  # set by `tests/conftest.py`
SAMPLED = os.environ.get(VARIABLE) == "1"
