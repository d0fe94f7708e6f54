"""Torch's schedules of a pipeline as orders of what each rank does, without a process group."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.pipelining import schedules

from dpcompile._torch.pipelining import orders_of
from dpcompile.planning.pipeline_orders import Action, Orders, gpipe, one_forward_one_backward

__all__ = ["TITLES", "StandIn", "orders_of_torch", "schedule_of_torch"]

TITLES = {
    "GPipe": "GPipe", "1F1B": "1F1B", "Interleaved1F1B": "interleaved 1F1B, 2 stages a rank",
    "InterleavedZeroBubble": "interleaved zero-bubble", "ZBVZeroBubble": "ZBV zero-bubble", "DualPipeV": "DualPipeV",
    "LoopedBFS": "looped BFS",
}  # fmt: skip


class StandIn:
    """As much of a PipelineStage as a schedule looks at when it is made."""

    submod, has_backward, group_rank, device = None, True, 0, torch.device("cpu")

    def __init__(self, index: int, count: int, ranks: int) -> None:
        self.stage_index, self.num_stages, self.group_size = index, count, ranks
        self.is_first, self.is_last = index == 0, index == count - 1


def schedule_of_torch(name: str, ranks: int, chunks: int) -> Any:
    """Of torch, as rank 0 has it."""
    if name in ("GPipe", "1F1B"):
        return getattr(schedules, f"Schedule{name}")(StandIn(0, ranks, ranks), chunks, loss_fn=lambda x, y: x)
    second = 2 * ranks - 1 if name in ("ZBVZeroBubble", "DualPipeV") else ranks
    stages: Any = [StandIn(i, 2 * ranks, ranks) for i in (0, second)]
    return getattr(schedules, f"Schedule{name}")(stages, chunks, loss_fn=lambda x, y: x)


def orders_of_torch(name: str, ranks: int, chunks: int) -> tuple[Orders, int]:
    """Of every rank of one of torch's schedules, by name, and how many stages there are."""
    found = orders_of(schedule_of_torch(name, ranks, chunks))
    if isinstance(found, str):
        assert found == name
        return {"GPipe": gpipe, "1F1B": one_forward_one_backward}[name](ranks, chunks), ranks
    assert found is not None
    return [[Action(*action) for action in order] for order in found], 2 * ranks
