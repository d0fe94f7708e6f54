"""Nothing but what is known waits for the device in a step: workers/waits_worker.py, on one that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from launching import TESTS

from dpcompile.kernels.handed import handed

# In docs/plan.md, with the reasons.
CHECK, WARNING = (
    "_local_scalar_dense in content.py, different",
    "_local_scalar_dense in delivery.py, warn_of_lost_examples",
)
KEPT = SETTLED = "nonzero in squares.py, settled_norms"
READS = {
    "item": {"_local_scalar_dense": 1},
    "float": {"_local_scalar_dense": 1},
    "bool": {"_local_scalar_dense": 1},
    "tolist": {"_local_scalar_dense": 5},
    "cpu": {"_to_copy": 1},
    "nonzero": {"nonzero": 1},
    "mask": {"index": 1},
    "equal": {"equal": 1},
    "blocking": {"_to_copy": 1},
    "nothing": {},
}


def told(*words: str) -> Mapping[str, Mapping[str, int]]:
    """What the worker prints."""
    path = os.pathsep.join([str(TESTS / "support"), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(TESTS / "workers" / "waits_worker.py"), *words]
    environment = {**os.environ, "PYTHONPATH": path, "DPCOMPILE_RATES": "typical"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_step_waits_where_it_is_known_to() -> None:
    """The linear layers and the convolution; each way of reading is seen, and one that is put into the loop."""
    found = told()
    assert {name.removeprefix("reads, "): n for name, n in found.items() if name.startswith("reads")} == READS
    assert found["instantiate"] == {CHECK: 1, WARNING: 1, KEPT: 3}
    assert found["ghost"] == {CHECK: 1, WARNING: 1, SETTLED: 2}
    assert found["inserted"] == {**found["instantiate"], "_local_scalar_dense in elsewhere": 1}


@pytest.mark.slow
def test_so_does_every_other_kind_of_step() -> None:
    found = told("all")
    assert found["redo"] == found["direct"] == {CHECK: 1, WARNING: 1, SETTLED: 3}
    assert found["accumulated"] == {CHECK: 2, WARNING: 2, KEPT: 6}
    assert found["per_layer"] == found["instantiate"] and set(found["auto"]) <= {CHECK, WARNING, KEPT, SETTLED}


def test_numbers_are_handed_over_as_they_are_now() -> None:
    """On the host they are the same tensor, as with ``to``."""
    numbers = torch.tensor([1.0, 2.0])
    assert handed(numbers, torch.device("cpu")) is numbers
    there = handed(numbers, torch.device("meta"))
    assert there.device.type == "meta" and there.shape == numbers.shape
