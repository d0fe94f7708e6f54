"""Compile caches on disk: what one process left there must never be another's clipped gradient."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from dpcompile import dp_compile

PROGRAM = """
import json, sys, torch
from torch import nn
from dpcompile import dp_compile

torch.set_num_threads(1)
results = []
for options in json.loads(sys.argv[1]):
    if "factor" in options:
        options["clipping"] = lambda norms, factor=options.pop("factor"): factor / norms
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    private = torch.compile(model) if options.pop("plain", False) else dp_compile(model, **options)
    private(torch.randn(5, 4)).square().sum(1).mean().backward()
    if not hasattr(private, "grad_norms"):
        continue
    results.append({
        "norms": private.grad_norms.tolist(),
        "sums": {n: p.grad.tolist() for n, p in model.named_parameters()},
        "hits": torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"],
        "rules": private.plan.rules(),
    })
print(json.dumps(results))
"""


def run(directory: pathlib.Path, *options: dict, variables: dict | None = None) -> list[dict]:
    """A process of its own on a shared cache directory: one model for each set of options."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(directory),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
        **(variables or {}),
    }
    arguments = [sys.executable, "-c", PROGRAM, json.dumps(options)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else []


def eager(**options: Any) -> dict[str, Any]:
    """The same here, without Inductor and its caches."""
    if "factor" in options:
        factor = options.pop("factor")
        options["clipping"] = lambda norms: factor / norms
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    private: Any = dp_compile(model, backend="eager", **options)
    private(torch.randn(5, 4)).square().sum(1).mean().backward()
    sums = {n: p.grad.tolist() for n, p in model.named_parameters() if p.grad is not None}
    return {"norms": private.grad_norms.tolist(), "sums": sums, "rules": private.plan.rules()}


def close(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-4, abs=1e-6)


AUTOGRAD = {"TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
CHANGES: list[dict[str, Any]] = [
    {"max_grad_norm": 0.05},
    {"clipping": "automatic"},
    {"norm": "instantiate"},
    {"loss_reduction": "sum"},
    {"factor": 0.1},
    {"factor": 0.01},
]


@pytest.mark.full  # a process for every option
def test_options_changed_between_processes(tmp_path: pathlib.Path) -> None:
    """One shared cache, one option changed at a time: the numbers of an eager run, every time.

    The first process leaves the graphs of the plain model there too.
    """
    (first,) = run(tmp_path, {"plain": True}, {})
    again, *others = run(tmp_path, {}, *CHANGES)
    for found, change in zip((first, again, *others), ({}, {}, *CHANGES), strict=True):
        wanted = eager(**change)
        assert close(found["sums"], wanted["sums"]) and close(found["norms"], wanted["norms"]), change
        assert found["rules"] == wanted["rules"]
        assert (found["hits"] > 0) == (found is again), f"{change}: {found['hits']} graphs from the cache"


@pytest.mark.slow
def test_a_forced_hit_in_autograds_cache_is_refused(tmp_path: pathlib.Path) -> None:
    """A graph from there skips the proof, and nothing is run of it; a verified one is not kept there."""
    for _ in range(2):
        (verified,) = run(tmp_path, {}, variables=AUTOGRAD)
        assert close(verified["sums"], eager()["sums"])
    (first,) = run(tmp_path, {"verify": False}, variables=AUTOGRAD)
    assert close(first["sums"], eager()["sums"])
    with pytest.raises(AssertionError, match="came out of AOTAutograd's cache") as refused:
        run(tmp_path, {"verify": False}, variables=AUTOGRAD)
    assert "unset TORCHINDUCTOR_AUTOGRAD_CACHE" in str(refused.value)
