"""The engine behind a private module: it compiles calls, and keeps what their backward delivers."""

from __future__ import annotations

import inspect
import itertools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from dpcompile._torch.autograd import current_backward, has_gradient_hooks
from dpcompile._torch.dynamo import disable
from dpcompile.batches.draws import Draws, Given
from dpcompile.batches.feed import Feed
from dpcompile.capture.arguments import example_dims
from dpcompile.capture.flow import Untrained, compile_untrained
from dpcompile.capture.inputs import extend
from dpcompile.capture.roles import NoExample, Roles, assign_roles
from dpcompile.capture.surroundings import no_second_derivatives, refuse_tracers
from dpcompile.capture.tensor_kinds import check_model
from dpcompile.capture.tracing import tracing_config
from dpcompile.distributed.ranks import world_size
from dpcompile.distributed.shards import zeros_for
from dpcompile.errors import DPCompileError, PrivacyError, UnsupportedGraphError
from dpcompile.graph.compile import compile_joint
from dpcompile.graph.labels import Label
from dpcompile.kernels.workspace import keep_freed_memory, kept_gradients
from dpcompile.lowering.cache_key import cache_key
from dpcompile.lowering.layouts import copied_bytes, filters_of, inputs_to_compile, shared_by_parts
from dpcompile.options import Options
from dpcompile.pipeline import Transformed, privatize
from dpcompile.planning.parts import Turn, asked_parts, joined, split_call
from dpcompile.proof.unowned import guarded
from dpcompile.runtime.bystanders import watch
from dpcompile.runtime.changing_numbers import constants_where_needed
from dpcompile.runtime.delivery import Delivery, through_delivery
from dpcompile.runtime.empty import run_empty
from dpcompile.runtime.example_memory import Kept
from dpcompile.runtime.first_step import FirstStep
from dpcompile.runtime.kept_numbers import Reads, reads_of
from dpcompile.runtime.ledger import GradientLedger
from dpcompile.runtime.loss_scale import Unscaling
from dpcompile.runtime.replicas import Replicas
from dpcompile.runtime.translate import translated
from dpcompile.runtime.turns import Ran, in_turns
from dpcompile.runtime.verify import Verifier

__all__ = ["Engine", "with_own_code"]


class _TraceOnly(Exception):
    """Stops a call after its compilation."""


_NUMBERS = itertools.count()


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module(*args, **kwargs)


def with_own_code(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    """A copy of a function that Dynamo takes for another one.

    Dynamo keeps compiled graphs per code object, and what it learned of changing sizes per name: copies keep models
    apart.
    """
    assert isinstance(function, types.FunctionType)
    name = f"{function.__name__}_{label}_{next(_NUMBERS)}"
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


class Engine:
    """Compiles the calls of one module, and keeps what its backward delivers.

    Attributes:
        module: the user's module, undecorated.
        options: what the user asked for.
        ledger: the clipped sums in ``p.grad``.
        replicas: under DistributedDataParallel, the way to the ledger.
        transformed: of the graph that ran last, or was compiled since.
        feed: the loader that is attached; None without one.
        steps: logical steps that optimizers took with this model, in this process; None before there is one.
    """

    def __init__(self, module: nn.Module, options: Options) -> None:
        self.module, self.options = module, options
        self._parameters = dict(module.named_parameters())
        self.ledger = GradientLedger(self._parameters)
        watch(self.ledger)
        self.replicas = Replicas(self.ledger, lambda: {n: self._parameters[n] for n in self.trainable()}, self.place)
        self.transformed: Transformed | None = None
        self.feed: Feed | None = None
        self.steps: int | None = None
        self.kept = Kept(module, breaks=options.regions == "breaks")
        self.first_step: FirstStep | None = None
        self._unchecked = options.check
        self._norms: list[tuple[Tensor, Tensor]] = []  # with their masks, of the last backward
        self._mask: Tensor | None = None
        self._masked = False  # it is said of every batch which rows are examples
        self._given = Given()  # what a draw says of the forward that is being run
        self._current: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._tracing = False
        self._compiled: dict[tuple[tuple[str, ...], int], Callable[..., Any]] = {}
        self._parts: dict[int, int] = {}  # size of a batch -> in how many parts it runs
        self._turn: Turn | None = None
        weakref.finalize(self, kept_gradients.release)
        self._output_labels: dict[int, Label] = {}

    @property
    def sharded(self) -> bool:
        """Whether the parameters are FSDP2's."""
        return False

    @property
    def distributed(self) -> bool:
        """Whether clipped sums are added up over ranks."""
        return self.sharded or self.replicas.known

    @property
    def data_ranks(self) -> int:
        """How many ranks, or groups of ranks, have examples of their own."""
        return world_size() if self.distributed else 1

    @property
    def max_grad_norm(self) -> float:
        """C, the sensitivity of the clipped sum to one example."""
        return float(self.options.max_grad_norm)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by name, tied ones once."""
        return dict(self._parameters)

    def trainable(self) -> list[str]:
        """Names of the parameters that require a gradient now."""
        return [name for name, p in self._parameters.items() if p.requires_grad]

    @property
    def grad_norms(self) -> Tensor | None:
        """Float32 norms of the last backward, before clipping, of its examples without padding; None before one."""
        return torch.cat([norms[mask > 0] for norms, mask in self._norms]) if self._norms else None

    @property
    def row_norms(self) -> Tensor:
        """The same of all rows, padding included: ``[B]``."""
        return torch.cat([norms for norms, _ in self._norms])

    def note_norms(self, norms: Tensor, mask: Tensor, *, more: bool = False) -> None:
        """The norms ``[B]`` of a backward and the mask of its rows; with ``more`` of part of one."""
        self._norms = [*(self._norms if more else []), (norms.detach(), mask)]

    @property
    def draws(self) -> Draws | None:
        """The batches of the loader that is attached; None without one."""
        return None if self.feed is None else self.feed.draws

    @property
    def claims(self) -> bool:
        """Whether forwards with gradients are on batches of an attached loader."""
        return self.draws is not None and not self._masked

    @contextmanager
    def giving(self, given: Given) -> Iterator[None]:
        """Run something of which a draw says this."""
        self._given = given
        try:
            yield
        finally:
            self._given = Given()

    def place(self) -> tuple[int, ...]:
        """Where training stands: logical steps taken, and the draw of the loader (-1: none); ``()`` without optimizer.

        Public numbers.
        """
        if self.steps is None:
            return ()
        draw = None if self.feed is None else self.feed.draw
        return self.steps, -1 if draw is None else draw

    def set_mask(self, mask: Tensor | None) -> None:
        """Say which rows of the next batch are examples (True) and which are padding (False): bool ``[B]``.

        From then on every forward with gradients needs a mask of its own; None ends that.
        """
        if mask is not None and (mask.ndim != 1 or mask.dtype != torch.bool):
            raise PrivacyError(
                f"the padding mask must be a bool tensor of shape [B], got {mask.dtype} {list(mask.shape)}",
                remedy="True marks an example, False a padding row",
            )
        self._mask, self._masked = mask, mask is not None

    @disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, compiled; on a batch of the loader with its mask, in as many forwards as it takes.

        Within a function that the user compiles this is a graph break: traced into, it would lose its backward.
        """
        refuse_tracers()
        draws = self.draws
        if draws is None or not (self.claims and torch.is_grad_enabled() and self.trainable()):
            return self._call(args, kwargs)
        dims = self._example_dims((args, kwargs))
        claim = draws.claim([(t, dim % t.ndim) for _, t, dim in dims if dim is not None])
        batch, mask = claim.batch, claim.mask
        if batch is None or mask is None:
            return self._call(args, kwargs, Given(refused=claim.refused))
        begin, end = partial(draws.begin, batch), partial(draws.delivered, batch)
        if batch.turns == 1:
            return self._call(args, kwargs, Given(mask, begin=begin, end=end))
        self.replicas.notice(tracing=False)
        reduces, masks, last = self.replicas.reduces, mask.chunk(batch.turns), batch.turns - 1

        def forward(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], again: bool) -> Ran:
            unchecked, self._unchecked = self._unchecked, self._unchecked and again
            given = Given(masks[index], reduces=reduces and index == last, more=index > 0)
            try:
                return Ran(self._call(args, kwargs, given), self._output_labels)
            finally:
                self._unchecked = self._unchecked if again else unchecked

        mean = self.options.loss_reduction == "mean"
        return in_turns(forward, self.module, (args, kwargs), dims, batch.turns, mean=mean, begin=begin, end=end)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Given | None = None) -> Any:
        """One call of the compiled module."""
        self._current, self._turn, self._given = (args, kwargs), None, given or Given()
        unchecked = self._unchecked
        try:
            if self._given.reduces is None:
                self.replicas.notice(tracing=self._tracing)
            parts = self._parts.get(self._batch_size(), 1) if self._splits() else 1
            return self._run_parts(parts) if parts > 1 else self._run_once()
        except _TraceOnly:
            raise
        except Exception as error:
            parts = asked_parts(error)
            if parts is None:
                refusal = translated(error, self._example_dims)
                if refusal is None:
                    raise
                if isinstance(refusal, NoExample) and not self._tracing and not self.distributed:
                    return self._run_empty(args, kwargs)
                raise refusal.with_traceback(None) from None
        finally:
            whole, self._current, self.first_step, self._turn = self._current, ((), {}), None, None
            self._given = Given()
        self._parts[self._batch_size(whole)] = parts
        self._unchecked = unchecked  # nothing ran yet
        return self._call(args, kwargs, given)

    def _run_once(self) -> Any:
        """One call of the compiled module on what is current."""
        self._graph_ran = False
        self.first_step = self._recorder()
        args, kwargs = self._current
        self.kept.numbers.begin()
        with tracing_config(dynamic=self.options.dynamic):
            result = self._compiled_call()(self.module, args, kwargs)
        if not self._graph_ran and self.trainable() and torch.is_grad_enabled():
            raise UnsupportedGraphError(
                "the model ran without being compiled, so nothing would clip its gradients",
                remedy="switch torch.compile on again (TORCHDYNAMO_DISABLE, torch.compiler.set_stance)",
            )
        if torch.is_grad_enabled():
            self.kept.check_buffers(self.module)
        self.kept.numbers.settle(result, ran=self._graph_ran)
        if self.first_step is not None:
            self.first_step.watch(result)
        return result

    def _run_empty(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call on a batch without examples."""
        trained = {name: self._parameters[name] for name in self.trainable()}
        return run_empty(self.module, args, kwargs, trained, lambda like: self.delivery([*trained], like, 0))

    def _run_parts(self, parts: int) -> Any:
        """The current call in parts, as :mod:`dpcompile.planning.parts` has it."""
        whole, unchecked, results, labels = self._current, self._unchecked, [], []
        self._turn = Turn(parts)
        for args, kwargs in split_call(*whole, self._example_dims(), parts):
            self._current, self._unchecked = (args, kwargs), unchecked
            results.append(self._run_once())
            labels.append(self._output_labels)
            self._turn.index += 1
        self._current = whole
        self._turn.filters.clear()  # the parts hold them
        return joined(results, labels)

    def trace(self, *args: Any, **kwargs: Any) -> None:
        """Compile for these arguments without running."""
        self._tracing = True
        try:
            with torch.enable_grad():
                self._call(args, kwargs)
        except _TraceOnly:
            pass
        finally:
            self._tracing = False

    def take_mask(self, batch: int, device: torch.device) -> Tensor:
        """The mask of the batch that is being run, as float32 weights; it is used once."""
        mask = self._given.mask
        if mask is None:
            mask, self._mask = self._mask, None
        if mask is None:
            return torch.ones(batch, device=device)
        if len(mask) != batch:
            raise PrivacyError(
                f"the padding mask has {len(mask)} entries for a batch of {batch}",
                remedy="call the model on the batch that the loader gave, whole",
            )
        return mask.to(device=device, dtype=torch.float32)

    def refused_backward(self) -> PrivacyError | None:
        """Why the forward that is being run may have no backward; None if it may."""
        if self._given.refused is not None or self._given.mask is not None:
            return self._given.refused
        if not self._masked or self._mask is not None:
            return None
        return PrivacyError(
            "a second backward on one batch of the loader: its examples would count twice",
            remedy="call the model once per batch with gradients (others under torch.no_grad()); to train without the "
            "loader, finish its loop first",
        )

    def within_backward(self) -> int | None:
        """The backward in which the forward is being run, as a reentrant checkpoint runs it: its sums come in that."""
        running = current_backward() if self._given.reduces is None else -1  # a draw's turns are told apart by the draw
        return None if running == -1 else running

    def delivery(self, names: list[str], like: Tensor, dim: int) -> Delivery:
        """For the forward that is being run on examples along ``dim`` of ``like``."""
        turn, batch = self._turn or Turn(1), like.shape[dim]
        refused = self.refused_backward() if turn.mask is None else None
        if turn.mask is None:
            turn.mask = self.take_mask(batch * turn.parts, like.device)
        rows = slice(turn.index * batch, (turn.index + 1) * batch)
        recorder, given, within = self.first_step, self._given, self.within_backward()
        reduces = self.replicas.reduces if given.reduces is None else given.reduces

        def keep(norms: Tensor | None, mask: Tensor, sums: list[tuple[str, Tensor]], graph_task: int) -> None:
            turn.delivered += 1
            if turn.delivered == 1:
                given.begin()
            reached = {name for name, _ in sums}
            sums = [(n, s.contiguous() if self._parameters[n].is_contiguous() else s) for n, s in sums]
            untouched = [n for n in self.trainable() if n not in reached and self._parameters[n].grad is None]
            zeros = [(n, zeros_for(self._parameters[n])) for n in untouched]
            task = graph_task if within is None else within
            self.replicas.deliver(sums, zeros, graph_task=task, call=turn, reduces=reduces)
            if norms is not None:
                assert turn.mask is not None
                self.note_norms(turn.with_norms(norms.detach(), rows), turn.mask, more=given.more)
                if recorder is not None:
                    recorder.compare(norms, mask, sums)
            if turn.delivered == turn.parts:
                given.end()

        return Delivery(names, turn.mask[rows], keep, refused, turn.filters)

    def filters(self, named: Mapping[int, str], inputs: Sequence[Any]) -> dict[int, Tensor]:
        """These filters among a graph's inputs as all parts of the current call take them."""
        return {} if self._turn is None else shared_by_parts(self._turn.filters, named, inputs)

    def check_parameters(self, roles: Roles, inputs: Sequence[Any]) -> None:
        """Raise PrivacyError if a parameter is not the object that the optimizer knows, or has hooks that never run."""
        self.check_hooks((name, inputs[p]) for p, name in roles.parameters.items())
        for p, name in roles.parameters.items():
            if inputs[p] is not self._parameters[name]:
                raise PrivacyError(
                    f"parameter '{name}' was replaced after dp_compile: the optimizer and the ledger hold the old one",
                    remedy="call dp_compile again after changing the model, and make the optimizer from the result",
                )

    def check_hooks(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Raise PrivacyError if one of these parameters has a hook on its gradient."""
        for name, parameter in parameters:
            if has_gradient_hooks(parameter):
                raise PrivacyError(
                    f"parameter '{name}' has a hook on its gradient, which would not run: the clipped sum does not "
                    "pass through autograd",
                    remedy="remove the hook; change clipped sums in p.grad only through DPOptimizer",
                )

    def ran(self, transformed: Transformed | None, outputs: Sequence[Any]) -> None:
        """A compiled graph returned these outputs."""
        self._graph_ran = True
        if transformed is not None:
            labels = zip(outputs, transformed.output_labels, strict=False)
            self._output_labels = {id(x): label for x, label in labels}
            self.transformed = transformed
            self.kept.note(outputs, transformed.output_labels)
        if self.first_step is not None and transformed is not None:
            self.first_step.label(outputs, transformed.output_labels)

    def _compiled_call(self) -> Callable[..., Any]:
        """The compiled call for what is trainable now (Dynamo of torch 2.11 has no guard on that) and the parts."""
        situation = tuple(self.trainable()), 1 if self._turn is None else self._turn.parts
        if situation not in self._compiled:
            own = with_own_code(_call, type(self.module).__name__)
            dynamic = self.options.dynamic
            self._compiled[situation] = torch.compile(
                own, backend=constants_where_needed(self._backend), fullgraph=True, dynamic=dynamic
            )
        return self._compiled[situation]

    def _recorder(self) -> FirstStep | None:
        """Of the first call with gradients under ``check=True``; None otherwise."""
        if not self._unchecked or self._tracing or not torch.is_grad_enabled():
            return None
        self._unchecked = False
        parts = 1 if self._turn is None else self._turn.parts
        return FirstStep(self.module, self.options, self._current, self._example_dims(), parts)

    def _splits(self) -> bool:
        """Whether calls like the current one may run in parts."""
        return bool(self._parts) and torch.is_grad_enabled() and bool(self.trainable())

    def _batch_size(self, call: tuple[tuple[Any, ...], dict[str, Any]] | None = None) -> int:
        """The number of rows of a call's first tensor with examples."""
        args, kwargs = call or self._current
        dims = example_dims(self.module.forward, args, kwargs, self.options.in_dims)
        return next((t.shape[dim] for _, t, dim in dims if dim is not None), 0)

    def _example_dims(self, call: tuple[Any, Any] | None = None) -> list[tuple[str, Tensor, int | None]]:
        args, kwargs = call or self._current
        inspect.signature(self.module.forward).bind(*args, **kwargs)  # the plain TypeError of a plain call
        check_model(self.module, sharded=self.distributed)
        return example_dims(self.module.forward, args, kwargs, self.options.in_dims)

    def _run_untrained(self, graph: Untrained, reads: Reads, *inputs: Any) -> Sequence[Any]:
        """A graph without a private backward: what it leaves of examples is remembered."""
        if self.tracing:
            raise _TraceOnly
        self.note_given([inputs[p] for p in graph.arguments])
        self.kept.numbers.read(reads, self.module)
        outputs = self.kept.run(graph, inputs)
        self.ran(None, outputs)
        return outputs

    def note_given(self, tensors: Sequence[Any]) -> None:
        """Arguments of a call without gradients hold examples, but for those that ``in_dims`` says are shared."""
        try:
            dims = self._example_dims()
        except (DPCompileError, TypeError):  # a cache of another batch size: the call is evaluation
            dims = []
        shared = {id(t) for _, t, dim in dims if dim is None} | {id(p) for p in self._parameters.values()}
        self.kept.note_arguments((t for t in tensors if id(t) not in shared), trained=False)

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        names = {id(p): name for name, p in self._parameters.items()}
        trainable = any(id(v) in names and v.requires_grad for v in inputs if isinstance(v, Tensor))
        if not (trainable and torch.is_grad_enabled()):
            reads = reads_of(self.module)
            return partial(self._run_untrained, compile_untrained(gm, inputs, self.options.backend), reads)
        if self.options.memory_budget is None and self.options.backend == "inductor":
            keep_freed_memory()
        leaves = {id(t): (name, dim) for name, t, dim in self._example_dims()}
        roles = assign_roles(gm, inputs, names, leaves)
        region = _Region(self, roles, reads_of(self.module), roles.outside)
        extended, extra = extend(gm, roles)
        parts = None if self._turn is None else self._turn.parts
        copied = 0
        if self.options.backend == "inductor":
            filters = filters_of(gm, inputs, {**roles.frozen, **roles.parameters})
            copied = copied_bytes(gm, inputs, filters, parts or 1)
            region.filters = filters if parts is not None else {}

        verifier = Verifier(f"the model ({type(self.module).__name__})") if self.options.verify else None

        def transform(joint: fx.GraphModule) -> None:
            region.transformed = self.transformed = found = privatize(joint, roles, self.options, parts, copied)
            if verifier is not None:
                verifier.describe(found)

        region.compiled = compile_joint(
            extended,
            [*inputs_to_compile(gm, inputs, region.filters), *extra],
            backend=self.options.backend,
            transform=transform,
            key=cache_key(self.options, roles, parts or 1),
            watcher=verifier,
        )
        if region.transformed is None:
            raise UnsupportedGraphError(
                "the compiled graph came out of AOTAutograd's cache, so what it does to gradients was not proved here",
                remedy="unset TORCHINDUCTOR_AUTOGRAD_CACHE: dpcompile keeps that cache off",
            )
        return region

    @property
    def tracing(self) -> bool:
        """Whether calls stop before they run."""
        return self._tracing


@dataclass(slots=True)
class _Region:
    """One compiled graph at run time: Dynamo calls it with the graph's inputs."""

    engine: Engine
    roles: Roles
    reads: Reads
    outside: Mapping[int, str]
    compiled: Callable[..., Any] | None = None
    transformed: Transformed | None = None
    filters: dict[int, str] = field(default_factory=dict)

    def __call__(self, *inputs: Any) -> Any:
        if self.engine.tracing:
            raise _TraceOnly
        assert self.compiled is not None
        kept = self.engine.kept
        kept.note_arguments(inputs[p] for p in self.roles.examples)
        for p, name in self.outside.items():
            kept.check_input(name, inputs[p])
        kept.check_constants(self.reads, self.engine.module)
        position, dim = self.roles.batch_from
        self.engine.check_parameters(self.roles, inputs)
        names = [*self.roles.parameters.values(), *(self.roles.parameters[p] for p in self.roles.narrow)]
        filters = self.engine.filters(self.filters, inputs)
        delivery = self.engine.delivery(names, inputs[position], dim)
        live, narrow = ([inputs[p] for p in positions] for positions in (self.roles.parameters, self.roles.narrow))
        apart = self.engine.replicas.apart
        norms, aliases, sums = through_delivery(delivery, apart(live), apart(narrow))
        arguments = [filters.get(p, x) for p, x in enumerate(inputs)]
        for p, alias in zip(self.roles.parameters, aliases, strict=True):
            arguments[p] = alias
        outputs = self.compiled(*arguments, delivery.mask, norms, *sums)
        Unscaling(delivery.mask).before_backward_of(outputs)
        if self.transformed is not None:
            outputs = guarded(outputs, self.transformed.unowned)
        no_second_derivatives(outputs)
        self.engine.ran(self.transformed, outputs)
        return outputs
