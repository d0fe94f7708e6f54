"""What every rank of ``python -m benchmarks.pipeline`` runs: batches through a schedule, plain and private.

What a rank computes is timed at its calls; what lies between them is the bubble. The prediction takes the medians of
the same calls for costs, and for bytes those of one micro-batch: it says what the order of the schedule makes of them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import unittest.mock
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules

from dpcompile import dp_compile
from dpcompile._torch.pipelining import orders_of
from dpcompile.distributed.norm_sums import NormSums
from dpcompile.module import engine_of
from dpcompile.planning.pipeline_orders import Action, Orders, gpipe, one_forward_one_backward
from dpcompile.planning.pipeline_time import StageCosts, predicted_run
from dpcompile.regions.backward import RegionBackward
from dpcompile.runtime.stages_of_rank import StagesOfRank

__all__ = ["main"]


class Block(nn.Module):
    """As in a transformer, without attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Times:
    """Seconds by kind of call; what a call takes within another is not counted there."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = defaultdict(list)
        self._inner = [0.0]
        self.kept, self.one = 0, 0

    def timed(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.found[kind].append(took - self._inner.pop())
                self._inner[-1] += took

        return run

    def middle(self, kind: str) -> float:
        """The median; 0 if there was no such call."""
        return statistics.median(self.found[kind]) if self.found[kind] else 0.0


def main(path: str) -> None:
    """Run the job in the file, and write what came of it into the one that it names."""
    with open(path) as file:
        job = json.load(file)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: _run(job, private=name == "private") for name in ("plain", "private")}
    if dist.get_rank() == 0:
        with open(job["result"], "w") as file:
            json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


def _run(job: dict[str, Any], *, private: bool) -> dict[str, Any]:
    rank, ranks, several = dist.get_rank(), dist.get_world_size(), job["schedule"] not in ("GPipe", "1F1B")
    count = ranks * (1 + several)
    v_shaped = job["schedule"] in ("ZBVZeroBubble", "DualPipeV")
    numbers = [rank, *([count - 1 - rank if v_shaped else rank + ranks] if several else [])]
    parts = [_part(job, i, private=private) for i in numbers]
    cpu = torch.device("cpu")
    stages: Any = [pipelining.PipelineStage(p, i, count, cpu) for p, i in zip(parts, numbers, strict=True)]
    kind = getattr(schedules, f"Schedule{job['schedule']}")
    schedule = kind(stages if several else stages[0], job["chunks"], loss_fn=lambda x, y: (x - y).square().mean())
    shape = job["chunks"] * job["rows"], job["tokens"], job["width"]
    given = [torch.randn(shape)] if 0 in numbers else []
    last: Any = {"target": torch.zeros(shape), "losses": []} if count - 1 in numbers else {}
    walls, times = [], Times()
    for repeat in range(job["repeats"] + 1):
        if repeat == 0:
            _batch(schedule, parts, given, last, private=private)  # compiles
        else:
            with _timing(times, stages):
                dist.barrier()
                start = time.perf_counter()
                _batch(schedule, parts, given, last, private=private)
                walls.append(time.perf_counter() - start)
        for part in parts:
            part.zero_grad()
            if private:
                engine_of(part).ledger.clear()
    costs = StageCosts(times.middle("F"), times.middle("B"), times.middle("W") if private else 0.0)
    busy = sum(sum(times.found[k]) for k in "FBW")
    stage = engine_of(parts[0]).stage if private else None
    own = {
        "costs": [(i, costs.forward, costs.backward, costs.weights) for i in numbers],
        "wall": statistics.median(walls), "idle": 1 - busy / sum(walls), "kept": times.kept, "one": times.one,
        "held": None if stage is None or stage.rank is None else stage.rank.most_held,
    }  # fmt: skip
    everywhere: list[Any] = [None] * ranks
    dist.all_gather_object(everywhere, own)
    by_stage = {i: StageCosts(*c) for e in everywhere for i, *c in e["costs"]}
    said = predicted_run(_orders(schedule, count), count, [by_stage[i] for i in range(count)], private=private)
    return {
        "seconds": max(e["wall"] for e in everywhere),
        "idle": [e["idle"] for e in everywhere],
        "held": [e["held"] for e in everywhere],
        "bytes": [e["kept"] for e in everywhere],
        "predicted": {
            "seconds": said.seconds, "idle": said.idle, "held": said.held,
            "bytes": [n * e["one"] for n, e in zip(said.waiting, everywhere, strict=True)],
        },
    }  # fmt: skip


def _part(job: dict[str, Any], index: int, *, private: bool) -> Any:
    torch.manual_seed(index)
    part = nn.Sequential(*(Block(job["width"]) for _ in range(job["blocks"])))
    if private:
        return dp_compile(part, backend=job["backend"], pipeline=True)
    part.compile(backend="aot_eager" if job["backend"] == "eager" else job["backend"])
    return part


def _batch(schedule: Any, parts: list[Any], given: list[Tensor], last: dict[str, Any], *, private: bool) -> None:
    schedule.step(*given, **last)
    if private:
        stage = engine_of(parts[0]).stage
        assert stage is not None
        stage.complete()


def _timing(times: Times, stages: list[Any]) -> Any:
    """Within it, calls that compute are timed; waiting for norms counts for none of them."""
    patches = unittest.mock.patch.multiple
    inside = unittest.mock.patch.object
    return _All(
        *(
            patches(
                s,
                forward_one_chunk=times.timed("F", s.forward_one_chunk),
                backward_one_chunk=times.timed("B", s.backward_one_chunk),
            )
            for s in stages
        ),
        inside(RegionBackward, "conclude", _method(times, "W", RegionBackward.conclude)),
        inside(NormSums, "give", _method(times, "waiting", NormSums.give)),
        inside(NormSums, "take", _method(times, "waiting", NormSums.take)),
        inside(StagesOfRank, "over", _noting(times, StagesOfRank.over)),
    )


class _All:
    def __init__(self, *contexts: Any) -> None:
        self._contexts = contexts

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: object) -> None:
        for context in self._contexts:
            context.__exit__(*error)


def _method(times: Times, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
    timed = times.timed(kind, call)
    return lambda self, *args: timed(self, *args)


def _noting(times: Times, call: Callable[..., Any]) -> Callable[..., Any]:
    def look(rank: StagesOfRank) -> None:
        kept = _kept(rank)
        times.one = times.one or kept  # of the first micro-batch
        times.kept = max(times.kept, kept)

    def over(self: StagesOfRank, *args: Any) -> None:
        times.timed("looking", look)(self)
        call(self, *args)

    return over


def _kept(rank: StagesOfRank) -> int:
    """Bytes of what micro-batches keep for their clipped sums, once their backward is over."""
    storages: dict[int, int] = {}
    waiting = [m.waiting for s in rank.stages.values() for m in s.waiting.values()]
    for whole in waiting:
        assert whole is None or isinstance(whole, RegionBackward)
        for rest in (run.rest for run in (whole.received if whole is not None else []) if run.rest is not None):
            tensors = [t for t in rest.live if isinstance(t, Tensor)]
            storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors})
    return sum(storages.values())


def _orders(schedule: Any, stages: int) -> Orders:
    found = orders_of(schedule)
    if isinstance(found, str):
        return {"GPipe": gpipe, "1F1B": one_forward_one_backward}[found](stages, schedule._n_microbatches)
    assert found is not None
    return [[Action(*action) for action in order] for order in found]


if __name__ == "__main__":
    main(sys.argv[1])
