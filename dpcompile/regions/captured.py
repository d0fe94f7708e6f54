"""What Dynamo captures of a unit: its call as a compiled function, and its graphs as they run within a forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import fx, nn

from dpcompile._torch.aot import add_inputs
from dpcompile._torch.dynamo import is_whole_call
from dpcompile.capture.localise import Localised
from dpcompile.capture.roles import arguments_of
from dpcompile.graph.labels import Label
from dpcompile.options import Options
from dpcompile.regions.checkpoints import unwrap_units, unwrap_whole
from dpcompile.regions.compiled import CompiledRegions
from dpcompile.regions.graph_breaks import check_inputs_between
from dpcompile.regions.rank_parts import RankParts, plain_inputs, wrapped_outputs
from dpcompile.regions.region import CompiledRegion
from dpcompile.regions.run import RegionForward
from dpcompile.regions.skeleton import Piece, Skeleton, holds_units, whole_piece
from dpcompile.regions.units import Unit
from dpcompile.runtime.base import with_own_code
from dpcompile.runtime.changing_numbers import constants_where_needed
from dpcompile.runtime.forward import Running
from dpcompile.runtime.kept_numbers import Reads, reads_of

__all__ = ["CapturedCalls"]


class CapturedCalls:
    """The calls of a model's units, compiled: one function for units of a kind whose arguments lie alike.

    Args:
        options: of the model.
        graphs: what its regions are compiled to.
        parts: what lies on other ranks of tensor parallelism.
        running: the forward that is being run.
    """

    def __init__(
        self, options: Options, graphs: CompiledRegions, parts: RankParts, running: Running[RegionForward]
    ) -> None:
        self._options, self._graphs, self._parts, self._running = options, graphs, parts, running
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._codes: set[CodeType] = set()  # of the functions

    def clear(self) -> None:
        """Everything is compiled anew."""
        self._functions.clear()

    def of(
        self, unit: Unit, function: Callable[..., Any], given: Sequence[Label | None], *, proving: bool
    ) -> Callable[..., Any]:
        """The compiled call for units of this kind, arguments that lie like this, and these trainable parameters."""
        own = {n: p for n, p in nn.Module.named_parameters(unit.module, remove_duplicate=False)}
        key = (
            type(unit.module),
            unit.handle if unit.children else None,
            function,
            proving,
            tuple(map(str, given)),
            tuple((n, p.requires_grad) for n, p in own.items()),
            self._graphs.of_unit(unit),
            tuple(m.training for m in unit.module.modules()),
        )
        if key not in self._functions:
            copied = with_own_code(function, type(unit.module).__name__)
            self._codes.add(copied.__code__)
            breaks = self._graphs.breaks
            dynamic = False if unit.children or breaks else self._options.dynamic
            self._functions[key] = torch.compile(
                copied, backend=constants_where_needed(self._backend), fullgraph=not breaks, dynamic=dynamic
            )
        return self._functions[key]

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """What ``torch.compile`` calls with a graph, while the forward runs that is to go through it."""
        unwrapped = unwrap_units(gm)
        whole = holds_units(unwrapped)
        inside = None if whole else unwrap_whole(gm)
        local = self._parts.localise(unwrapped if whole else gm if inside is None else inside, inputs)
        forward = self._running.now
        whole_call = not self._graphs.breaks or is_whole_call(self._codes)
        reads = reads_of(forward.frame.unit.module)
        graph = _Captured(self._running, local, arguments_of(gm), reads, whole_call, inside is not None)
        if self._graphs.breaks:
            skeleton = Skeleton(local.graph) if holds_units(local.graph) else None
            return _Late(graph, gm, skeleton, whole_piece(local.graph))
        if whole:
            skeleton = Skeleton(local.graph)
            return lambda *live: graph.outputs(self._running.now.run_skeleton(skeleton, graph.inputs(live)))
        values = graph.inputs(inputs)
        region = forward.region(local.graph, values, lambda: values)
        return lambda *live: graph.outputs(self._running.now.run_region(region, graph.inputs(live), graph.recompute))


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph as Dynamo captured it.

    Attributes:
        running: the forward that is being run.
        local: the graph, with plain tensors for inputs.
        arguments: positions of the inputs that it reads out of the call's arguments.
        reads: what of the module it has as constants.
        whole_call: whether no Python of the model runs beside it.
        recompute: whether all of it stands under a checkpoint.
    """

    running: Running[RegionForward]
    local: Localised
    arguments: Sequence[int]
    reads: Reads
    whole_call: bool
    recompute: bool

    def look(self, live: Sequence[Any]) -> None:
        """Before it is compiled for these inputs, or runs on them: what the model keeps of examples stays out."""
        self.running.now.look(self.reads, [live[p] for p in self.arguments], whole=self.whole_call)

    def inputs(self, live: Sequence[Any]) -> list[Any]:
        """Its own inputs, from those of Dynamo's graph."""
        self.look(live)
        return plain_inputs(self.local, live, self.running.now.stand_ins, self.running.now.frame.scope)

    def outputs(self, values: Sequence[Any]) -> Sequence[Any]:
        """What Dynamo's graph returns, from its own outputs."""
        if not self.local.wrapped:
            return values
        forward = self.running.now
        return wrapped_outputs(self.local, values, forward.frame.scope, turns=forward.forward.given.reduces is not None)


@dataclass(slots=True)
class _Late:
    """A graph between breaks: compiled when it runs, for how its inputs lie then, of which Dynamo has no guard.

    Attributes:
        graph: that.
        gm: as Dynamo has it.
        skeleton: if it calls units.
        piece: if it does not.
        known: situation -> what it was compiled to.
    """

    graph: _Captured
    gm: fx.GraphModule
    skeleton: Skeleton | None
    piece: Piece
    known: dict[Any, CompiledRegion] = field(default_factory=dict)

    def __call__(self, *live: Any) -> Sequence[Any]:
        forward = self.graph.running.now
        with forward.watch.paused():
            scope = forward.frame.scope
            self.graph.look(live)
            if forward.proving:
                forward.watch.check()
                check_inputs_between(self.gm, live, scope.knows, forward.held)
            if self.skeleton is not None:
                return forward.run_skeleton(self.skeleton, live)
            situation = (torch.is_grad_enabled(), forward.proving, tuple(scope.kind(x) for x in live))
            if situation not in self.known:
                copied = add_inputs(self.piece.graph, {})
                self.known[situation] = forward.region(copied, live, lambda: self.piece.fakes(live))
            return forward.run_region(self.known[situation], live, self.graph.recompute)
