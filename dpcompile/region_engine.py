"""The engine of a model that is compiled in regions: one for each unit, and for what lies between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dpcompile._torch import add_inputs, disable, memory_of, pytree, tracing_config
from dpcompile.axis import Examples, Label, Shared
from dpcompile.between import Between, check_hooks_between, check_inputs_between, compiled_alone, held_tensors
from dpcompile.deferral import Outcome, Pass, attach, prove_clipping
from dpcompile.engine import Engine, with_own_code, zeros_for
from dpcompile.errors import PrivacyError, UnsupportedGraphError
from dpcompile.fsdp import add_up, check_sharded, reduce_over_ranks
from dpcompile.graph_key import graph_key
from dpcompile.owners import Owners
from dpcompile.pipeline import Options, Transformed
from dpcompile.plan import Plan
from dpcompile.region import Artifact, Scope, compile_region, concrete
from dpcompile.shards import is_distributed
from dpcompile.skeleton import Piece, Skeleton, holds_units, whole_piece
from dpcompile.translate import translated
from dpcompile.units import Unit, as_it_is, find_units, is_sharded, stubs
from dpcompile.unowned import guarded

__all__ = ["RegionEngine"]


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module(*args, **kwargs)


def _forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return type(module).forward(module, *args, **kwargs)


@dataclass(slots=True)
class _Frame:
    """A unit that is running."""

    unit: Unit
    scope: Scope


@dataclass(frozen=True, slots=True)
class RegionPlans:
    """The plans of a model's regions, equal regions once; printed one after the other."""

    plans: tuple[Plan, ...]

    def rules(self) -> dict[str, str]:
        """Parameter name -> rule, of the first of equal regions."""
        return {name: rule for plan in self.plans for name, rule in plan.rules().items()}

    def __str__(self) -> str:
        return "\n\n".join(str(plan) for plan in self.plans)


class RegionEngine(Engine):
    """Compiles the units of a model one by one; equal ones share what was compiled.

    The model's own graph calls its units and is cut at these calls. Labels of the proof pass from piece to piece with
    the values; norms meet in a :class:`dpcompile.deferral.Pass`.

    Attributes:
        compilations: how many graphs were compiled.
    """

    def __init__(self, module: nn.Module, options: Options) -> None:
        super().__init__(module, options)
        self.compilations = 0
        self._sharded = any(is_sharded(m) for m in module.modules())
        if self._sharded and options.check:
            raise UnsupportedGraphError(
                "check=True compares with torch.func.vmap on whole parameters, and FSDP holds them in parts",
                remedy="check the model on one process before fully_shard",
            )
        self._root: Unit | None = None
        self._frames: list[_Frame] = []
        self._given: list[Label | None] | None = None
        self._pass: Pass | None = None
        self._proving = False
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._artifacts: dict[Any, Artifact] = {}
        self._plans: dict[int, Transformed] = {}
        self._clipping_proved = False
        self._owners = Owners(module)
        self._shared: set[str] = set()  # parameters that several regions use
        self._breaks = options.regions == "breaks"
        self._between = Between(self._holds_examples, self._parameter_behind)
        self._held: dict[int, Tensor] = {}

    @disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, compiled."""
        self._current = (args, kwargs)
        self.first_step = self._recorder()
        try:
            with tracing_config(regions=True):
                return self._run_model(args, kwargs)
        except Exception as error:
            refusal = translated(error, self._example_dims)
            if refusal is None:
                raise
            raise refusal.with_traceback(None) from None
        finally:
            self._current, self.first_step, self._pass = ((), {}), None, None
            self._frames.clear()
            self._given, self._held = None, {}

    def trace(self, *args: Any, **kwargs: Any) -> None:
        """Compile for these arguments. Regions have to run forward for that; nothing is kept."""
        mask, masked, unchecked = self._mask, self._masked, self._unchecked
        self._unchecked = False
        self._mask, self._masked = None, False
        try:
            with torch.enable_grad():
                self(*args, **kwargs)
        finally:
            self._mask, self._masked, self._unchecked = mask, masked, unchecked

    @property
    def sharded(self) -> bool:
        """Whether the parameters are FSDP2's."""
        return self._sharded

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Of every graph with trainable parameters, equal ones once."""
        return tuple(t.plan for t in self._plans.values())

    def _run_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._root is None:
            self._root = find_units(self.module, blocks=not self._breaks)
            self._shared |= self._owners.with_two_names() if self._breaks else self._owners.tied(self._root)
            if self.sharded:
                check_sharded(self._root, self._parameters)
        self._proving = torch.is_grad_enabled() and bool(self.trainable())
        dims = self._example_dims()
        scope = Scope({id(p): n for n, p in self._parameters.items()})
        self._given = []
        for name, tensor, dim in dims:
            self._given.append(Shared() if dim is None else Examples(dim % tensor.ndim))
            scope.note(tensor, name, self._given[-1])  # type: ignore[arg-type]
        if self._proving:
            self._pass = self._new_pass(dims)
            self._held = held_tensors(self.module) if self._breaks else {}
            self._between = Between(self._holds_examples, self._parameter_behind)
            self.kept.note_arguments(t for _, t, dim in dims if dim is not None)
        result, labels = self._run_unit(self._root, args, kwargs, self._given)
        if self._proving:
            assert self._pass is not None
            self._shared |= self._pass.repeated  # the next forward is compiled for it
            self.kept.check_buffers(self.module)
            tensors = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
            if self.first_step is not None:
                self.first_step.label(tensors, labels)
                self.first_step.watch(result)
        return result

    # --- units -------------------------------------------------------------------------------------------------------

    def _run_unit(self, unit: Unit, args: Any, kwargs: Any, given: list[Label | None]) -> tuple[Any, list[Label]]:
        """Run a unit; the labels are those of the tensors among the arguments, and among the results, in order."""
        if not unit.sharded:
            return self._run_compiled(unit, _call, args, kwargs, given)
        found: list[list[Label]] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            del unit.module.__dict__["forward"]
            try:
                result, labels = self._run_compiled(unit, _forward, args, kwargs, given)
            finally:
                unit.module.__dict__["forward"] = forward
            found.append(labels)
            return result

        unit.module.__dict__["forward"] = forward
        try:
            result = unit.module(*args, **kwargs)
        finally:
            unit.module.__dict__.pop("forward", None)
        (labels,) = found
        return result, labels

    def _run_compiled(
        self, unit: Unit, function: Callable[..., Any], args: Any, kwargs: Any, given: list[Label | None]
    ) -> tuple[Any, list[Label]]:
        scope = Scope(self._names(unit), self._shared)
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        assert len(tensors) == len(given), "arguments changed on the way to a block"
        for i, (tensor, label) in enumerate(zip(tensors, given, strict=True)):
            scope.note(tensor, f"argument {i} of {unit.path or 'the model'}", label or Shared())
            if self._breaks and not (label is None or isinstance(label, Shared)):
                self.kept.note_arguments([tensor])
        if not unit.path:
            for name, tensor, dim in self._example_dims():
                if dim is not None and scope.label(tensor) is not None:
                    scope.note(tensor, name, scope.label(tensor))  # type: ignore[arg-type]
        compiled = self._function(unit, function, given)
        self._frames.append(_Frame(unit, scope))
        try:
            with stubs(unit.children), self._python_between(unit):
                result = compiled(unit.module, args, kwargs)
            if self._breaks and self._proving:
                self._between.check()
                given_ids = {id(x) for x in tensors}
                check_hooks_between([t for i, (t, _, _) in scope.tensors.items() if i not in given_ids])
        finally:
            self._frames.pop()
        return result, [self._result_label(unit, scope, x) for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]

    @contextmanager
    def _python_between(self, unit: Unit) -> Iterator[None]:
        """Where graph breaks are allowed, watch what runs between the graphs of a unit."""
        if not (self._breaks and self._proving):
            yield
            return
        with compiled_alone(unit.module, [c.module for c in unit.children]), self._between.watching():
            yield

    def _holds_examples(self, tensor: Tensor) -> bool:
        label = self._frames[-1].scope.label(tensor) if self._frames else None
        return self.kept.holds(tensor) or not (label is None or isinstance(label, Shared))

    def _parameter_behind(self, tensor: Tensor) -> str | None:
        names = self._frames[-1].scope.parameters if self._frames else {}
        base = tensor._base if tensor._base is not None else tensor
        name = names.get(id(tensor)) or names.get(id(base))
        return name if name is not None and self._parameters[name].requires_grad else None

    def _names(self, unit: Unit) -> dict[int, str]:
        """The parameters as the unit holds them now: under FSDP2 those that were gathered for it, and no others."""
        if not unit.sharded:
            return {id(p): n for n, p in self._parameters.items()}
        prefix = f"{unit.path}." if unit.path else ""
        within = tuple(f"{child.path}." for child in unit.children)
        held = ((prefix + n, p) for n, p in unit.module.named_parameters())
        return {
            id(p): n for n, p in held if n in self._parameters and not n.startswith(within) and not is_distributed(p)
        }

    def _result_label(self, unit: Unit, scope: Scope, value: Tensor) -> Label:
        label = scope.label(value)
        if label is not None:
            return label
        if id(value) in scope.parameters or not self._proving or not value.requires_grad:
            return Shared()
        raise UnsupportedGraphError(
            f"{unit.path or 'the model'} returns a tensor that needs a gradient and that no compiled graph made",
            remedy="remove hooks that change what the module returns",
        )

    def _function(self, unit: Unit, function: Callable[..., Any], given: Sequence[Label | None]) -> Callable[..., Any]:
        """The compiled call for units of this kind, arguments that lie like this, and these trainable parameters."""
        own = {n: p for n, p in unit.module.named_parameters(remove_duplicate=False)}
        key = (
            type(unit.module),
            unit.handle if unit.children else None,
            function,
            self._proving,
            tuple(map(str, given)),
            tuple((n, p.requires_grad) for n, p in own.items()),
            tuple(m.training for m in unit.module.modules()),
            tuple(n for n in self._owners.inside(unit) if n in self._shared),
        )
        if key not in self._functions:
            copied = with_own_code(function, type(unit.module).__name__)
            dynamic = False if unit.children or self._breaks else self.options.dynamic
            self._functions[key] = torch.compile(
                copied, backend=self._region_backend, fullgraph=not self._breaks, dynamic=dynamic
            )
        return self._functions[key]

    # --- graphs ------------------------------------------------------------------------------------------------------

    def _region_backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if self._breaks:
            return self._late(gm)
        if holds_units(gm):
            skeleton = Skeleton(gm)
            return lambda *live: self._run_skeleton(skeleton, live)
        artifact = self._artifact(gm, inputs, lambda: inputs)
        return lambda *live: self._run_artifact(artifact, live)

    def _late(self, gm: fx.GraphModule) -> Callable[..., Any]:
        """A graph between breaks: compiled when it runs, for how its inputs lie then, of which Dynamo has no guard."""
        skeleton = Skeleton(gm) if holds_units(gm) else None
        frame_graph = None if skeleton is not None else whole_piece(gm)
        known: dict[Any, Artifact] = {}

        def run(*live: Any) -> Sequence[Any]:
            with self._between.paused():
                scope = self._frames[-1].scope
                if self._proving:
                    self._between.check()
                    check_inputs_between(gm, live, scope.knows, self._held)
                if skeleton is not None:
                    return self._run_skeleton(skeleton, live)
                assert frame_graph is not None
                situation = (torch.is_grad_enabled(), self._proving, tuple(scope.kind(x) for x in live))
                if situation not in known:
                    copied = add_inputs(frame_graph.graph, {})
                    known[situation] = self._artifact(copied, live, lambda: frame_graph.fakes(live))
                return self._run_artifact(known[situation], live)

        return run

    def _artifact(self, gm: fx.GraphModule, live: Sequence[Any], examples: Callable[[], Sequence[Any]]) -> Artifact:
        """What a graph is compiled to; an equal one is taken from those that were compiled before."""
        frame = self._frames[-1]
        key = graph_key(gm, live, frame.scope, self._proving)
        if key is None or key not in self._artifacts:
            self.compilations += 1
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._proving):
                artifact = compile_region(gm, live, examples(), frame.scope, self.options, self._proving)
            if artifact.transformed is not None:
                self._plans[id(artifact)] = self.transformed = artifact.transformed
            if key is None:
                return artifact
            self._artifacts[key] = artifact
        return self._artifacts[key]

    def _run_skeleton(self, skeleton: Skeleton, live: Sequence[Any]) -> Sequence[Any]:
        frame = self._frames[-1]
        scope = frame.scope

        def piece(part: Piece, values: list[Any], labels: list[Label | None]) -> tuple[Sequence[Any], Sequence[Label]]:
            inner = Scope(scope.parameters, self._shared)
            for value, label, node in zip(values, labels, part.inputs, strict=True):
                if isinstance(value, Tensor) and label is not None:
                    inner.note(value, node.name, label)
            self._frames.append(_Frame(frame.unit, inner))
            try:
                copied = add_inputs(part.graph, {})  # what is compiled may be written into
                artifact = self._artifact(copied, values, lambda: part.fakes(values))
                outputs = self._run_artifact(artifact, values)
            finally:
                self._frames.pop()
            return outputs, [inner.label(x) or Shared() for x in outputs]

        children = {child.handle: child for child in frame.unit.children}

        def unit(handle: int, args: Any, kwargs: Any, labels: list[Label | None]) -> tuple[Any, list[Label]]:
            child = children[handle]
            with as_it_is(child):
                return self._run_unit(child, args, kwargs, labels)

        self._shared |= self._owners.repeated(frame.unit, skeleton, live, scope.parameters)
        known = [scope.label(x) if isinstance(x, Tensor) else None for x in live]
        outputs, labels = skeleton.run(live, known, piece, unit)
        for output, label in zip(outputs, labels, strict=True):
            if isinstance(output, Tensor) and label is not None:
                scope.note(output, "an output", label)
        return outputs

    def _run_artifact(self, artifact: Artifact, inputs: Sequence[Any]) -> Sequence[Any]:
        frame = self._frames[-1]
        scope, roles = frame.scope, artifact.roles
        if roles is None:
            return artifact.compiled(*inputs)
        for p in roles.examples:
            label = scope.label(inputs[p])
            assert label is not None and not isinstance(label, Shared), "examples where a graph expects none, or not"
        for p, name in roles.others.items():
            if isinstance(inputs[p], Tensor):
                self.kept.check_input(name, inputs[p])
        positions = artifact.trained
        if positions:
            outputs = self._run_trained(artifact, positions, inputs)
        else:
            outputs = artifact.compiled(*inputs)
        outputs = guarded(outputs, artifact.unowned)
        labels = [concrete(label, artifact.symbols, inputs) for label in artifact.labels]
        self.kept.note(outputs, labels)
        for output, label in zip(outputs, labels, strict=True):
            if isinstance(output, Tensor):
                scope.note(output, f"an output of {frame.unit.path or 'the model'}", label)
        return outputs

    def _run_trained(self, artifact: Artifact, positions: list[int], inputs: Sequence[Any]) -> Sequence[Any]:
        frame, whole = self._frames[-1], self._pass
        assert whole is not None and artifact.transformed is not None and artifact.roles is not None
        names = [frame.scope.parameters[id(inputs[p])] for p in positions]
        parameters = [inputs[p] for p in positions]
        assert len(set(names)) == len(names) and all(p.requires_grad for p in parameters), names
        self.check_live(names, parameters, frame.unit.sharded)
        chosen = artifact.transformed.plan.rules()
        own = [artifact.roles.parameters[p] for p in positions]
        touched = [name for name, first in zip(names, own, strict=True) if first in chosen]
        memory = frozenset(memory_of(p) for p in frame.unit.module.parameters()) if frame.unit.sharded else frozenset()
        uses = {
            n: artifact.transformed.uses[o] for n, o in zip(names, own, strict=True) if o in artifact.transformed.uses
        }
        run = whole.run(names, touched, artifact.dtype, frame.unit.path, memory, uses)
        norms, aliases = attach(run, parameters)
        arguments = list(inputs)
        for p, alias in zip(positions, aliases, strict=True):
            arguments[p] = alias
        return artifact.compiled(*arguments, whole.mask, norms, norms.detach())

    # --- the backward ------------------------------------------------------------------------------------------------

    def _new_pass(self, dims: Sequence[tuple[str, Tensor, int | None]]) -> Pass:
        batch = next(((t.shape[d], t.device) for _, t, d in dims if d is not None), None)
        if batch is None:
            raise UnsupportedGraphError(
                "no input of the model has an example axis",
                remedy="pass the batch as a tensor argument of the call; in_dims says which dimension holds the "
                "examples",
            )
        if not self._clipping_proved:
            prove_clipping(self.options, max(batch[0], 2))
            self._clipping_proved = True
        refused = self.refused_backward()
        mask = self.take_mask(*batch)
        recorder = self.first_step

        def deliver(outcome: Outcome) -> None:
            sums = self.reduced(outcome)
            reached = {name for name, _ in sums}
            untouched = [n for n in self.trainable() if n not in reached and self._parameters[n].grad is None]
            zeros = [(n, zeros_for(self._parameters[n])) for n in untouched]
            self.ledger.deliver([*sums, *zeros], graph_task=outcome.graph_task)
            self.grad_norms = outcome.norms.detach()
            if recorder is not None:
                recorder.compare(outcome.norms, outcome.mask, sums)

        return Pass(self.options, mask, deliver, refused)

    def reduced(self, outcome: Outcome) -> list[tuple[str, Tensor]]:
        """The clipped sums by parameter; of sharded ones the local parts of the sums over all ranks."""
        if self.sharded:
            assert self._root is not None
            return reduce_over_ranks(self._root, self._parameters, outcome.sums)
        totals: dict[str, Tensor] = {}
        for _, compute in outcome.sums:
            add_up(totals, compute())
        return list(totals.items())

    def check_live(self, names: Sequence[str], parameters: Sequence[Tensor], sharded: bool) -> None:
        """Raise PrivacyError if a parameter is not the object that the optimizer knows, or has hooks."""
        self.check_hooks(zip(names, parameters, strict=True))
        if sharded:
            self.check_hooks((name, self._parameters[name]) for name in names)
        for name, parameter in zip(names, parameters, strict=True):
            if not sharded and parameter is not self._parameters[name]:
                raise PrivacyError(
                    f"parameter '{name}' was replaced after dp_compile: the optimizer and the ledger hold the old one",
                    remedy="call dp_compile again after changing the model, and make the optimizer from the result",
                )
