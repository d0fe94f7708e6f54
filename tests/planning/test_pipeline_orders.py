"""Orders of pipelines: what a rank may know of the first stage, and the time and memory that are predicted by it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import networkx
import pytest
from torch.distributed.pipelining import schedules

from benchmarks.torch_schedules import TITLES, StandIn, orders_of_torch, schedule_of_torch
from dpcompile._torch.pipelining import orders_of
from dpcompile.planning.pipeline_orders import Action, Orders, gpipe, known_over, one_forward_one_backward
from dpcompile.planning.pipeline_time import StageCosts, predicted_run

NAMES = tuple(TITLES)
LOOPED = NAMES[2:]


def before(order: Orders, stages: int) -> networkx.DiGraph:
    """What comes before what in every run: on one rank, and by what is sent."""
    graph = networkx.DiGraph()
    for actions in order:
        graph.add_nodes_from(actions)
        graph.add_edges_from(itertools.pairwise(actions))
    for action in list(graph):
        for other in graph:
            if action.chunk == other.chunk and action.kind != "W" and other.kind != "W":
                on = action.kind == other.kind == "F" and other.stage == action.stage + 1
                back = action.back and other.back and other.stage == action.stage - 1
                if on or back or (action.kind == "F" and other.back and action.stage == other.stage == stages - 1):
                    graph.add_edge(action, other)
    return graph


@pytest.mark.parametrize("name", NAMES)
def test_what_a_rank_may_know_comes_before_it_in_every_run(name: str) -> None:
    for ranks, chunks in ((2, 4), (4, 8)):
        order, stages = orders_of_torch(name, ranks, chunks)
        graph, known = before(order, stages), known_over(order, stages)
        for action in graph:
            earlier = networkx.ancestors(graph, action) | {action}
            over = {a.chunk for a in earlier if a.back and a.stage == 0}
            assert known[action] == next(n for n in range(chunks + 1) if n not in over), action
            backs = {(a.stage, a.chunk) for a in earlier if a.back}  # then all stages had them
            assert all((s, m) in backs for s in range(stages) for m in range(known[action]))


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_in_flight_are_held_and_no_more(name: str) -> None:
    """With four times as many micro-batches as few more are held, where the schedule itself holds few."""
    held = []
    for chunks in (8, 32):
        order, stages = orders_of_torch(name, 4, chunks)
        run, plain = (predicted_run(order, stages, [StageCosts(1, 1, 1)] * stages, private=p) for p in (True, False))
        assert all(n >= m for n, m in zip(run.held, plain.held, strict=True))
        held.append(max(run.held))
    assert held[1] == (4 * held[0] if name in ("GPipe", "LoopedBFS") else held[0])
    if name == "1F1B":
        assert held == [4, 4] and run.waiting == (1, 4, 4, 4)
    if name == "GPipe":
        assert run.waiting == (1, 32, 32, 32)


def costs(stages: int, weights: float = 1.0) -> Sequence[StageCosts]:
    return [StageCosts(1.0, 1.0, weights)] * stages


@pytest.mark.parametrize(("ranks", "chunks"), [(2, 4), (4, 8), (4, 3), (1, 5)])
def test_the_bubble_of_a_plain_run(ranks: int, chunks: int) -> None:
    """``(p - 1) / (m + p - 1)``: Narayanan et al., 2021, section 2.2.1."""
    makers = (gpipe, one_forward_one_backward) if chunks >= ranks else (gpipe,)
    for make in makers:
        run = predicted_run(make(ranks, chunks), ranks, costs(ranks), private=False)
        assert run.seconds == 3.0 * (chunks + ranks - 1)
        assert run.idle == pytest.approx([(ranks - 1) / (chunks + ranks - 1)] * ranks)


def test_products_fill_the_bubble() -> None:
    """The last rank's, of all micro-batches that are not over when its backwards are; none takes part in the ramp."""
    for make in (gpipe, one_forward_one_backward):
        run, plain = (predicted_run(make(4, 8), 4, costs(4), private=p) for p in (True, False))
        assert run.seconds < plain.seconds and sum(run.idle) < sum(plain.idle)
    run = predicted_run(gpipe(4, 8), 4, costs(4))
    assert run.seconds == 8 * 3 + 3 * 2  # the ramp is of a forward and a gradient of inputs each
    run = predicted_run(gpipe(2, 1), 2, [StageCosts(2.0, 3.0, 5.0), StageCosts(7.0, 11.0, 13.0)], send=0.5)
    assert run.seconds == 2 + 0.5 + 7 + 11 + 0.5 + 3 + 0.5 + 13
    assert run.idle == pytest.approx((1 - 10 / 37.5, 1 - 31 / 37.5))


def test_orders_that_never_end() -> None:
    waiting = [[Action("B", 0, 0), Action("F", 0, 0)], [Action("F", 1, 0), Action("B", 1, 0)]]
    with pytest.raises(ValueError, match="wait for each other"):
        known_over(waiting, 2)


def test_orders_that_are_not_torchs() -> None:
    class Own(schedules.ScheduleGPipe):
        def _step_microbatches(self, *args: Any, **kwargs: Any) -> Any:
            return super()._step_microbatches(*args, **kwargs)

    assert orders_of(Own(StandIn(0, 2, 2), 4, loss_fn=lambda x, y: x)) is None  # type: ignore[arg-type]
    replaced = schedule_of_torch("Interleaved1F1B", 2, 4)
    replaced.register_custom_function(schedules._ComputationType.FORWARD, lambda action, ctx: None)
    assert orders_of(replaced) is None
