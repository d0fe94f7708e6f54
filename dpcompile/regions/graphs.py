"""The graphs of a model in regions: compiled once where they are equal, and run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from dpcompile._torch.aot import add_inputs
from dpcompile._torch.dynamo import is_whole_call
from dpcompile._torch.tensors import base_of, memory_of
from dpcompile.capture.roles import arguments_of
from dpcompile.distributed.ranks import any_rank
from dpcompile.graph.labels import Label, Shared
from dpcompile.options import AT_ONCE, DEFERRED, TWO_PASS, Lowering, Options
from dpcompile.pipeline import Transformed
from dpcompile.planning.plan import Plan
from dpcompile.planning.region_memory import RegionMemory, describe, peaks_of
from dpcompile.proof.unowned import guarded
from dpcompile.regions.backward import Pass, RegionRun, attach, shared_in_two_passes
from dpcompile.regions.checkpoints import checkpoint_of, unwrap_units, unwrap_whole
from dpcompile.regions.graph_breaks import Between, Following, check_inputs_between
from dpcompile.regions.graph_key import graph_key
from dpcompile.regions.lowerings import lowering_of
from dpcompile.regions.owners import Owners
from dpcompile.regions.rank_parts import RankParts, memory_holder
from dpcompile.regions.region import Artifact, Scope, compile_region, concrete
from dpcompile.regions.replayed import enclose
from dpcompile.regions.skeleton import Piece, Skeleton, holds_units, whole_piece
from dpcompile.regions.units import Unit, as_it_is
from dpcompile.runtime.example_memory import Kept
from dpcompile.runtime.kept_numbers import reads_of

__all__ = ["Frame", "RegionGraphs", "RegionPlans"]


@dataclass(slots=True)
class Frame:
    """A unit, or a piece of one, that is running; ``recompute`` if it stands under a checkpoint."""

    unit: Unit
    scope: Scope
    recompute: bool = False


@dataclass(frozen=True, slots=True)
class RegionPlans:
    """The plans of a model's regions, equal regions once; printed one after the other.

    Attributes:
        plans: of the regions.
        lowering: which lowering was chosen for the model, and why; empty without a choice.
    """

    plans: tuple[Plan, ...]
    lowering: str = ""

    def rules(self) -> dict[str, str]:
        """Parameter name -> rule, of the first of equal regions."""
        return {name: rule for plan in self.plans for name, rule in plan.rules().items()}

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.plans), *([self.lowering] if self.lowering else [])])


RunUnit: TypeAlias = "Callable[[Unit, Any, Any, list[Label | None], bool], tuple[Any, list[Label]]]"
CheckLive: TypeAlias = Callable[[Sequence[str], Sequence[Tensor], bool], None]


class RegionGraphs:
    """Compiles what Dynamo captures of a model in regions, and runs it.

    A graph around units is cut at their calls. Labels of the proof pass from piece to piece with the values.

    Args:
        options: of the model.
        kept: what is known of memory that holds examples.
        note_given: takes arguments of a call without gradients.
        run_unit: runs a unit; takes the labels of the tensors among its arguments, and answers with those of its
            results.
        check_live: raises if a parameter is not the object that the optimizer knows.
        apart: the parameters as autograd may see them.
        parts: what lies on other ranks of tensor parallelism.
        owners: which units hold a parameter.

    Attributes:
        compilations: how many graphs were compiled.
        transformed: of the graph that was compiled last.
        frames: what is running, innermost last.
        proving: whether the current forward may have a backward.
        whole: of the current forward, if it may have one.
        memory: of the regions of the current forward, in order: see :func:`dpcompile.planning.region_memory.peaks_of`.
        groups: clip group -> the trainable parameters in it.
        two_pass: whether regions run their backward twice.
        shared: parameters that several regions use.
        breaks: whether graph breaks are allowed.
        between: watches what runs between graphs, where graph breaks are allowed.
        held: tensors that the modules held when the call began, by identity.
        codes: of the functions that call units.
        ran: whether a graph ran in the current forward.
    """

    def __init__(
        self,
        options: Options,
        kept: Kept,
        note_given: Callable[[Sequence[Any]], None],
        run_unit: RunUnit,
        check_live: CheckLive,
        apart: Callable[[Sequence[Tensor]], Sequence[Tensor]],
        parts: RankParts,
        owners: Owners,
    ) -> None:
        self._options, self._kept, self._note_given = options, kept, note_given
        self._run_unit, self._check_live, self._apart, self.parts = run_unit, check_live, apart, parts
        self._owners = owners
        self._artifacts: dict[Any, Artifact] = {}
        self._plans: dict[int, Plan] = {}
        self.compilations = 0
        self.transformed: Transformed | None = None
        self.frames: list[Frame] = []
        self.proving = False
        self.whole: Pass | None = None
        self.memory: list[tuple[RegionMemory, bool, bool]] = []
        self.groups: Mapping[str, frozenset[str]] = {}
        self.two_pass = False
        self.shared: set[str] = set()
        self.breaks = options.regions == "breaks"
        self.between = Between(self._holds_examples, self._parameter_behind)
        self.held: dict[int, Tensor] = {}
        self.codes: set[CodeType] = set()
        self.ran = False

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Of every graph with trainable parameters, equal ones once."""
        return tuple(self._plans.values())

    def choose(self, budget: float | int, standing: float, *, sharded: bool) -> str:
        """Choose between one backward and two, after a first forward; with two, everything is compiled again.

        Args:
            budget: a float is a multiple of the non-private step's peak, an int is bytes.
            standing: bytes of parameters and inputs.
            sharded: on every rank there are two if there are on one; every rank must call this.

        Returns:
            What was chosen, and why.
        """
        peaks = peaks_of(self.memory, standing)
        allowed = budget * peaks.plain if isinstance(budget, float) else float(budget)
        obstacle = self._obstacle()
        over = peaks.deferred > allowed and not obstacle
        self.two_pass = any_rank(over) if sharded else over
        if self.two_pass:
            self._artifacts, self._plans, self.memory = {}, {}, []
        return describe(peaks, allowed, two_pass=self.two_pass, obstacle=obstacle)

    def _obstacle(self) -> str:
        """Why there cannot be two passes; empty if there can."""
        if self.parts.parallel is not None:
            return "tensor parallelism"
        if self.breaks:
            return "graph breaks"
        shared = [n for members in self.groups.values() for n in members if n in self.shared]
        return f"'{min(shared)}' is used in several regions" if shared else ""

    def backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """What ``torch.compile`` calls with a graph."""
        unwrapped = unwrap_units(gm)
        whole = holds_units(unwrapped)
        inside = None if whole else unwrap_whole(gm)
        local = self.parts.localise(unwrapped if whole else gm if inside is None else inside, inputs)

        arguments, reads = arguments_of(gm), reads_of(self.frames[-1].unit.module)
        whole_call = not self.breaks or is_whole_call(self.codes)

        def look(live: Sequence[Any]) -> None:
            self.ran, module = True, self.frames[-1].unit.module
            if self.proving:
                self._kept.check_constants(reads, module, whole=whole_call)
                return
            self._kept.numbers.read(reads, module, whole=whole_call)
            if not self.frames[-1].unit.path:
                self._note_given([live[p] for p in arguments])

        def plain(live: Sequence[Any]) -> list[Any]:
            look(live)
            return self.parts.inputs(local, live, self.frames[-1].scope)

        if self.breaks:
            return self._late(gm, local.graph, look, recompute=inside is not None)
        if whole:
            skeleton = Skeleton(local.graph)
            return lambda *live: self._run_skeleton(skeleton, plain(live))
        values = plain(inputs)
        artifact = self._artifact(local.graph, values, lambda: values)
        return lambda *live: self._run_artifact(artifact, plain(live), inside is not None)

    def _late(
        self,
        gm: fx.GraphModule,
        inside: fx.GraphModule,
        look: Callable[[Sequence[Any]], None],
        *,
        recompute: bool,
    ) -> Callable[..., Any]:
        """A graph between breaks: compiled when it runs, for how its inputs lie then, of which Dynamo has no guard."""
        skeleton = Skeleton(inside) if holds_units(inside) else None
        piece = whole_piece(inside)
        known: dict[Any, Artifact] = {}

        def run(*live: Any) -> Sequence[Any]:
            with self.between.paused():
                scope = self.frames[-1].scope
                look(live)
                if self.proving:
                    self.between.check()
                    check_inputs_between(gm, live, scope.knows, self.held)
                if skeleton is not None:
                    return self._run_skeleton(skeleton, live)
                situation = (torch.is_grad_enabled(), self.proving, tuple(scope.kind(x) for x in live))
                if situation not in known:
                    copied = add_inputs(piece.graph, {})
                    known[situation] = self._artifact(copied, live, lambda: piece.fakes(live))
                return self._run_artifact(known[situation], live, recompute)

        return run

    def _holds_examples(self, tensor: Tensor) -> bool:
        label = self.frames[-1].scope.label(tensor) if self.frames else None
        return self._kept.holds(tensor) or not (label is None or isinstance(label, Shared))

    def _parameter_behind(self, tensor: Tensor) -> str | None:
        names = self.frames[-1].scope.parameters if self.frames else {}
        name = names.get(id(tensor)) or names.get(id(base_of(tensor)))
        trainable = name is not None and any(name in members for members in self.groups.values())
        return name if trainable else None

    def watch_anew(self, held: dict[int, Tensor]) -> None:
        """A forward begins, and the modules hold these tensors."""
        self.held = held
        self.between = Between(self._holds_examples, self._parameter_behind)

    def follow_anew(self) -> None:
        """A forward begins in which nothing is trained."""
        self.between = Following(self._kept)

    def _artifact(self, gm: fx.GraphModule, live: Sequence[Any], examples: Callable[[], Sequence[Any]]) -> Artifact:
        """What a graph is compiled to; an equal one is taken from those that were compiled before."""
        frame, lowering = self.frames[-1], self._lowering(live)
        key = graph_key(gm, live, frame.scope, self.proving)
        if key is not None:
            key = (key, lowering)
        if key is None or key not in self._artifacts:
            self.compilations += 1
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.proving):
                over_ranks = partial(self.parts.over_ranks, live)
                place = f"'{frame.unit.path}'" if frame.unit.path else "what lies around the model's blocks"
                artifact = compile_region(
                    gm, live, examples(), frame.scope, self._options, lowering, over_ranks, self.proving, place
                )
            if artifact.transformed is not None:
                self.transformed = artifact.transformed
                self._plans[id(artifact)] = artifact.transformed.plan
            if key is None:
                return artifact
            self._artifacts[key] = artifact
        return self._artifacts[key]

    def _run_skeleton(self, skeleton: Skeleton, live: Sequence[Any]) -> Sequence[Any]:
        frame = self.frames[-1]
        scope = frame.scope

        def piece(part: Piece, values: list[Any], labels: list[Label | None]) -> tuple[Sequence[Any], Sequence[Label]]:
            inner = Scope(scope.parameters, self.shared)
            for value, label, node in zip(values, labels, part.inputs, strict=True):
                if isinstance(value, Tensor) and label is not None:
                    inner.note(value, node.name, label)
            recompute = frame.recompute or part.recompute
            self.frames.append(Frame(frame.unit, inner, recompute))
            try:
                copied = add_inputs(part.graph, {})  # what is compiled may be written into
                artifact = self._artifact(copied, values, lambda: part.fakes(values))
                outputs = self._run_artifact(artifact, values)
            finally:
                self.frames.pop()
            return outputs, [inner.label(x) or Shared() for x in outputs]

        children = {child.handle: child for child in frame.unit.children}

        def unit(node: fx.Node, args: Any, kwargs: Any, labels: list[Label | None]) -> tuple[Any, list[Label]]:
            handle: Any = node.args[0]
            recompute = frame.recompute or checkpoint_of(node) is not None
            child = children[handle]
            with as_it_is(child):
                return self._run_unit(child, args, kwargs, labels, recompute)

        self.shared |= self._owners.repeated(frame.unit, skeleton, live, scope.parameters)
        known = [scope.label(x) if isinstance(x, Tensor) else None for x in live]
        outputs, labels = skeleton.run(live, known, piece, unit)
        for output, label in zip(outputs, labels, strict=True):
            if isinstance(output, Tensor) and label is not None:
                scope.note(output, "an output", label)
        return outputs

    def _run_artifact(self, artifact: Artifact, inputs: Sequence[Any], recompute: bool = False) -> Sequence[Any]:
        frame = self.frames[-1]
        recompute |= frame.recompute
        scope, roles = frame.scope, artifact.roles
        if roles is None:
            assert artifact.untrained is not None
            return self._kept.run(artifact.untrained, inputs)
        for p in roles.examples:
            label = scope.label(inputs[p])
            assert label is not None and not isinstance(label, Shared), "examples where a graph expects none, or not"
        for p, name in roles.outside.items():
            self._kept.check_input(name, inputs[p])
        for p, name in roles.others.items():
            if isinstance(inputs[p], Tensor):
                self.parts.check_copy(roles, p, name, inputs[p])
        positions, whole = artifact.trained, self.whole
        run = self._started(artifact, positions, inputs) if positions else None
        if artifact.transformed is not None and artifact.transformed.memory is not None:
            self.memory.append((artifact.transformed.memory, recompute, artifact.lowering.kind == AT_ONCE))
        twice = self.two_pass and whole is not None
        if whole is not None and (twice or recompute) and torch.is_grad_enabled() and _differentiable(inputs):
            sharded = frame.unit.sharded
            outputs, probe = enclose(artifact, inputs, whole, run, recompute=recompute, sharded=sharded)
            if run is not None:
                run.probe = probe
        elif run is not None:
            norms, aliases = attach(run, self._apart([inputs[p] for p in positions]))
            arguments = list(inputs)
            for p, alias in zip(positions, aliases, strict=True):
                arguments[p] = alias
            outputs = artifact.compiled(*arguments, run.whole.mask, norms, run.given)
        else:
            outputs = artifact.compiled(*inputs)
        if run is not None:
            run.whole.unscaling.before_backward_of(outputs)
        outputs = guarded(outputs, artifact.unowned)
        labels = [concrete(label, artifact.symbols, inputs) for label in artifact.labels]
        self._kept.note(outputs, labels)
        for output, label in zip(outputs, labels, strict=True):
            if isinstance(output, Tensor):
                scope.note(output, f"an output of {frame.unit.path or 'the model'}", label)
        return outputs

    def _started(self, artifact: Artifact, positions: list[int], inputs: Sequence[Any]) -> RegionRun:
        """A region with trainable parameters is about to run on these inputs."""
        frame, whole = self.frames[-1], self.whole
        assert whole is not None and artifact.transformed is not None and artifact.roles is not None
        names = [frame.scope.parameters[id(inputs[p])] for p in positions]
        parameters = [inputs[p] for p in positions]
        assert len(set(names)) == len(names) and all(p.requires_grad for p in parameters), names
        assert self.lowering_of(names) == artifact.lowering, names
        self._check_live(names, self.parts.originals(parameters), frame.unit.sharded)
        self.parts.check_cut(artifact, names)
        chosen = artifact.transformed.plan.rules()
        own = [artifact.roles.parameters[p] for p in positions]
        touched = [name for name, first in zip(names, own, strict=True) if first in chosen]
        gathered = frame.unit.module.parameters() if frame.unit.sharded else ()
        memory = frozenset(memory_of(memory_holder(p)) for p in gathered)
        uses = artifact.transformed.uses
        handed = {n: uses[o] for n, o in zip(names, own, strict=True) if o in uses}
        return whole.run(names, touched, artifact.lowering, frame.unit.path, memory, handed)

    def _lowering(self, live: Sequence[Any]) -> Lowering:
        known = self.frames[-1].scope.parameters
        trained = (id(x) for x in live if isinstance(x, Tensor) and x.requires_grad)
        return self.lowering_of([known[i] for i in trained if i in known])

    def lowering_of(self, names: Sequence[str]) -> Lowering:
        """Of a region with these trainable parameters.

        **Guarantee.** A region with a parameter that is known to be used in another region too is never clipped at
        once: its clip group is not whole there. Nor is any where graph breaks are allowed, and uses are only found as
        they run.

        Raises:
            UnsupportedGraphError: two passes, and another region uses one of the parameters too.
        """
        shared = next((n for n in names if n in self.shared), None)
        if self.two_pass and shared is not None:
            raise shared_in_two_passes(shared)
        if self.parts.parallel is not None:
            return Lowering()  # norms are added up over ranks before any weight is known
        if not self.two_pass and (self.breaks or shared is not None):
            return Lowering()
        kind = TWO_PASS if self.two_pass else DEFERRED
        return lowering_of(names, self._options.clipping, self.groups, kind)


def _differentiable(inputs: Sequence[Any]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
