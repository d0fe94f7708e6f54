"""Which stage of ``torch.distributed.pipelining`` runs a module: found by the frames around the call."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

__all__ = ["StageCall", "leave_weights", "running_stage"]

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


def leave_weights(stage: Any) -> None:
    """Let schedules that split the backward run all of it where gradients of inputs are due: weights have none left.

    That is what a stage's ``dw_builder`` is for, and one of the user's stays.
    """
    if stage.dw_builder is None:
        stage.dw_builder = _nothing_left


def _nothing_left() -> Any:
    return _nothing


def _nothing() -> None:
    """The weight gradients of a micro-batch, of which nothing is autograd's."""


def _caller(frame: FrameType) -> FrameType | None:
    return frame.f_back
