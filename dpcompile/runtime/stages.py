"""Stages of a pipeline: micro-batches whose backward is over wait here for the norms of the other stages.

A stage's backward knows the squared norms of its own parameters alone. They are kept with what the clipped sums need
(the deferred lowering) until the schedule is over. :meth:`Stage.complete`, which ``DPOptimizer.step`` calls on every
rank, then adds the norms of all micro-batches up over the stages in one all-reduce; weights and clipped sums follow on
each rank. One all-reduce for a micro-batch would have to be waited for between the sends of a schedule, whose order is
the schedule's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpcompile._torch import pytree
from dpcompile._torch.pipelining import StageCall, leave_weights
from dpcompile.batches.draws import Given
from dpcompile.distributed.pipeline import added_up, agreed, same_on_all
from dpcompile.distributed.ranks import refuse_other_place
from dpcompile.distributed.shards import computing_device
from dpcompile.errors import PrivacyError, UnsupportedGraphError, running_line
from dpcompile.runtime.micro_batches import MicroBatches
from dpcompile.runtime.stage_checks import StagedEngine, Waiting, facts_of, fault_of, layout_of

__all__ = ["Stage", "call_in_stage"]

_COMPARED = "the logical step", "the draw of the loader", "the part of the draw", "C or the noise", "rows or padding"


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
    copies of a parameter in stages of several ranks         not seen: each is clipped and noised by itself
    =======================================================  =======================================================

    Attributes:
        group: see above.
        first_parameter: how many parameters lie in the stages before this one, once it is known.
    """

    def __init__(self, engine: StagedEngine, group: Any, run: Callable[..., Any]) -> None:
        self._engine, self.group, self._run = weakref.ref(engine), group, weakref.WeakMethod(run)
        self.first_parameter = 0
        self._rank: _StagesOfRank | None = None
        self._batches = MicroBatches(engine)
        self._waiting: dict[int, Waiting] = {}
        self._cleared = 0
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
        given = self._given(call, [(t, dim) for _, t, dim in dims if dim is not None])
        run = self._run()
        assert run is not None
        return run(call.chunk, args, kwargs, given, last=call.stage.is_last)

    def _given(self, call: StageCall, tensors: Sequence[tuple[Tensor, int]]) -> Given:
        """What is said of a micro-batch that is about to run.

        Args:
            call: the schedule's.
            tensors: with examples, and their dimension.
        """
        self._join(call)
        self._drop_cleared()
        assert call.chunk is not None
        if not self._waiting:
            self._batches.begin(call.chunks)
        elif call.chunk in self._waiting:
            raise PrivacyError(
                "a second batch of the pipeline's schedule before the optimizer's step on the first",
                where=running_line(),
                remedy="call optimizer.step() after every schedule.step(...), on every rank (with "
                "optimizer.accumulating = True it waits); optimizer.discard() drops a batch",
            )
        return self._batches.given(call.chunk, tensors, first=call.stage.is_first)

    def expect(self, chunk: int, waiting: Waiting) -> None:
        """A micro-batch ran forward."""
        self._waiting[chunk], self._cleared = waiting, self.engine.ledger.cleared

    def complete(self) -> None:
        """The schedule's batch is over: every rank calls this before its optimizers' step, and each once.

        Raises:
            PrivacyError: see the class.
        """
        if self._rank is not None:
            self._rank.complete()

    def _drop_cleared(self) -> None:
        if self._waiting and self._cleared != self.engine.ledger.cleared:
            for waiting in self._waiting.values():
                waiting.refused = PrivacyError(
                    "a backward of a micro-batch that was dropped by zero_grad()",
                    remedy="call zero_grad() before schedule.step(...), or after optimizer.step()",
                )
            self._waiting = {}

    def _join(self, call: StageCall) -> None:
        """Find the other stages of this rank at the first call."""
        leave_weights(call.stage)
        if self._rank is None:
            _StagesOfRank.of(call)
        assert self._rank is not None
        self._rank.check(call, self)

    # --- for the stages of a rank ------------------------------------------------------------------------------------

    @property
    def waiting(self) -> Mapping[int, Waiting]:
        """Micro-batches on their way."""
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

    def take(self) -> list[Waiting]:
        """Micro-batches in their order, which wait no longer."""
        found, self._waiting = [self._waiting[i] for i in sorted(self._waiting)], {}
        return found

    def belongs_to(self, rank: _StagesOfRank) -> None:
        """It is one of these."""
        self._rank = rank


_STAGES: weakref.WeakValueDictionary[int, Stage] = weakref.WeakValueDictionary()  # by a module's own dict


class _StagesOfRank:
    """The stages of one pipeline that lie on this rank."""

    def __init__(self, stages: Mapping[int, Stage], count: int, group: Any) -> None:
        self._stages, self._count, self._group = dict(stages), count, group
        self._agreed = False

    @classmethod
    def of(cls, call: StageCall) -> _StagesOfRank:
        """Those of the schedule that runs."""
        found = {s.stage_index: _stage_of(s) for s in call.local}
        made = cls(found, call.stage.num_stages, _group_of(call.stage))
        made._refuse_ties()
        for stage in found.values():
            stage.belongs_to(made)
        return made

    def check(self, call: StageCall, stage: Stage) -> None:
        """Raise PrivacyError if a schedule runs other stages than the first did, or another module in a stage."""
        same = self._stages.get(call.stage.stage_index) is stage is _stage_of(call.stage)
        local = {s.stage_index for s in call.local} == set(self._stages)
        if not (same and local and call.stage.num_stages == self._count):
            raise PrivacyError(
                "the schedule runs other stages than the one that ran before",
                remedy="call dp_compile anew for stages that are divided otherwise",
            )
        if _group_of(call.stage).group_name != stage.group.group_name:
            raise PrivacyError(
                "the PipelineStage has another process group than dp_compile was given: norms would be added up over "
                "other ranks than those that hold the stages",
                remedy="PipelineStage(..., group=group) and dp_compile(..., pipeline=group); without group: "
                "pipeline=True",
            )

    @torch.no_grad()
    def complete(self) -> None:
        """See :meth:`Stage.complete`."""
        stages = [self._stages[i] for i in sorted(self._stages)]
        if not any(s.waiting for s in stages):
            return
        engine = stages[0].engine
        device = computing_device(next(iter(engine.parameters().values())))
        fault = fault_of(stages)
        self._compare(stages, fault, device)
        batches = [s.take() for s in stages]
        own = [torch.stack([w.own_squared() for w in of_all]).sum(0) for of_all in zip(*batches, strict=True)]
        for squared, of_all in zip(added_up(own, device, self._group), zip(*batches, strict=True), strict=True):
            for waiting in of_all:
                waiting.conclude(squared)

    def _compare(self, stages: Sequence[Stage], fault: PrivacyError | None, device: torch.device) -> None:
        engine = stages[0].engine
        place = engine.place() or (0, 0, 0)
        layout = 0 if fault else layout_of(stages)
        numbers = [place[0], *stages[0].batch, place[2], layout, fault is not None, self._agreed]
        *same, healthy, known = same_on_all(numbers, device, self._group)
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
                {i: facts_of(s.engine, self._count) for i, s in self._stages.items()}, self._count, stages[0].ranks
            )
            for index, stage in self._stages.items():
                stage.first_parameter = first[index]
            self._agreed = True
        if dist.get_world_size() != stages[0].ranks:
            refuse_other_place(engine.place(), device)

    def _refuse_ties(self) -> None:
        owners: dict[int, int] = {}
        for index, stage in self._stages.items():
            for name, parameter in stage.engine.parameters().items():
                if owners.setdefault(id(parameter), index) != index:
                    raise UnsupportedGraphError(
                        f"parameter '{name}' is in stages {owners[id(parameter)]} and {index}: its gradients add "
                        "before the norm is taken, and stages take norms by themselves",
                        remedy="give each stage a parameter of its own, or put both uses into one stage",
                    )


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


def _group_of(stage: Any) -> Any:
    return dist.group.WORLD if stage.group is None else stage.group
