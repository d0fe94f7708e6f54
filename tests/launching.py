"""Scripts under torchrun, for the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def launch(
    world: int, script: str, *arguments: str, options: Sequence[str] = (), timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """Run a script (a path, from the tests) on ``world`` ranks of this machine."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *options,
        str(HERE / script), *arguments,
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
    # The last: ranks that torchrun starts again would find the addresses of those before them.
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, **own}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def passed(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The checks that a worker reports; raises if it failed."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {line.removeprefix("passed: ") for line in done.stdout.splitlines() if line.startswith("passed: ")}
