"""The engine of a model in one graph: it compiles calls, and runs what was compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from dpcompile._torch import pytree
from dpcompile.capture.arguments import example_dims
from dpcompile.capture.flow import Untrained, compile_untrained
from dpcompile.capture.inputs import extend
from dpcompile.capture.roles import NoExample, Roles, assign_roles
from dpcompile.capture.surroundings import no_second_derivatives
from dpcompile.capture.tracing import one_graph
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.compile import compile_joint
from dpcompile.kernels.workspace import keep_freed_memory
from dpcompile.lowering.cache_key import cache_key
from dpcompile.lowering.layouts import copied_bytes, filters_of, inputs_to_compile, shared_by_parts
from dpcompile.options import Options
from dpcompile.pipeline import Transformed, privatize
from dpcompile.planning.elsewhere import Planned, plan_behind
from dpcompile.planning.parts import asked_parts
from dpcompile.planning.plan import Plan
from dpcompile.proof.unowned import guarded
from dpcompile.runtime.base import Engine, with_own_code
from dpcompile.runtime.bound import bounds_of
from dpcompile.runtime.changing_numbers import constants_where_needed
from dpcompile.runtime.delivery import Delivery, through_delivery
from dpcompile.runtime.elsewhere import plan_elsewhere
from dpcompile.runtime.empty import run_empty
from dpcompile.runtime.forward import Forward, Running
from dpcompile.runtime.kept_numbers import Reads, reads_of
from dpcompile.runtime.loss_scale import Unscaling
from dpcompile.runtime.parts import WholeBatch, joined, split_call
from dpcompile.runtime.sums import Delivered, lying_like
from dpcompile.runtime.translate import found_nothing, translated
from dpcompile.runtime.verify import Verifier

__all__ = ["GraphEngine"]


class _TraceOnly(Exception):
    """Stops a call after its compilation."""


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module(*args, **kwargs)


class GraphEngine(Engine):
    """Compiles the calls of a model as one graph; in parts of the batch where a memory budget asks for it.

    Attributes:
        running: the forward that is being run.
    """

    def __init__(self, module: nn.Module, options: Options) -> None:
        super().__init__(module, options)
        self.running: Running[Forward] = Running()
        self._compiled: dict[tuple[tuple[str, ...], int], Callable[..., Any]] = {}
        self._parts: dict[int, int] = {}  # size of a batch -> in how many parts it runs

    def trace(self, *args: Any, **kwargs: Any) -> None:
        """Compile for these arguments without running."""
        try:
            with torch.enable_grad():
                self._run(Forward(args, kwargs, tracing=True))
        except _TraceOnly:
            pass

    def plan_for(self, machine: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        """The plan of this call on another machine; nothing is compiled, nor is anything of the engine changed."""
        self.example_dims((args, kwargs))

        def trace(module: nn.Module, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            GraphEngine(module, options).trace(*args, **kwargs)

        return plan_elsewhere(trace, self.module, self.options, (args, kwargs), machine)

    def _run(self, forward: Forward) -> Any:
        """One call of the compiled module."""
        try:
            if forward.given.reduces is None:
                self.replicas.notice(tracing=forward.tracing)
            parts = self._parts.get(self._batch_size(forward), 1) if self._splits() else 1
            return self._run_parts(forward, parts) if parts > 1 else self._run_once(forward)
        except _TraceOnly:
            raise
        except Exception as error:
            parts, plan = asked_parts(error), plan_behind(error)
            if plan is not None:
                raise Planned(plan) from None
            if parts is None:
                if found_nothing(error):
                    self._compiled.clear()
                refusal = translated(error, partial(self.example_dims, forward.call))
                if refusal is None:
                    raise
                if isinstance(refusal, NoExample) and not forward.tracing and not self.distributed:
                    return self._run_empty(forward)
                raise refusal.with_traceback(None) from None
        self._parts[self._batch_size(forward)] = parts
        return self._run(forward.part_of(WholeBatch(), 0, forward.call))  # nothing ran yet

    def _run_once(self, forward: Forward) -> Any:
        """The module, compiled, on a call or a part of one."""
        self._record(forward)
        self.kept.numbers.begin()
        with self.running.during(forward):
            result = self._compiled_call(forward.batch.parts)(self.module, *forward.call)
        if not forward.ran and self.trainable() and torch.is_grad_enabled():
            raise UnsupportedGraphError(
                "the model ran without being compiled, so nothing would clip its gradients",
                remedy="switch torch.compile on again (TORCHDYNAMO_DISABLE, torch.compiler.set_stance)",
            )
        if torch.is_grad_enabled():
            self.kept.check_buffers(self.module)
        self.kept.numbers.settle(result, ran=forward.ran)
        if forward.first_step is not None:
            forward.first_step.watch(result)
        return result

    def _run_empty(self, forward: Forward) -> Any:
        """A call on a batch without examples."""
        trained = self.trained()
        return run_empty(self.module, *forward.call, trained, lambda like: self.delivery(forward, [*trained], like, 0))

    def _run_parts(self, forward: Forward, parts: int) -> Any:
        """The call in parts, as :mod:`dpcompile.runtime.parts` has it."""
        whole, results, labels = WholeBatch(parts), [], []
        for index, call in enumerate(split_call(*forward.call, self.example_dims(forward.call), parts)):
            part = forward.part_of(whole, index, call)
            results.append(self._run_once(part))
            forward.compared = part.compared
            labels.append(part.labels)
        whole.filters.clear()  # the parts hold them
        result = joined(results, labels)
        leaves = zip(pytree.tree_leaves(result), pytree.tree_leaves(results[0]), strict=True)
        forward.labels = {id(x): labels[0][id(first)] for x, first in leaves if id(first) in labels[0]}
        return result

    def delivery(
        self, forward: Forward, names: list[str], like: Tensor, dim: int, transformed: Transformed | None = None
    ) -> Delivery:
        """For a forward on examples along ``dim`` of ``like``, of this graph; of none, if it is empty."""
        awaited = self.await_backward(forward, like.shape[dim], like.device)

        def keep(found: Delivered) -> None:
            awaited.sums.add("", lying_like(self._parameters, found.sums))
            self.deliver(awaited, replace(found, sums=awaited.sums.finish()))

        bounds = None
        if transformed is not None and transformed.groups:
            given = self.clip.in_graph(forward.batch.bound).of(transformed.present)
            bounds = transformed.groups, bounds_of(given, transformed.groups, awaited.mask)
        return Delivery(names, awaited.mask, keep, forward.batch.refused, forward.batch.filters, bounds)

    def ran(self, forward: Forward, transformed: Transformed | None, outputs: Sequence[Any]) -> None:
        """A compiled graph returned these outputs."""
        forward.ran = True
        if transformed is not None:
            self.transformed = transformed
            self.kept.note(outputs, transformed.output_labels)
            self.returns(forward, outputs, transformed.output_labels)

    def _compiled_call(self, parts: int) -> Callable[..., Any]:
        """The compiled call for what is trainable now (Dynamo of torch 2.11 has no guard on that) and the parts."""
        situation = tuple(self.trainable()), parts
        if situation not in self._compiled:
            own = with_own_code(_call, type(self.module).__name__)
            backend = constants_where_needed(self._backend)
            self._compiled[situation] = one_graph(own, backend, self.options.dynamic)
        return self._compiled[situation]

    def _splits(self) -> bool:
        """Whether calls may run in parts now."""
        return bool(self._parts) and torch.is_grad_enabled() and bool(self.trainable())

    def _batch_size(self, forward: Forward) -> int:
        """The number of rows of a call's first tensor with examples."""
        dims = example_dims(self.module.forward, *forward.call, self.options.in_dims)
        return next((t.shape[dim] for _, t, dim in dims if dim is not None), 0)

    def _run_untrained(self, graph: Untrained, reads: Reads, *inputs: Any) -> Sequence[Any]:
        """A graph without a private backward: what it leaves of examples is remembered."""
        forward = self.running.now
        if forward.tracing:
            raise _TraceOnly
        self.note_given(forward, [inputs[p] for p in graph.arguments])
        self.kept.numbers.read(reads, self.module)
        outputs = self.kept.run(graph, inputs)
        self.ran(forward, None, outputs)
        return outputs

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        names = {id(p): name for name, p in self._parameters.items()}
        trainable = any(id(v) in names and v.requires_grad for v in inputs if isinstance(v, Tensor))
        if not (trainable and torch.is_grad_enabled()):
            reads = reads_of(self.module)
            return partial(self._run_untrained, compile_untrained(gm, inputs, self.options.backend), reads)
        if self.options.memory_budget is None and self.options.backend == "inductor":
            keep_freed_memory()
        forward = self.running.now
        leaves = self.leaves(self.example_dims(forward.call))
        roles = assign_roles(gm, inputs, names, leaves, clipping=self.options.clipping)
        graph = _RunningGraph(self, roles, reads_of(self.module), roles.outside)
        extended, extra = extend(gm, roles)
        parts = forward.batch.parts if forward.batch.parts > 1 else None
        copied = 0
        if self.options.backend == "inductor":
            filters = filters_of(gm, inputs, {**roles.frozen, **roles.parameters})
            copied = copied_bytes(gm, inputs, filters, parts or 1)
            graph.filters = filters if parts is not None else {}

        verifier = Verifier(f"the model ({type(self.module).__name__})") if self.options.verify else None

        def transform(joint: fx.GraphModule) -> None:
            graph.transformed = self.transformed = found = privatize(joint, roles, self.options, parts, copied)
            if verifier is not None:
                verifier.describe(found)

        graph.compiled = compile_joint(
            extended,
            [*inputs_to_compile(gm, inputs, graph.filters), *extra],
            backend=self.options.backend,
            transform=transform,
            key=cache_key(self.options, roles, parts or 1),
            watcher=verifier,
        )
        if graph.transformed is None:
            raise UnsupportedGraphError(
                "the compiled graph came out of AOTAutograd's cache, so what it does to gradients was not proved here",
                remedy="unset TORCHINDUCTOR_AUTOGRAD_CACHE: dpcompile keeps that cache off",
            )
        return graph


@dataclass(slots=True)
class _RunningGraph:
    """One compiled graph at run time: Dynamo calls it with the graph's inputs."""

    engine: GraphEngine
    roles: Roles
    reads: Reads
    outside: Mapping[int, str]
    compiled: Callable[..., Any] | None = None
    transformed: Transformed | None = None
    filters: dict[int, str] = field(default_factory=dict)

    def __call__(self, *inputs: Any) -> Any:
        forward = self.engine.running.now
        if forward.tracing:
            raise _TraceOnly
        assert self.compiled is not None
        kept = self.engine.kept
        kept.note_arguments(inputs[p] for p in self.roles.examples)
        for p, name in self.outside.items():
            kept.check_input(name, inputs[p])
        kept.check_constants(self.reads, self.engine.module)
        position, dim = self.roles.batch_from
        self.engine.check_parameters((name, inputs[p]) for p, name in self.roles.parameters.items())
        names = [*self.roles.parameters.values(), *(self.roles.parameters[p] for p in self.roles.narrow)]
        filters = shared_by_parts(forward.batch.filters, self.filters, inputs)
        delivery = self.engine.delivery(forward, names, inputs[position], dim, self.transformed)
        live, narrow = ([inputs[p] for p in positions] for positions in (self.roles.parameters, self.roles.narrow))
        apart = self.engine.replicas.apart
        given, aliases, sums = through_delivery(delivery, apart(live), apart(narrow))
        arguments = [filters.get(p, x) for p, x in enumerate(inputs)]
        for p, alias in zip(self.roles.parameters, aliases, strict=True):
            arguments[p] = alias
        outputs = self.compiled(*arguments, delivery.mask, *given, *sums)
        Unscaling(delivery.mask).before_backward_of(outputs)
        if self.transformed is not None:
            outputs = guarded(outputs, self.transformed.unowned)
        no_second_derivatives(outputs)
        self.engine.ran(forward, self.transformed, outputs)
        return outputs
