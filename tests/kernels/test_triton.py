"""The Triton kernels of noise, updates, sums and norms under Triton's interpreter, wired in as on a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from dpcompile.errors import PrivacyError
from dpcompile.kernels import gaussian as native
from dpcompile.kernels import on_gpu
from dpcompile.noise import normal
from dpcompile.noise.counter import Stream

TESTS = Path(__file__).parents[1]
CHECKS = [
    "noise: the bits of the counter are those of torch",
    "noise: known answers of philox",
    "noise: the numbers are those of the cpu kernel",
    "noise: the ends of the counter",
    "noise: a value does not depend on its shard",
    "noise: many tensors of all sizes at once",
    "noise: memory beyond two to the 31",
    "noise: values that are not finite stay in their place",
    "noise: the numbers are standard normal and independent",
    "noise: rows of correlated noise are those of the cpu kernel",
    "noise: what the kernel does not take gets the same noise",
    "noise: a kernel that does not start is left out",
    "noise: a kernel that gives wrong numbers is left out",
    "steps: adams are the inner optimizers",
    "steps: sgd is the inner optimizers",
    "steps: correlated noise goes into both",
    "steps: a buffer that one parameter lacks",
    "steps: what is not plain is stepped by itself",
    "steps: one launch for each group",
    "steps: nothing waits for the device",
    "steps: numbers on the device are left to torch",
    "sums: weighted sums never read an example of weight 0",
    "sums: weighted sums of nothing are zeros",
    "sums: norms of vectors",
    "sums: squares of all shapes and strides",
    "sums: memory beyond two to the 31",
    "sums: in a captured graph the table needs no host memory",
    "sums: a model of many vectors",
    "sums: nothing waits for the device",
    "sums: without the kernels torch does it and waits for nothing",
    "products: products and their norms",
    "products: products that cancel are made again",
    "products: values that are not finite stay in their example",
    "products: what overflows in float32 has a norm",
    "products: norms by index",
    "products: only the examples that are asked for",
    "products: one hot norms that cancel",
    "products: nothing waits for the device",
    "products: offsets beyond two to the 31",
]
interpreted = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.xdist_group("triton"),
    pytest.mark.full,  # a minute in a process of its own
]


@lru_cache(maxsize=1)
def _found() -> dict[str, str | None]:
    """One process for all checks."""
    own = [str(TESTS / "workers"), str(TESTS / "support"), str(TESTS), str(TESTS.parent)]
    paths = os.pathsep.join([*own, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    script = str(TESTS / "workers/triton_worker.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout)


class TestInterpreted:
    pytestmark = interpreted

    @pytest.mark.parametrize("check", CHECKS)
    def test_under_the_interpreter(self, check: str) -> None:
        wrong = _found()[check]
        assert wrong is None, wrong

    def test_all_checks_are_listed(self) -> None:
        assert sorted(_found()) == sorted(CHECKS)


def test_nothing_is_drawn_into_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replays would repeat the noise."""
    for module in (native, normal):
        monkeypatch.setattr(module, "captured", lambda: True)
    assert not native.takes([torch.zeros(3)])
    with pytest.raises(PrivacyError, match="while a CUDA graph is captured: its replays would all draw the same"):
        normal.uniform(3, step=0, stream=Stream.SAMPLING, numel=3, device="cuda")
    assert torch.equal(*(normal.uniform(3, step=0, stream=Stream.SAMPLING, numel=3) for _ in range(2)))


def test_no_kernel_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not on_gpu.runs_triton(torch.device("cpu")) and not on_gpu.captured()
    monkeypatch.setattr(on_gpu, "has_triton", lambda: False)
    assert not on_gpu.runs_triton(torch.device("cuda")) and not native._draws_on(torch.device("cuda"))
