"""What ``verify=True`` costs: ``python -m benchmarks.verify [model ...]``, one process per model and setting."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.models import CASES
from dpcompile import dp_compile
from dpcompile.runtime.verify import Verifier

__all__ = ["main"]

MODELS = ("cnn", "resnet", "vit", "gpt")


def _first_step(name: str, *, verify: bool, batch: int | None) -> dict[str, float]:
    """Seconds of the first step, and of the comparison in it; the process's peak of memory in GiB."""
    import resource

    case = CASES[name]
    spent: list[float] = []
    before = Verifier._compare

    def timed(self: Verifier, *args: Any) -> None:
        start = time.perf_counter()
        before(self, *args)
        spent.append(time.perf_counter() - start)

    Verifier._compare = timed  # type: ignore[method-assign]
    torch.manual_seed(0)
    model: Any = dp_compile(case.make(), verify=verify)
    inputs, targets = case.data(batch or case.batch)
    start = time.perf_counter()
    case.loss(model(inputs), targets).mean().backward()
    first = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"first": first, "verify": sum(spent), "peak": peak}


def main() -> None:
    """Print one row per model; compilers' caches must be empty for the times to be those of compiling."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, help="examples; by default those of the table")
    parser.add_argument("--one", choices=("on", "off"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_first_step(options.models[0], verify=options.one == "on", batch=options.batch)))
        return
    machine = describe_machine(torch.get_num_threads())
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("| model | compiling, s | comparing, s | ratio | peak with, GiB | without |")
    print("|---|---|---|---|---|---|")
    for name in options.models:
        rows = {}
        for setting in ("on", "off"):
            command = [sys.executable, "-m", "benchmarks.verify", name, "--one", setting]
            command += ["--batch", str(options.batch)] if options.batch else []
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows[setting] = json.loads(done.stdout.splitlines()[-1])
        compiling, comparing = rows["on"]["first"] - rows["on"]["verify"], rows["on"]["verify"]
        print(
            f"| {name} | {compiling:.1f} | {comparing:.1f} | {comparing / compiling:.2f} | {rows['on']['peak']:.2f} | "
            f"{rows['off']['peak']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
