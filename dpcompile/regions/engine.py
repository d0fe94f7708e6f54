"""The engine of a model that is compiled in regions: one for each unit, and for what lies between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpcompile.batches.draws import Given
from dpcompile.capture.roles import no_example_axis
from dpcompile.capture.tracing import tracing_config
from dpcompile.distributed.borders import Border
from dpcompile.distributed.expert_parallel import find_expert_parallel
from dpcompile.distributed.ranks import refuse_some, world_size
from dpcompile.distributed.shards import local_part
from dpcompile.distributed.tensor_parallel import NormsOverRanks, find_tensor_parallel
from dpcompile.errors import UnsupportedGraphError
from dpcompile.options import Options
from dpcompile.planning.modes import MODES
from dpcompile.planning.plan import Plan
from dpcompile.proof.functions import ProvenClipping
from dpcompile.regions.backward import RegionBackward
from dpcompile.regions.between_stages import border_of
from dpcompile.regions.captured import CapturedCalls
from dpcompile.regions.compiled import CompiledRegions
from dpcompile.regions.fsdp import check_sharded, clear_failed, held_by_units
from dpcompile.regions.owners import Owners
from dpcompile.regions.rank_parts import RankParts
from dpcompile.regions.run import RegionForward
from dpcompile.regions.units import Unit, find_units, is_sharded, one_unit
from dpcompile.runtime.base import Engine
from dpcompile.runtime.forward import Forward, Running
from dpcompile.runtime.random_state import Snapshot
from dpcompile.runtime.stages import Stage
from dpcompile.runtime.sums import LocalSums, ShardedSums
from dpcompile.runtime.translate import translated
from dpcompile.runtime.watched_loss import watch_loss

__all__ = ["RegionEngine"]

Dims = Sequence[tuple[str, Tensor, int | None]]


class RegionEngine(Engine):
    """Compiles the units of a model one by one; equal ones share what was compiled.

    The model's own graph calls its units and is cut at these calls. Labels of the proof pass from piece to piece with
    the values; norms meet in a :class:`dpcompile.regions.backward.RegionBackward`.

    Attributes:
        graphs: what was compiled.
        running: the forward that is being run.
        lowering: in how many passes the backward runs, and why; empty if nobody asked.
    """

    def __init__(self, module: nn.Module, options: Options) -> None:
        super().__init__(module, options)
        self._sharded = any(is_sharded(m) for m in module.modules())
        if self._sharded and options.check:
            raise UnsupportedGraphError(
                "check=True compares with torch.func.vmap on whole parameters, and FSDP holds them in parts",
                remedy="check the model on one process before fully_shard",
            )
        stages = 1
        if options.pipeline is not None:
            self.stage, self.ledger.holds = Stage(self, options.pipeline, self._run_chunk), True
            stages = self.stage.ranks
        experts = find_expert_parallel(self._parameters, fsdp=self._sharded, pipeline=self.stage is not None)
        parallel = None
        if experts is None:
            parallel = find_tensor_parallel(self._parameters, fsdp=self._sharded, stages=stages)
        two_pass = MODES[options.norm].second_backward
        if parallel is not None or experts is not None:
            _check_parallel(options, "tensor" if experts is None else "expert", two_pass=two_pass)
        elif self.stage is not None and not self._sharded:
            refuse_some("a pipeline", stages)
        self._rank_parts = RankParts(parallel, experts)
        self._owners = Owners(module)
        # Norms are added up over ranks before any weight is known; and all ranks send rows in one order.
        deferred = any(x is not None for x in (parallel, experts, self.stage))
        self.graphs = CompiledRegions(options, self._owners, deferred=deferred, two_pass=two_pass)
        self.running: Running[RegionForward] = Running()
        self._calls = CapturedCalls(options, self.graphs, self._rank_parts, self.running)
        self.lowering = f"two passes: forced by norm={options.norm!r}" if two_pass else ""
        self._root: Unit | None = None
        self._clipping = ProvenClipping(options.clipping, options.max_grad_norm)

    @property
    def sharded(self) -> bool:
        """Whether the parameters are FSDP2's."""
        return self._sharded

    @property
    def distributed(self) -> bool:
        """Whether parameters lie on several ranks in parts, or clipped sums are added up over them."""
        return super().distributed or self._rank_parts.parallel is not None or self.stage is not None

    @property
    def data_ranks(self) -> int:
        """How many ranks, or groups of ranks, have examples of their own."""
        if self._rank_parts.parallel is not None:
            return self._rank_parts.parallel.data_ranks
        return super().data_ranks if self.stage is None else world_size() // self.stage.ranks

    @property
    def compilations(self) -> int:
        """How many graphs were compiled."""
        return self.graphs.compilations

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Of every graph with trainable parameters, equal ones once."""
        return self.graphs.plans

    def trace(self, *args: Any, **kwargs: Any) -> None:
        """Compile for these arguments. Regions have to run forward for that; nothing is kept."""
        with torch.enable_grad():
            self._run(Forward(args, kwargs, tracing=True))

    def _run_chunk(
        self, chunk: int, args: Any, kwargs: Any, given: Given, border: Border, *, last: bool
    ) -> tuple[Any, Border]:
        """A micro-batch of a pipeline, whose stages hand on rows of examples; and what is to be said of those."""
        border = self._rank_parts.labels_of(border)
        forward = Forward(args, kwargs, given, chunk=chunk, border=border, hands_on=not last)
        result = self._run(forward)
        if not last:
            behind = border_of(result, forward.labels, self.options.examples_per_user)
            return result, self._rank_parts.places_of(behind)
        watch_loss(result, forward.labels)
        return result, ()

    def _run(self, forward: Forward) -> Any:
        """One call of the compiled module."""
        try:
            self._record(forward)
            if forward.given.reduces is None:
                self.replicas.notice(tracing=False)
            with tracing_config(regions=True, dynamic=self.options.dynamic):
                return self._run_model(forward)[0] if self._decided() else self._decide(forward)
        except Exception as error:
            refusal = translated(error, partial(self.example_dims, forward.call))
            if refusal is None:
                raise
            raise refusal.with_traceback(None) from None

    def _run_model(self, forward: Forward) -> tuple[Any, RegionForward]:
        """What the model returns, and the forward that was run."""
        root = self._units()
        names = self.trainable()
        self.graphs.train(names)
        dims = self.example_dims(forward.call)
        backward = None
        if torch.is_grad_enabled() and names:
            self._rank_parts.check_copies(self.module)
            backward = self._new_backward(forward, root, dims)
        run = RegionForward(
            engine=self,
            forward=forward,
            graphs=self.graphs,
            parts=self._rank_parts,
            backward=backward,
            calls=self._calls,
            owners=self._owners,
        )
        try:
            with self.running.during(run):
                return run.run(root, dims), run
        finally:
            self.transformed = self.graphs.newest
            if backward is not None:
                self.graphs.share(backward.repeated)  # the next forward is compiled for it

    def _units(self) -> Unit:
        """The model as a tree of units, found at the first call."""
        if self._root is None:
            undivided = self._rank_parts.parallel is not None or self.stage is not None
            single = undivided and not self.sharded and self.options.regions is None
            breaks = self.graphs.breaks
            root = one_unit(self.module) if single else find_units(self.module, blocks=not breaks)
            self.graphs.share(self._owners.with_two_names() if breaks else self._owners.tied(root))
            if self.sharded:
                stages, parallel = 1 if self.stage is None else self.stage.ranks, self._rank_parts.parallel
                sharing = 1 if parallel is None else len(parallel.everyone)
                check_sharded(root, self._parameters, stages=stages, sharing=sharing)
            self._root = root
        if self.sharded and self.stage is None:  # a stage's micro-batches are under way together
            clear_failed(self._root)
        return self._root

    def _new_backward(self, forward: Forward, root: Unit, dims: Dims) -> RegionBackward:
        """Where the norms and sums of this forward meet."""
        batch = next(((t.shape[d], t.device) for _, t, d in dims if d is not None), None)
        if batch is None:
            raise no_example_axis()
        rows, device = batch
        options = replace(self.options, clipping=self._clipping.of(rows // self.options.examples_per_user, device))
        sums = ShardedSums(held_by_units(root, self._parameters), self._parameters) if self.sharded else LocalSums()
        awaited = self.await_backward(forward, *batch, sums)
        ranks, mask = None, awaited.mask
        if self._rank_parts.parallel is not None:
            own = forward.on_ranks()
            alike = [t for (_, t, dim), axes in zip(dims, own, strict=True) if dim is not None and not axes]
            ranks = NormsOverRanks.of(self._rank_parts.parallel, [*alike, mask])
        deliver, bounds = partial(self.deliver, awaited), self.clip.in_graph(forward.batch.bound)
        backward = RegionBackward(options, mask, sums, deliver, bounds, forward.batch.refused, ranks)
        if forward.chunk is not None:
            assert self.stage is not None
            backward.over = self.stage.expect(forward.chunk, backward)
        return backward

    # --- the lowering ------------------------------------------------------------------------------------------------

    def _decided(self) -> bool:
        """Whether it is known in how many passes the backward runs."""
        unasked = self.options.memory_budget is None or bool(self.lowering)
        return unasked or not (torch.is_grad_enabled() and self.trainable())

    def _decide(self, forward: Forward) -> Any:
        """The first forward under a memory budget: on every rank it runs again if one of them needs two passes."""
        budget = self.options.memory_budget
        assert budget is not None
        before = Snapshot.of(self.module)
        result, run = self._run_model(forward)
        tensors = (*self._parameters.values(), *(t for _, t, _ in self.example_dims(forward.call)))
        standing = sum(local_part(t.detach()).nbytes for t in tensors)
        self.lowering = self.graphs.choose(run.memory, budget, standing, sharded=self.sharded)
        if not self.graphs.two_pass:
            return result
        del result, run
        self._calls.clear()
        before.restore()
        return self._run_model(forward)[0]


def _check_parallel(options: Options, kind: str, *, two_pass: bool) -> None:
    """Raise UnsupportedGraphError for what cannot be had under tensor or expert parallelism."""
    if options.check:
        raise UnsupportedGraphError(
            f"check=True compares with torch.func.vmap on whole parameters, and {kind} parallelism holds parts",
            remedy="check the model on one process, before its parameters are cut",
        )
    if two_pass:
        raise UnsupportedGraphError(
            f"norm={options.norm!r} has two backward passes, and under {kind} parallelism there is one",
            remedy="use one backward: norm='auto', 'book_keeping', 'bk_mixed_ghost'",
        )
    if options.regions == "breaks":
        raise UnsupportedGraphError(
            f"regions='breaks' under {kind} parallelism: what Python does between graphs could differ from rank to "
            "rank, and nothing would tell",
            remedy="remove the graph breaks, and leave regions out or use regions='blocks'",
        )
