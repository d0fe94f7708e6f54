"""Worker processes: one job each, with a time limit, and a log; and one job on several ranks."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

__all__ = ["ROOT", "Workshop", "on_gloo_ranks"]

ROOT = pathlib.Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where and how jobs are run.

    Attributes:
        folder: for job files, results and logs.
        threads: of every worker.
        timeout: seconds until a job is given up.
        inline: run jobs in this process instead (tests).
    """

    folder: pathlib.Path
    threads: int
    timeout: float = 900.0
    inline: bool = False

    def run(self, call: str, arguments: dict[str, Any], *, cold: bool = False) -> dict[str, Any]:
        """Call ``module:function`` with keyword arguments in a process of its own.

        Args:
            call: what to call; it returns something that JSON can hold.
            arguments: JSON can hold them too.
            cold: with compile caches in a fresh folder, deleted afterwards.

        Returns:
            The result, or ``{"error": why there is none}``.
        """
        job = {"call": call, "arguments": arguments, "threads": self.threads}
        if self.inline:
            import torch

            from benchmarks.worker import do

            torch.compiler.reset()
            return do(job)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            result, environment = os.path.join(place, "result.json"), dict(os.environ)
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
            if cold:
                environment["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(place, "cache")
            with open(os.path.join(place, "job.json"), "w") as file:
                json.dump({**job, "result": result}, file)
            with open(self.folder / "workers.log", "a") as log:
                log.write(f"\n== {call} {json.dumps(arguments)}\n")
                log.flush()
                try:
                    done = subprocess.run(
                        [sys.executable, "-m", "benchmarks.worker", file.name],
                        cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=self.timeout,
                    )  # fmt: skip
                except subprocess.TimeoutExpired:
                    return {"error": f"not done after {self.timeout:.0f} s"}
            if not os.path.exists(result):
                return {"error": f"the process ended with {done.returncode}"}
            with open(result) as file:
                return json.load(file)


def on_gloo_ranks(worker: str, job: dict[str, Any], ranks: int, *, threads: int, timeout: float) -> dict[str, Any]:
    """What a module of ours wrote to ``job["result"]``, run on gloo ranks of this machine.

    Args:
        worker: its name; it takes the path of a JSON file with the job.
        job: anything else that it wants to know.
        ranks: how many.
        threads: of each.
        timeout: seconds.

    Raises:
        RuntimeError: the ranks failed; with what they printed last.
    """
    with tempfile.TemporaryDirectory() as place:
        path, result = pathlib.Path(place, "job.json"), pathlib.Path(place, "result.json")
        path.write_text(json.dumps({**job, "result": str(result)}))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        words = [*command, "-m", worker, str(path)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"the ranks ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return json.loads(result.read_text())
