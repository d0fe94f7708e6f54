"""``python -m benchmarks.pipeline``: the bubble of a pipeline and what its ranks hold, predicted and measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.machine import describe_machine, revision
from benchmarks.markdown import markdown
from benchmarks.processes import on_gloo_ranks
from benchmarks.torch_schedules import TITLES, orders_of_torch
from dpcompile.planning.pipeline_time import StageCosts, predicted_run

__all__ = ["equal_costs", "launch", "main", "table"]


def main(words: Sequence[str] | None = None) -> None:
    """Parse the command line, run on gloo ranks of this machine, print a table for each schedule."""
    asked = _parser().parse_args(words)
    if asked.equal_costs:
        print(equal_costs(asked.ranks, asked.chunks))
        return
    for schedule in asked.schedules.split(","):
        job = {k: getattr(asked, k) for k in ("chunks", "rows", "tokens", "width", "blocks", "repeats", "backend")}
        print(table(launch({**job, "schedule": schedule}, asked.ranks, asked.timeout)))
    print(f"{asked.ranks} gloo ranks with a thread each; {describe_machine(1)['cpu']}; {revision()}")


def launch(job: dict[str, Any], ranks: int, timeout: float) -> dict[str, Any]:
    """The job, and what gloo ranks measured and predicted of it."""
    return job | on_gloo_ranks("benchmarks.pipeline_worker", job, ranks, threads=1, timeout=timeout)


def equal_costs(ranks: int, chunks: int) -> str:
    """Of torch's schedules, time of a batch and micro-batches held, if everything costs 1: predicted, nothing run."""
    rows = []
    for name, title in TITLES.items():
        orders, stages = orders_of_torch(name, ranks, chunks)
        costs, cells = [StageCosts(1.0, 1.0, 1.0)] * stages, [title]
        for private in (False, True):
            run = predicted_run(orders, stages, costs, private=private)
            cells.append(f"{run.seconds:.0f} ({max(run.held)})")
        rows.append(cells)
    return markdown([f"{chunks} micro-batches", "plain: time (held)", "private: time (held)"], rows)


def table(data: dict[str, Any]) -> str:
    """Of each way, time of a batch, idle share, micro-batches held and their bytes: measured (predicted)."""
    rows = []
    for name in ("plain", "private"):
        found, said = data[name], data[name]["predicted"]
        rows.append(
            [
                name,
                f"{1e3 * found['seconds']:.1f} ({1e3 * said['seconds']:.1f})",
                _by_rank("{:.0%} ({:.0%})", found["idle"], said["idle"]),
                _by_rank("{} ({})", found["held"], said["held"]),
                _by_rank("{:.1f} ({:.1f})", [b / 1e6 for b in found["bytes"]], [b / 1e6 for b in said["bytes"]]),
            ]
        )
    head = ["", "a batch, ms", "idle, by rank", "held at most", "kept for clipped sums, MB"]
    return (
        f"{data['schedule']}, {data['chunks']} micro-batches of {data['rows']} x {data['tokens']} tokens, width "
        f"{data['width']}, {data['blocks']} blocks a stage, {data['backend']}; measured (predicted):\n\n"
        + markdown(head, rows)
    )


def _by_rank(form: str, found: Sequence[Any], said: Sequence[Any]) -> str:
    return ", ".join("–" if f is None else form.format(f, s) for f, s in zip(found, said, strict=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument("--schedules", default="GPipe,1F1B,Interleaved1F1B", help="of torch, separated by commas")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=8, help="micro-batches of a batch")
    parser.add_argument("--rows", type=int, default=4, help="examples of a micro-batch")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=2, help="of a stage")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--equal-costs", action="store_true", help="predict all schedules, and run nothing")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one schedule")
    return parser


if __name__ == "__main__":
    main()
