"""Which stage of ``torch.distributed.pipelining`` runs a module: found by the frames around the call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch.distributed as dist

__all__ = ["StageCall", "leave_weights", "orders_of", "running_stage"]

_STAGES, _SCHEDULES = "torch.distributed.pipelining.stage", "torch.distributed.pipelining.schedules"


@dataclass(frozen=True, slots=True)
class StageCall:
    """A call of a stage's module.

    Attributes:
        stage: the ``PipelineStage``.
        schedule: that runs it; None: something else does.
        chunk: number of the micro-batch; None: torch finds out shapes, and drops what is returned.
    """

    stage: Any
    schedule: Any
    chunk: int | None

    @property
    def trains(self) -> bool:
        """Whether a backward follows."""
        return bool(self.stage.has_backward if self.chunk is not None else self.schedule._has_backward)

    @property
    def chunks(self) -> int:
        """How many micro-batches a batch is."""
        return int(self.schedule._n_microbatches)

    @property
    def local(self) -> Sequence[Any]:
        """The stages of this rank."""
        several = getattr(self.schedule, "_stages", None)
        return [self.schedule._stage] if several is None else several

    @property
    def first_rank(self) -> int:
        """Which rank of the pipeline's group holds the first stage."""
        return int(self.stage.stage_index_to_group_rank[0])

    @property
    def group(self) -> Any:
        """The pipeline's process group."""
        return dist.group.WORLD if self.stage.group is None else self.stage.group


def running_stage() -> StageCall | None:
    """The stage whose module is being called; None outside of stages."""
    stages, schedules = sys.modules.get(_STAGES), sys.modules.get(_SCHEDULES)
    if stages is None or schedules is None:
        return None
    found, frame = None, _caller(sys._getframe())
    while frame is not None:
        name = frame.f_code.co_name
        if found is None and name in ("forward_one_chunk", "_forward_metadata_inference"):
            own = frame.f_locals
            if isinstance(own.get("self"), stages._PipelineStageBase):
                found = own["self"], own.get("fwd_chunk_id")
        elif found is not None and name in ("_step_microbatches", "_initialize_pp_stages"):
            schedule = frame.f_locals.get("self")
            if isinstance(schedule, schedules._PipelineSchedule):
                return StageCall(found[0], schedule, found[1])
        frame = _caller(frame)
    return None if found is None else StageCall(found[0], None, found[1])


def orders_of(schedule: Any) -> str | list[list[tuple[str, int, int]]] | None:
    """What every rank does when, if it is one of torch's own schedules.

    Returns:
        "GPipe" or "1F1B" for those of one stage a rank. For others, rank by rank, ``(kind, stage, micro-batch)``: "F"
        forward, "B" backward, "I" backward without weight gradients, "W" these. None: it is not known.
    """
    torchs = sys.modules[_SCHEDULES]
    run = type(schedule)._step_microbatches
    for name, kind in (("GPipe", torchs.ScheduleGPipe), ("1F1B", torchs.Schedule1F1B)):
        if run is kind._step_microbatches:
            return name
    if run is not torchs._PipelineScheduleRuntime._step_microbatches or schedule._comp_type_to_function_map:
        return None
    orders: dict[int, list[Any]] = schedule.pipeline_order_with_comms
    return [list(_computing(orders[rank])) for rank in sorted(orders)]


def _computing(actions: Sequence[Any]) -> Iterator[tuple[str, int, int]]:
    for action in actions:
        if action.sub_actions is not None:
            yield from _computing(action.sub_actions)
        elif action.computation_type.value in ("F", "B", "I", "W"):
            yield action.computation_type.value, action.stage_index, action.microbatch_index


def leave_weights(stage: Any, then: Callable[[int], None]) -> None:
    """Let schedules that split the backward run all of it where gradients of inputs are due: weights have none left.

    That is what a stage's ``dw_builder`` is for, and one of the user's stays.

    Args:
        stage: the ``PipelineStage``.
        then: called with the number of a micro-batch where the schedule has a place for its weight gradients.
    """
    if stage.dw_builder is not None:
        return

    def place() -> None:
        caller = _caller(sys._getframe())
        if caller is not None and caller.f_code.co_name == "backward_weight_one_chunk":
            then(caller.f_locals["bwd_chunk_id"])

    stage.dw_builder = lambda: place


def _caller(frame: FrameType) -> FrameType | None:
    return frame.f_back
