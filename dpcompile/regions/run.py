"""One forward of a model in regions, unit by unit and piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import Tensor, fx, nn

from dpcompile._torch import pytree
from dpcompile._torch.aot import add_inputs
from dpcompile._torch.tensors import base_of
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.labels import Label, Shared, as_ranks_own
from dpcompile.regions.checkpoints import checkpoint_of
from dpcompile.regions.compiled import CompiledRegions
from dpcompile.regions.graph_breaks import Following, GraphBreakWatch, check_hooks_between, compiled_alone
from dpcompile.regions.owners import Owners
from dpcompile.regions.rank_parts import refuse_outputs_of_ranks
from dpcompile.regions.region import Scope
from dpcompile.regions.replayed import end_forward
from dpcompile.regions.runner import Frame, RegionRunner
from dpcompile.regions.skeleton import Piece, Skeleton
from dpcompile.regions.units import Unit, as_it_is, stubs
from dpcompile.runtime.example_memory import ExampleMemory, held_tensors

__all__ = ["RegionForward", "UnitCalls"]

Calls = Callable[..., Any]
_HANDED = "the stage before hands it on so"


class UnitCalls(Protocol):
    """The calls of units as they are compiled; what is captured of them runs through :class:`RegionForward`."""

    def of(self, unit: Unit, function: Calls, given: Sequence[Label | None], *, proving: bool) -> Calls:
        """Takes the unit's module, its arguments and its keyword arguments."""
        ...


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module(*args, **kwargs)


def _forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return type(module).forward(module, *args, **kwargs)


@dataclass(eq=False, slots=True, kw_only=True)
class RegionForward(RegionRunner):
    """One forward: it is made at the call of the model, and nothing holds it afterwards.

    Attributes:
        calls: what units are compiled to.
        owners: which units hold a parameter.
        held: where graph breaks are allowed, tensors that the modules held when the call began, by identity.
        watch: there, watches what runs between graphs.
    """

    calls: UnitCalls
    owners: Owners
    held: dict[int, Tensor] = field(default_factory=dict)
    watch: GraphBreakWatch = field(init=False)

    def __post_init__(self) -> None:
        kept, frames = self.engine.kept, self.frames
        if self.graphs.breaks and not self.proving:
            self.watch = Following(kept)
        elif self.graphs.breaks:
            self.held = held_tensors(self.engine.module)
            self.watch = GraphBreakWatch(partial(_holds_examples, kept, frames), partial(_behind, self.graphs, frames))

    def run(self, root: Unit, dims: Sequence[tuple[str, Tensor, int | None]]) -> Any:
        """The model on the arguments of the call, whose example dimensions these are."""
        kept, forward = self.engine.kept, self.forward
        given: list[Label | None] = [
            as_ranks_own(self.engine.lies(t, dim) or Shared(), tuple((axis, _HANDED) for axis in axes))
            for (_, t, dim), axes in zip(dims, forward.on_ranks(), strict=True)
        ]
        kept.note_arguments((t for _, t, dim in dims if dim is not None), trained=self.proving)
        kept.numbers.begin()
        result, labels = self._run_unit(root, *forward.call, given)
        kept.numbers.settle(result, ran=forward.ran)
        if self.backward is not None:
            self.backward.seal()
            if self.graphs.two_pass:
                result = end_forward(self.backward, result)
            kept.check_buffers(self.engine.module)
            tensors = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
            assert len(tensors) == len(labels), "the model returns other tensors than its graph"
            if not forward.hands_on:
                refuse_outputs_of_ranks(labels)
            self.engine.returns(forward, tensors, labels)
            if forward.first_step is not None:
                forward.first_step.watch(result)
        return result

    # --- units -------------------------------------------------------------------------------------------------------

    def _run_unit(
        self, unit: Unit, args: Any, kwargs: Any, given: list[Label | None], recompute: bool = False
    ) -> tuple[Any, list[Label]]:
        """Run a unit; the labels are those of the tensors among the arguments, and among the results, in order."""
        if not unit.sharded:
            return self._run_compiled(unit, _call, args, kwargs, given, recompute)
        found: list[list[Label]] = []
        own = unit.module.__dict__

        def forward(*args: Any, **kwargs: Any) -> Any:
            this = own.pop("forward")  # not by its name: a cycle would hold the call's tensors
            try:
                result, labels = self._run_compiled(unit, _forward, args, kwargs, given, recompute)
            finally:
                own["forward"] = this
            found.append(labels)
            return result

        own["forward"] = forward
        try:
            result = unit.module(*args, **kwargs)
        finally:
            own.pop("forward", None)
        (labels,) = found
        return result, labels

    def _run_compiled(
        self, unit: Unit, function: Calls, args: Any, kwargs: Any, given: list[Label | None], recompute: bool
    ) -> tuple[Any, list[Label]]:
        engine, breaks = self.engine, self.graphs.breaks
        scope = Scope(self._names(unit), self.graphs.shared)
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        assert len(tensors) == len(given), "arguments changed on the way to a block"
        for i, (tensor, label) in enumerate(zip(tensors, given, strict=True)):
            scope.note(tensor, f"argument {i} of {unit.path or 'the model'}", label or Shared())
            if breaks and not (label is None or isinstance(label, Shared)):
                engine.kept.note_arguments([tensor])
        if not unit.path:
            for name, tensor, dim in engine.example_dims(self.forward.call):
                if dim is not None and scope.label(tensor) is not None:
                    scope.note(tensor, name, scope.label(tensor))  # type: ignore[arg-type]
        compiled = self.calls.of(unit, function, given, proving=self.proving)
        self.frames.append(Frame(unit, scope, recompute))
        try:
            with stubs(unit.children), self._python_between(unit):
                result = compiled(unit.module, args, kwargs)
            if breaks and self.proving:
                self.watch.check()
                given_ids = {id(x) for x in tensors}
                check_hooks_between([t for i, (t, _, _) in scope.tensors.items() if i not in given_ids])
        finally:
            self.frames.pop()
        return result, [self._result_label(unit, scope, x) for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]

    @contextmanager
    def _python_between(self, unit: Unit) -> Iterator[None]:
        """Where graph breaks are allowed, watch what runs between the graphs of a unit."""
        if not self.graphs.breaks:
            yield
            return
        if not self.proving:
            with self.watch.watching():
                yield
            return
        with compiled_alone(unit.module, [c.module for c in unit.children]), self.watch.watching():
            yield

    def _names(self, unit: Unit) -> dict[int, str]:
        """The parameters as the unit holds them now: under FSDP2 those that were gathered for it, and no others."""
        parameters = self.engine.parameters()
        if not unit.sharded:
            return {id(p): n for n, p in parameters.items()}
        prefix = f"{unit.path}." if unit.path else ""
        within = tuple(f"{child.path}." for child in unit.children)
        held = ((prefix + n, p) for n, p in nn.Module.named_parameters(unit.module))
        own = ((n, p) for n, p in held if n in parameters and not n.startswith(within))
        return {id(p): n for n, p in own if self.parts.gathered(p)}

    def _result_label(self, unit: Unit, scope: Scope, value: Tensor) -> Label:
        label = scope.label(value)
        if label is not None:
            return label
        if id(value) in scope.parameters or not self.proving or not value.requires_grad:
            return Shared()
        raise UnsupportedGraphError(
            f"{unit.path or 'the model'} returns a tensor that needs a gradient and that no compiled graph made",
            remedy="leave out hooks, and functions that are not compiled, that make what the module returns",
        )

    # --- graphs around units -----------------------------------------------------------------------------------------

    def run_skeleton(self, skeleton: Skeleton, live: Sequence[Any]) -> Sequence[Any]:
        """Run a graph that calls units, piece by piece."""
        frame, scope = self.frame, self.frame.scope

        def piece(part: Piece, values: list[Any], labels: list[Label | None]) -> tuple[Sequence[Any], Sequence[Label]]:
            inner = Scope(scope.parameters, self.graphs.shared)
            for value, label, node in zip(values, labels, part.inputs, strict=True):
                if isinstance(value, Tensor) and label is not None:
                    inner.note(value, node.name, label)
            self.frames.append(Frame(frame.unit, inner, frame.recompute or part.recompute))
            try:
                copied = add_inputs(part.graph, {})  # what is compiled may be written into
                outputs = self.run_region(self.region(copied, values, lambda: part.fakes(values)), values)
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

        self.graphs.share(self.owners.repeated(frame.unit, skeleton, live, scope.parameters))
        known = [scope.label(x) if isinstance(x, Tensor) else None for x in live]
        outputs, labels = skeleton.run(live, known, piece, unit)
        for output, label in zip(outputs, labels, strict=True):
            if isinstance(output, Tensor) and label is not None:
                scope.note(output, "an output", label)
        return outputs


def _holds_examples(kept: ExampleMemory, frames: Sequence[Frame], tensor: Tensor) -> bool:
    label = frames[-1].scope.label(tensor) if frames else None
    return kept.holds(tensor) or not (label is None or isinstance(label, Shared))


def _behind(graphs: CompiledRegions, frames: Sequence[Frame], tensor: Tensor) -> str | None:
    """The name of a trainable parameter that a tensor is, or is a view of."""
    names = frames[-1].scope.parameters if frames else {}
    name = names.get(id(tensor)) or names.get(id(base_of(tensor)))
    return name if name is not None and graphs.is_trained(name) else None
