"""The stages of one pipeline on this rank: norms of micro-batches go to the other ranks, and come back as those of all.

A micro-batch's norms are known when the first stage's backward of it is over, the last of all. From there they come
back while the schedule runs (:mod:`dpcompile.distributed.norm_sums`). Each rank takes them, computes clipped sums and
frees what it kept for them, before a forward that by the schedule's own sends cannot come earlier
(:func:`dpcompile.planning.pipeline_orders.known_over`). So nothing that it waits for is still to be sent, and ranks
that share a stage's parameters do it in one place. What is left is taken when the schedule is over, as it comes.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dpcompile._torch.pipelining import StageCall, orders_of
from dpcompile.distributed.norm_sums import NormSums
from dpcompile.distributed.pipeline import agreed, same_on_all
from dpcompile.distributed.ranks import refuse_other_place
from dpcompile.distributed.shards import computing_device
from dpcompile.errors import PrivacyError, UnsupportedGraphError
from dpcompile.planning.pipeline_orders import Action, gpipe, known_over, one_forward_one_backward
from dpcompile.runtime.micro_batch import MicroBatch
from dpcompile.runtime.stage_checks import StagedEngine, facts_of, fault_of, layout_of

__all__ = ["StageOfRank", "StagesOfRank"]

_COMPARED = "the logical step", "the draw of the loader", "the part of the draw", "C or the noise", "rows or padding"


class StageOfRank(Protocol):
    """A stage (:class:`dpcompile.runtime.stages.Stage`), as far as it is used here.

    Attributes:
        group: of the pipeline.
        first_parameter: how many parameters lie in the stages before.
    """

    group: Any
    first_parameter: int

    @property
    def engine(self) -> StagedEngine:  # noqa: D102
        ...

    @property
    def waiting(self) -> Mapping[int, MicroBatch]:  # noqa: D102
        ...

    @property
    def whole(self) -> bool:  # noqa: D102
        ...

    @property
    def batch(self) -> tuple[int, int]:  # noqa: D102
        ...

    @property
    def ranks(self) -> int:  # noqa: D102
        ...

    def end(self) -> None:  # noqa: D102
        ...


class StagesOfRank:
    """The stages of one pipeline that lie on this rank.

    Args:
        stages: by number.
        count: how many the pipeline has.
        first: which rank holds the first.
        sums: of the pipeline's group.

    Attributes:
        held: micro-batches, stage by stage, of which activations or cotangents are kept.
        most_held: the most of them at a time, since a batch began.
    """

    def __init__(self, stages: Mapping[int, StageOfRank], count: int, first: int, sums: NormSums) -> None:
        self.stages, self.count, self._first, self._sums = dict(stages), count, first, sums
        self._agreed = False
        self._schedule: weakref.ref[Any] | None = None
        self._known: Mapping[Action, int] = {}
        self._number, self._begun = 0, set[int]()
        self._own: dict[int, list[Tensor]] = {}
        self._given, self._taken = 0, 0
        self.most_held = 0
        _refuse_ties(self.stages)

    @property
    def batch(self) -> int:
        """Number of the batch under way."""
        return self._number

    @property
    def held(self) -> int:
        """See the class."""
        return sum(m.waiting is not None for s in self.stages.values() for m in s.waiting.values())

    def follow(self, call: StageCall) -> None:
        """A schedule runs; its order is found out once."""
        schedule = call.schedule
        if self._schedule is None or self._schedule() is not schedule:
            self._schedule, self._known = weakref.ref(schedule), _known(schedule, self.count, call.chunks)

    def begin(self, index: int) -> None:
        """A stage begins a batch."""
        if not self._begun or index in self._begun:
            self._begun, self._own, self._given, self._taken, self.most_held = set(), {}, 0, 0, 0
            self._number = self._sums.begin(self._first)
        self._begun.add(index)

    def note_held(self) -> None:
        """A micro-batch more is held."""
        self.most_held = max(self.most_held, self.held)

    # --- norms -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def over(self, index: int, chunk: int, squared: Tensor) -> None:
        """The backward of a stage is over, which has these squared norms, float64 ``[B]``.

        They go out in the order of the micro-batches, on every rank.
        """
        self._own.setdefault(chunk, []).append(squared)
        while len(self._own.get(self._given, ())) == len(self.stages):
            self._sums.give(self._number, self._given, torch.stack(self._own.pop(self._given)).sum(0))
            self._given += 1
        if index == 0:  # all others were there before
            self._take(self._given)

    @torch.no_grad()
    def release(self, kind: str, index: int, chunk: int) -> None:
        """Before a forward, or in a place for weight gradients: conclude what must be over everywhere by now."""
        self._take(min(self._known.get(Action(kind, index, chunk), 0), self._given))

    def _take(self, end: int) -> None:
        while self._taken < end:
            chunk, self._taken = self._taken, self._taken + 1
            squared = self._sums.take(self._number, chunk)
            for index in sorted(self.stages):
                found = self.stages[index].waiting.get(chunk)
                if found is not None:
                    found.conclude(squared)

    # --- the end of a batch ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def complete(self) -> None:
        """See :meth:`dpcompile.runtime.stages.Stage.complete`."""
        stages = [self.stages[i] for i in sorted(self.stages)]
        if not any(s.waiting for s in stages):
            return
        if 0 in self.stages:
            for chunk, found in sorted(self.stages[0].waiting.items()):
                if chunk >= self._given:
                    self._sums.give_up(self._number, chunk, found.mask.double())
        self._take(self._given)
        device = computing_device(next(iter(stages[0].engine.parameters().values())))
        self._compare(stages, fault_of(stages) or self._out_of_step(), device)
        self._sums.settle()
        for stage in stages:
            stage.end()
        self._begun = set()

    def _out_of_step(self) -> PrivacyError | None:
        if not self._sums.wrong:
            return None
        return PrivacyError(
            "the ranks of the pipeline sent each other norms of other micro-batches: one of them left a batch half-way",
            remedy="start the processes again, from the last checkpoint; drop batches on all ranks, between "
            "schedule.step(...) and the next",
        )

    def _compare(self, stages: Sequence[StageOfRank], fault: PrivacyError | None, device: torch.device) -> None:
        engine = stages[0].engine
        place = engine.place() or (0, 0, 0)
        layout = 0 if fault else layout_of(stages)
        numbers = [place[0], *stages[0].batch, place[2], layout, fault is not None, self._agreed]
        *same, healthy, known = same_on_all(numbers, device, stages[0].group)
        if fault is not None:
            raise fault
        if not healthy:
            raise PrivacyError(
                "another rank of the pipeline refused the batch", remedy="see the error of that rank, which says why"
            )
        if not all(same):
            told = ", ".join(n for n, alike in zip(_COMPARED, same, strict=True) if not alike)
            raise PrivacyError(
                f"the ranks of the pipeline are not at one batch: they differ in {told}",
                remedy="iterate over the same batches on every rank, with one seed; give every stage the same mask "
                "(set_mask), and run every batch on every rank; loss scaling (GradScaler) is not for pipelines",
            )
        if not (self._agreed and known):
            first = agreed(
                {i: facts_of(s.engine, self.count) for i, s in self.stages.items()}, self.count, stages[0].ranks
            )
            for index, stage in self.stages.items():
                stage.first_parameter = first[index]
            self._agreed = True
        if dist.get_world_size() != stages[0].ranks:
            refuse_other_place(engine.place(), device)


def _known(schedule: Any, stages: int, chunks: int) -> Mapping[Action, int]:
    """What :func:`known_over` says of a schedule; nothing of one whose order is not known."""
    orders = orders_of(schedule)
    if orders is None:
        return {}
    if isinstance(orders, str):
        return known_over({"GPipe": gpipe, "1F1B": one_forward_one_backward}[orders](stages, chunks), stages)
    return known_over([[Action(*action) for action in order] for order in orders], stages)


def _refuse_ties(stages: Mapping[int, StageOfRank]) -> None:
    owners: dict[int, int] = {}
    for index, stage in stages.items():
        for name, parameter in stage.engine.parameters().items():
            if owners.setdefault(id(parameter), index) != index:
                raise UnsupportedGraphError(
                    f"parameter '{name}' is in stages {owners[id(parameter)]} and {index}: its gradients add "
                    "before the norm is taken, and stages take norms by themselves",
                    remedy="give each stage a parameter of its own, or put both uses into one stage",
                )
