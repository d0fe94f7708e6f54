"""Compiled regions as they run within one forward, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile._torch.tensors import memory_of
from dpcompile.capture.localise import StandIns
from dpcompile.graph.labels import Shared
from dpcompile.options import AT_ONCE
from dpcompile.planning.region_memory import RegionMemory
from dpcompile.proof.unowned import guarded
from dpcompile.regions.backward import RegionBackward, RegionRun, attach
from dpcompile.regions.compiled import CompiledRegions
from dpcompile.regions.rank_parts import RankParts, memory_holder
from dpcompile.regions.region import CompiledRegion, Scope, concrete
from dpcompile.regions.replayed import enclose
from dpcompile.regions.units import Unit
from dpcompile.runtime.base import Engine
from dpcompile.runtime.forward import Forward
from dpcompile.runtime.kept_numbers import Reads

__all__ = ["Frame", "RegionRunner"]


@dataclass(slots=True)
class Frame:
    """A unit, or a piece of one, that is running; ``recompute`` if it stands under a checkpoint."""

    unit: Unit
    scope: Scope
    recompute: bool = False

    @property
    def place(self) -> str:
        """What to call it."""
        return f"'{self.unit.path}'" if self.unit.path else "what lies around the model's blocks"


@dataclass(eq=False, slots=True, kw_only=True)
class RegionRunner:
    """Runs regions within one forward. Labels of the proof pass from one to the next with the values.

    Attributes:
        engine: of the model.
        forward: the call.
        graphs: what regions are compiled to.
        parts: what lies on other ranks of tensor parallelism.
        backward: where norms and sums meet; None of a forward that may have no backward.
        frames: what is running, innermost last.
        stand_ins: the plain tensors in the place of what lies on several ranks.
        memory: of the regions, in order: see :func:`dpcompile.planning.region_memory.peaks_of`.
    """

    engine: Engine
    forward: Forward
    graphs: CompiledRegions
    parts: RankParts
    backward: RegionBackward | None
    frames: list[Frame] = field(default_factory=list)
    stand_ins: StandIns = field(default_factory=StandIns)
    memory: list[tuple[RegionMemory, bool, bool]] = field(default_factory=list)

    @property
    def proving(self) -> bool:
        """Whether a backward may follow."""
        return self.backward is not None

    @property
    def frame(self) -> Frame:
        """What is running now."""
        return self.frames[-1]

    def look(self, reads: Reads, arguments: Sequence[Any], *, whole: bool) -> None:
        """A graph is to run, or be compiled: nothing that the model kept of examples may come into it.

        Args:
            reads: what of the module it has as constants.
            arguments: those of the call that it reads.
            whole: whether no Python of the model runs beside it.
        """
        self.forward.ran, unit, kept = True, self.frame.unit, self.engine.kept
        if self.proving:
            kept.check_constants(reads, unit.module, whole=whole)
            return
        kept.numbers.read(reads, unit.module, whole=whole)
        if not unit.path:
            self.engine.note_given(self.forward, arguments)

    def region(self, gm: fx.GraphModule, live: Sequence[Any], examples: Callable[[], Sequence[Any]]) -> CompiledRegion:
        """What a graph is compiled to, for these inputs; ``examples`` makes what to trace with."""
        scope, place = self.frame.scope, self.frame.place
        on_ranks = partial(self.parts.on_ranks, live, self.stand_ins, scope)
        return self.graphs.region(gm, live, examples, scope, on_ranks, proving=self.proving, place=place)

    def run_region(self, region: CompiledRegion, inputs: Sequence[Any], recompute: bool = False) -> Sequence[Any]:
        """Run a region on these inputs; with ``recompute``, keep of it for the backward nothing but them."""
        frame, kept = self.frame, self.engine.kept
        scope, roles = frame.scope, region.roles
        if roles is None:
            assert region.untrained is not None
            return kept.run(region.untrained, inputs)
        for p in roles.examples:
            label = scope.label(inputs[p])
            assert label is not None and not isinstance(label, Shared), "examples where a graph expects none, or not"
        for p, name in roles.outside.items():
            kept.check_input(name, inputs[p])
        for p, name in roles.others.items():
            if isinstance(inputs[p], Tensor):
                self.parts.check_copy(roles, p, name, inputs[p])
        recompute |= frame.recompute
        if region.transformed is not None and region.transformed.memory is not None:
            self.memory.append((region.transformed.memory, recompute, region.lowering.kind == AT_ONCE))
        outputs = guarded(self._outputs(region, inputs, recompute), region.unowned)
        labels = [concrete(label, region.symbols, inputs) for label in region.labels]
        kept.note(outputs, labels)
        for output, label in zip(outputs, labels, strict=True):
            if isinstance(output, Tensor):
                scope.note(output, f"an output of {frame.unit.path or 'the model'}", label)
        return outputs

    def _outputs(self, region: CompiledRegion, inputs: Sequence[Any], recompute: bool) -> Sequence[Any]:
        """What a region returns; its norms and sums, if it is trained, are on their way to :attr:`backward`."""
        positions, whole = region.trained, self.backward
        run = self._started(region, positions, inputs) if positions else None
        twice = self.graphs.two_pass and whole is not None
        if whole is not None and (twice or recompute) and torch.is_grad_enabled() and _differentiable(inputs):
            sharded = self.frame.unit.sharded
            outputs, probe = enclose(region, inputs, whole, run, recompute=recompute, sharded=sharded)
            if run is not None:
                run.probe = probe
        elif run is not None:
            norms, aliases = attach(run, self.engine.replicas.apart([inputs[p] for p in positions]))
            arguments = list(inputs)
            for p, alias in zip(positions, aliases, strict=True):
                arguments[p] = alias
            outputs = region.compiled(*arguments, run.whole.mask, norms, run.given)
        else:
            outputs = region.compiled(*inputs)
        if run is not None:
            run.whole.unscaling.before_backward_of(outputs)
        return outputs

    def _started(self, region: CompiledRegion, positions: list[int], inputs: Sequence[Any]) -> RegionRun:
        """A region with trainable parameters is about to run on these inputs."""
        frame, whole = self.frame, self.backward
        assert whole is not None and region.transformed is not None and region.roles is not None
        assert region.lowered is not None
        parameters = [inputs[p] for p in positions]
        names = [frame.scope.parameters[id(p)] for p in parameters]
        assert len(set(names)) == len(names) and all(p.requires_grad for p in parameters), names
        assert self.graphs.lowering_of(names) == region.lowering, names
        originals = (self.stand_ins.original(p) for p in parameters)
        self.engine.check_parameters(zip(names, originals, strict=True), gathered=frame.unit.sharded)
        self.parts.check_cut(region, names)
        chosen = region.transformed.plan.rules()
        own = [region.roles.parameters[p] for p in positions]
        touched = [name for name, first in zip(names, own, strict=True) if first in chosen]
        gathered = frame.unit.module.parameters() if frame.unit.sharded else ()
        memory = frozenset(memory_of(memory_holder(p)) for p in gathered)
        uses = region.transformed.uses
        handed = {n: uses[o] for n, o in zip(names, own, strict=True) if o in uses}
        return whole.run(names, touched, region.lowered, frame.unit.path, memory, handed)


def _differentiable(inputs: Sequence[Any]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
