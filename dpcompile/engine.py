"""The engine behind a private module: it compiles calls, and keeps what their backward delivers."""

from __future__ import annotations

import inspect
import itertools
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from dpcompile._torch import compile_joint, disable, has_gradient_hooks, tracing_config
from dpcompile.arguments import example_dims
from dpcompile.axis import Label
from dpcompile.cachekey import cache_key
from dpcompile.capture import Roles, assign_roles, extend
from dpcompile.check import FirstStep
from dpcompile.delivery import Delivery, through_delivery
from dpcompile.errors import PrivacyError, UnsupportedGraphError
from dpcompile.kept import Kept
from dpcompile.kinds import check_model
from dpcompile.layouts import copied_bytes, filters_of, inputs_to_compile, shared_by_parts
from dpcompile.ledger import GradientLedger
from dpcompile.parts import Turn, asked_parts, joined, split_call
from dpcompile.pipeline import Options, Transformed, privatize
from dpcompile.ranks import world_size
from dpcompile.replicas import Replicas
from dpcompile.shards import zeros_for
from dpcompile.translate import translated
from dpcompile.unowned import guarded
from dpcompile.verify import Verifier
from dpcompile.workspace import keep_freed_memory, kept_gradients

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
        grad_norms: ``[B]`` float32 norms of the last backward, before clipping.
    """

    def __init__(self, module: nn.Module, options: Options) -> None:
        self.module, self.options = module, options
        self._parameters = dict(module.named_parameters())
        self.ledger = GradientLedger(self._parameters)
        self.replicas = Replicas(self.ledger, lambda: {n: self._parameters[n] for n in self.trainable()})
        self.transformed: Transformed | None = None
        self.grad_norms: Tensor | None = None
        self.kept = Kept()
        self.first_step: FirstStep | None = None
        self._unchecked = options.check
        self._mask: Tensor | None = None
        self._masked = False  # a loader says for every batch which rows are examples
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
        """Call the module, compiled.

        Within a function that the user compiles this is a graph break: traced into, it would lose its backward.
        """
        self._current, self._turn = (args, kwargs), None
        unchecked = self._unchecked
        try:
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
                raise refusal.with_traceback(None) from None
        finally:
            whole, self._current, self.first_step, self._turn = self._current, ((), {}), None, None
        self._parts[self._batch_size(whole)] = parts
        self._unchecked = unchecked  # nothing ran yet
        return self(*args, **kwargs)

    def _run_once(self) -> Any:
        """One call of the compiled module on what is current."""
        self._graph_ran = False
        self.first_step = self._recorder()
        args, kwargs = self._current
        with tracing_config():
            result = self._compiled_call()(self.module, args, kwargs)
        if not self._graph_ran and self.trainable() and torch.is_grad_enabled():
            raise UnsupportedGraphError(
                "the model ran without being compiled, so nothing would clip its gradients",
                remedy="switch torch.compile on again (TORCHDYNAMO_DISABLE, torch.compiler.set_stance)",
            )
        if torch.is_grad_enabled():
            self.kept.check_buffers(self.module)
        if self.first_step is not None:
            self.first_step.watch(result)
        return result

    def _run_parts(self, parts: int) -> Any:
        """The current call in parts, as :mod:`dpcompile.parts` has it."""
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
                self(*args, **kwargs)
        except _TraceOnly:
            pass
        finally:
            self._tracing = False

    def take_mask(self, batch: int, device: torch.device) -> Tensor:
        """The mask of the batch that is being run, as float32 weights; it is used once."""
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
        if not self._masked or self._mask is not None:
            return None
        return PrivacyError(
            "a second backward on one batch of the loader: its examples would count twice",
            remedy="call the model once per batch with gradients (others under torch.no_grad()); to train without the "
            "loader, finish its loop first",
        )

    def delivery(self, names: list[str], like: Tensor, dim: int) -> Delivery:
        """For the forward that is being run on examples along ``dim`` of ``like``."""
        turn, batch = self._turn or Turn(1), like.shape[dim]
        refused = self.refused_backward() if turn.mask is None else None
        if turn.mask is None:
            turn.mask = self.take_mask(batch * turn.parts, like.device)
        rows = slice(turn.index * batch, (turn.index + 1) * batch)
        recorder, reduces = self.first_step, self.replicas.reduces

        def keep(norms: Tensor | None, mask: Tensor, sums: list[tuple[str, Tensor]], graph_task: int) -> None:
            reached = {name for name, _ in sums}
            sums = [(n, s.contiguous() if self._parameters[n].is_contiguous() else s) for n, s in sums]
            untouched = [n for n in self.trainable() if n not in reached and self._parameters[n].grad is None]
            zeros = [(n, zeros_for(self._parameters[n])) for n in untouched]
            self.replicas.deliver(sums, zeros, graph_task=graph_task, call=turn, reduces=reduces)
            if norms is not None:
                self.grad_norms = turn.with_norms(norms.detach(), rows)
                if recorder is not None:
                    recorder.compare(norms, mask, sums)

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
            self._compiled[situation] = torch.compile(own, backend=self._backend, fullgraph=True, dynamic=dynamic)
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

    def _example_dims(self) -> list[tuple[str, Tensor, int | None]]:
        args, kwargs = self._current
        inspect.signature(self.module.forward).bind(*args, **kwargs)  # the plain TypeError of a plain call
        check_model(self.module, sharded=self.distributed)
        return example_dims(self.module.forward, args, kwargs, self.options.in_dims)

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        names = {id(p): name for name, p in self._parameters.items()}
        trainable = any(id(v) in names and v.requires_grad for v in inputs if isinstance(v, Tensor))
        if not (trainable and torch.is_grad_enabled()):
            compiled = compile_joint(gm, inputs, backend=self.options.backend, transform=_nothing, key="")
            return _Region(self, compiled)
        if self.options.memory_budget is None and self.options.backend == "inductor":
            keep_freed_memory()
        leaves = {id(t): (name, dim) for name, t, dim in self._example_dims()}
        roles = assign_roles(gm, inputs, names, leaves)
        region = _Region(self, roles=roles, others=roles.others)
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


def _nothing(_: fx.GraphModule) -> None:
    """Leave a graph without a private backward as it is."""


@dataclass(slots=True)
class _Region:
    """One compiled graph at run time: Dynamo calls it with the graph's inputs."""

    engine: Engine
    compiled: Callable[..., Any] | None = None
    roles: Roles | None = None
    transformed: Transformed | None = None
    others: dict[int, str] = field(default_factory=dict)
    filters: dict[int, str] = field(default_factory=dict)

    def __call__(self, *inputs: Any) -> Any:
        if self.engine.tracing:
            raise _TraceOnly
        assert self.compiled is not None
        if self.roles is None:
            outputs = self.compiled(*inputs)
            self.engine.ran(None, outputs)
            return outputs
        self.engine.kept.note_arguments(inputs[p] for p in self.roles.examples)
        for p, name in self.others.items():
            self.engine.kept.check_input(name, inputs[p])
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
        if self.transformed is not None:
            outputs = guarded(outputs, self.transformed.unowned)
        self.engine.ran(self.transformed, outputs)
        return outputs
