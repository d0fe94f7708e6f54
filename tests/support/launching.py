"""Scripts under torchrun, for the tests."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

TESTS = Path(__file__).parent.parent
_HANGS = float(os.environ.get("DPCOMPILE_TEST_HANGS", "300"))  # seconds after which a check is taken to hang


def launch(
    world: int, script: str, *arguments: str, options: Sequence[str] = (), timeout: float = 3 * _HANGS
) -> subprocess.CompletedProcess[str]:
    """Run a script of `workers` on ``world`` ranks of this machine."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *options,
        str(TESTS / "workers" / script), *arguments,
    ]  # fmt: skip
    path = os.pathsep.join(
        filter(
            None,
            [
                str(TESTS),
                str(TESTS / "support"),
                str(TESTS / "workers"),
                str(TESTS.parent),
                os.environ.get("PYTHONPATH", ""),
            ],
        )
    )
    # The last: ranks that torchrun starts again would find the addresses of those before them.
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, **own}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def passed(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The checks that a worker reports; raises if it failed."""
    errors = "\n".join(x for x in done.stderr.splitlines() if "Error" in x)  # of every rank: the end shows one
    assert done.returncode == 0, done.stdout[-2000:] + errors[:3000] + done.stderr[-6000:]
    return {line.removeprefix("passed: ") for line in done.stdout.splitlines() if line.startswith("passed: ")}


def run_checks(checks: Mapping[str, Callable[[], None]], wanted: Sequence[str] = ()) -> None:
    """Run on every rank what a worker checks; rank 0 prints the name of what passed.

    A check that hangs ends the process, and says where it is.

    Args:
        checks: by name.
        wanted: parts of the names of those to run; none: all.
    """
    for name, check in checks.items():
        if not wanted or any(w in name for w in wanted):
            faulthandler.dump_traceback_later(_HANGS, exit=True)
            torch.manual_seed(2)
            check()
            torch.compiler.reset()
            if dist.get_rank() == 0:
                print(f"passed: {name}", flush=True)
    dist.barrier()
    faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()
