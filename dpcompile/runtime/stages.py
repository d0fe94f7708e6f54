"""Stages of a pipeline: micro-batches whose backward is over wait here for the norms of the other stages.

A stage's backward knows the squared norms of its own parameters alone. What the clipped sums need is kept (deferred
lowering) until those of all stages are there (:mod:`dpcompile.runtime.stages_of_rank`), in the midst of the schedule
or, at the latest, in :meth:`Stage.complete`, which ``DPOptimizer.step`` calls on every rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpcompile._torch import pytree
from dpcompile._torch.pipelining import StageCall, leave_weights
from dpcompile.batches.draws import Given
from dpcompile.distributed.borders import Border
from dpcompile.distributed.norm_sums import NormSums
from dpcompile.distributed.shards import computing_device
from dpcompile.errors import PrivacyError, UnsupportedGraphError, running_line
from dpcompile.runtime.micro_batch import MicroBatch, Waiting
from dpcompile.runtime.micro_batches import MicroBatches
from dpcompile.runtime.stage_checks import StagedEngine
from dpcompile.runtime.stages_of_rank import StagesOfRank

__all__ = ["Stage", "call_in_stage"]


class Stage:
    """A private model that is a stage of a pipeline.

    Args:
        engine: of the model.
        group: over whose ranks the stages of one model lie.
        run: a method of the engine: runs a micro-batch forward.

    **Guarantee.** A micro-batch's clipped sums are delivered once, with weights from the norms over all stages, or
    PrivacyError is raised on every rank of the pipeline.

    =======================================================  =======================================================
    edge case                                                outcome
    =======================================================  =======================================================
    a stage is not private, or has no trainable parameters   refused
    called outside a schedule, with gradients                refused
    ``schedule.eval``, forwards without gradients            no part of this
    a schedule's second batch before ``optimizer.step()``    refused
    a batch dropped by ``zero_grad()`` or ``discard()``      dropped, if on all ranks
    a micro-batch without a backward in one stage            refused on all ranks
    ranks at other draws, or with other padding              refused on all ranks
    a gradient that is not finite in one stage               weight 0 in all
    a parameter in two stages of one rank                    refused
    handed what each rank has of an example's tokens         right, if the stages lie along the same ranks; else refused
    a parameter equal, bit by bit, to one of another stage   refused at the first step, unless one stage is ``untied``
    =======================================================  =======================================================

    Attributes:
        group: see above.
        first_parameter: how many parameters lie in the stages before this one, once it is known.
        rank: the stages of this rank, once a schedule ran.
    """

    def __init__(self, engine: StagedEngine, group: Any, run: Callable[..., Any]) -> None:
        self._engine, self.group, self._run = weakref.ref(engine), group, weakref.WeakMethod(run)
        self.first_parameter = 0
        self.rank: StagesOfRank | None = None
        self._sums = NormSums.of(group, self._device())
        self._batches = MicroBatches(engine)
        self._waiting: dict[int, MicroBatch] = {}
        self._cleared = 0
        self._border_before: Border = ()
        self._border_behind: Border = ()
        _STAGES[id(engine.module.__dict__)] = self

    @property
    def engine(self) -> StagedEngine:
        """Of the model."""
        engine = self._engine()
        assert engine is not None
        return engine

    @property
    def ranks(self) -> int:
        """How many ranks hold the stages of one model."""
        return dist.get_world_size(self.group)

    def run(self, call: StageCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A micro-batch forward."""
        dims = self.engine.example_dims((args, kwargs))
        _check_dims(call, dims, args)
        first = not self.waiting
        given = self._given(call, [(t, dim) for _, t, dim in dims if dim is not None])
        run = self._run()
        assert run is not None
        result, border = run(call.chunk, args, kwargs, given, self._handed(call, first=first), last=call.stage.is_last)
        self._hand_on(call, border, first=first)
        return result

    def _handed(self, call: StageCall, *, first: bool) -> Border:
        """What the stage before says of the tensors that a micro-batch is, once for all of a batch."""
        borders, index = self._sums.borders, call.stage.stage_index
        if first and borders is not None and not call.stage.is_first:
            assert self.rank is not None
            by = call.stage.stage_index_to_group_rank[index - 1]
            self._border_before = borders.told(self.rank.batch, index, by, self._device())
        return self._border_before

    def _hand_on(self, call: StageCall, border: Border, *, first: bool) -> None:
        """Tell the next stage of what it is handed."""
        borders, index = self._sums.borders, call.stage.stage_index
        if call.stage.is_last or borders is None:
            return
        if first:
            assert self.rank is not None
            self._border_behind, to = border, call.stage.stage_index_to_group_rank[index + 1]
            borders.tell(self.rank.batch, index + 1, to, border, self._device())
        elif border != self._border_behind:
            raise UnsupportedGraphError(
                f"stage {index} hands on tensors of which each rank has its own part, in some micro-batches of a batch "
                "and not in others",
                remedy="give all micro-batches of a batch one size, and run the same code on them",
            )

    def _device(self) -> torch.device:
        """Where sends and receives work."""
        return next((computing_device(p) for p in self.engine.parameters().values()), torch.device("cpu"))

    def _given(self, call: StageCall, tensors: Sequence[tuple[Tensor, int]]) -> Given:
        """What is said of a micro-batch that is about to run.

        Args:
            call: the schedule's.
            tensors: with examples, and their dimension.
        """
        rank = self._join(call)
        self._drop_cleared()
        assert call.chunk is not None
        if not self._waiting:
            self._batches.begin(call.chunks)
            rank.begin(call.stage.stage_index)
        elif call.chunk in self._waiting:
            raise PrivacyError(
                "a second batch of the pipeline's schedule before the optimizer's step on the first",
                where=running_line(),
                remedy="call optimizer.step() after every schedule.step(...), on every rank (with "
                "optimizer.accumulating = True it waits); optimizer.discard() drops a batch",
            )
        rank.release("F", call.stage.stage_index, call.chunk)
        return self._batches.given(call.chunk, tensors, first=call.stage.is_first)

    def expect(self, chunk: int, waiting: Waiting) -> Callable[[Tensor], None]:
        """A micro-batch ran forward; returns what is to be told its squared norms when its backward is over."""
        assert self.rank is not None
        found = MicroBatch(waiting.mask, waiting)
        self._waiting[chunk], self._cleared = found, self.engine.ledger.cleared
        self.rank.note_held()
        return partial(self._over, chunk, found)

    def _over(self, chunk: int, found: MicroBatch, squared: Tensor) -> None:
        assert self.rank is not None
        found.done = True
        index = next(i for i, stage in self.rank.stages.items() if stage is self)
        self.rank.over(index, chunk, squared)

    def complete(self) -> None:
        """The schedule's batch is over: every rank calls this before its optimizers' step, and each once.

        Raises:
            PrivacyError: see the class.
        """
        if self.rank is not None:
            self.rank.complete()

    def _drop_cleared(self) -> None:
        if self._waiting and self._cleared != self.engine.ledger.cleared:
            for found in self._waiting.values():
                found.drop(
                    PrivacyError(
                        "a backward of a micro-batch that was dropped by zero_grad()",
                        remedy="call zero_grad() before schedule.step(...), or after optimizer.step()",
                    )
                )
            self._waiting = {}

    def _join(self, call: StageCall) -> StagesOfRank:
        """Find the other stages of this rank at the first call."""
        if self.rank is None:
            found = {s.stage_index: _stage_of(s) for s in call.local}
            rank = StagesOfRank(found, call.stage.num_stages, call.first_rank, self._sums)
            for stage in found.values():
                stage.rank = rank
        assert self.rank is not None
        leave_weights(call.stage, partial(_place_for_weights, call.stage))
        self._check(call, self.rank)
        self.rank.follow(call)
        return self.rank

    def _check(self, call: StageCall, rank: StagesOfRank) -> None:
        """Raise PrivacyError if a schedule runs other stages than the first did, or another module in a stage."""
        same = rank.stages.get(call.stage.stage_index) is self is _stage_of(call.stage)
        local = {s.stage_index for s in call.local} == set(rank.stages)
        if not (same and local and call.stage.num_stages == rank.count):
            raise PrivacyError(
                "the schedule runs other stages than the one that ran before",
                remedy="call dp_compile anew for stages that are divided otherwise",
            )
        if call.group.group_name != self.group.group_name:
            raise PrivacyError(
                "the PipelineStage has another process group than dp_compile was given: norms would be added up over "
                "other ranks than those that hold the stages",
                remedy="PipelineStage(..., group=group) and dp_compile(..., pipeline=group); without group: "
                "pipeline=True",
            )

    # --- for the stages of a rank ------------------------------------------------------------------------------------

    @property
    def waiting(self) -> Mapping[int, MicroBatch]:
        """The micro-batches of the batch under way, by number."""
        self._drop_cleared()
        return self._waiting

    @property
    def batch(self) -> tuple[int, int]:
        """Which draw they are of."""
        return self._batches.number

    @property
    def whole(self) -> bool:
        """Whether all micro-batches of the batch are there."""
        return set(self.waiting) == set(range(self._batches.chunks))

    def end(self) -> None:
        """The batch is over."""
        self._waiting = {}


_STAGES: weakref.WeakValueDictionary[int, Stage] = weakref.WeakValueDictionary()  # by a module's own dict


def call_in_stage(
    engine: StagedEngine, stage: Stage | None, call: StageCall | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A call of a private model in a stage of a pipeline, or of one that is to be called there alone.

    Args:
        engine: of the model.
        stage: that the model is.
        call: the schedule's; None: there is none.
        args: of the call.
        kwargs: of the call.

    **Guarantee.** No backward comes through the call but one whose norms are those over all stages.
    """
    if not torch.is_grad_enabled() or (call is not None and call.schedule is not None and not call.trains):
        with torch.no_grad():  # what a forward of evaluation returns has no backward
            return engine.call(args, kwargs)
    if stage is None:
        raise PrivacyError(
            "a private model is a stage of a pipeline, and was compiled without pipeline=: the norms of its examples' "
            "gradients would leave out those of the other stages",
            where=running_line(),
            remedy="dp_compile(part, pipeline=group), for every stage, with the group of the PipelineStage; True: all "
            "ranks",
        )
    if call is None or call.schedule is None:
        raise PrivacyError(
            "a private stage of a pipeline was called with gradients outside of a schedule",
            where=running_line(),
            remedy="train it through a schedule of torch.distributed.pipelining; look at outputs under torch.no_grad()",
        )
    if not engine.trainable():
        raise UnsupportedGraphError(
            f"stage {call.stage.stage_index} has no trainable parameters, so nothing is proved of it, and examples "
            "could mix there",
            remedy="divide the model so that every stage has trainable parameters",
        )
    if call.chunk is None:
        return _shapes(engine, args, kwargs)
    return stage.run(call, args, kwargs)


def _shapes(engine: StagedEngine, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What torch finds out shapes by, and drops: the plain model, which sees zeros in the place of examples."""
    hide = torch.ones((), dtype=torch.bool)
    zeros = pytree.tree_map(
        lambda x: x.masked_fill(hide.to(x.device), 0) if isinstance(x, Tensor) else x, (args, kwargs)
    )
    return engine.module(*zeros[0], **zeros[1])


def _check_dims(call: StageCall, dims: Sequence[tuple[str, Tensor, int | None]], args: tuple[Any, ...]) -> None:
    """What passes from stage to stage has the examples on dimension 0."""
    positional = {id(x) for x in pytree.tree_leaves(args)}
    for name, tensor, dim in dims:
        wrong = dim != 0 if id(tensor) in positional and not call.stage.is_first else dim not in (0, None)
        if wrong:
            raise UnsupportedGraphError(
                f"in_dims gives {dim} for '{name}' of stage {call.stage.stage_index}: schedules divide batches along "
                "dimension 0, and stages hand on rows of examples there",
                remedy="leave in_dims out for what comes from the stage before; move the examples to dimension 0",
            )


def _stage_of(stage: Any) -> Stage:
    """The private model that a ``PipelineStage`` runs."""
    own = stage.submod.__dict__
    found = _STAGES.get(id(own))
    if found is None or found.engine.module.__dict__ is not own:
        raise PrivacyError(
            f"the module of stage {stage.stage_index}, a {type(stage.submod).__name__}, is not private itself: nothing "
            "would clip the rest of it",
            remedy="PipelineStage(dp_compile(part, pipeline=...), ...), for every stage; no module around it",
        )
    return found


def _place_for_weights(stage: Any, chunk: int) -> None:
    found = _stage_of(stage)
    if found.rank is not None:
        found.rank.release("W", stage.stage_index, chunk)
