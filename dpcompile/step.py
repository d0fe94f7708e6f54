"""``compile_step``: forward, loss, backward and clipping in one compiled graph, and the optimizer's step after it."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from dpcompile._torch import pytree
from dpcompile._torch.dynamo import disable
from dpcompile.batches.draws import Given, nothing
from dpcompile.capture.arguments import InDims, example_dims, signature_of
from dpcompile.capture.example_losses import ExampleLosses
from dpcompile.capture.outputs import detach_all_but
from dpcompile.capture.roles import assign_roles
from dpcompile.capture.tensor_kinds import check_model
from dpcompile.capture.tracing import one_graph
from dpcompile.errors import PrivacyError, UnsupportedGraphError
from dpcompile.module import engine_of
from dpcompile.optim.optimizer import DPOptimizer
from dpcompile.regions.engine import RegionEngine
from dpcompile.runtime.base import Engine, with_own_code
from dpcompile.runtime.changing_numbers import constants_where_needed
from dpcompile.runtime.delivery import warn_of_lost_examples
from dpcompile.runtime.forward import AwaitedBackward, Forward, Running
from dpcompile.runtime.gradient_graph import Gradients, gradient_graph
from dpcompile.runtime.kept_numbers import reads_of
from dpcompile.runtime.parts import split_call
from dpcompile.runtime.sums import Delivered, lying_like
from dpcompile.runtime.translate import found_nothing, translated
from dpcompile.runtime.users import check_rows

__all__ = ["CompiledStep", "compile_step"]


def compile_step(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    optimizer: DPOptimizer,
    *,
    out_dims: int = 0,
    target_dims: InDims = 0,
) -> CompiledStep:
    """Compile forward, loss, backward and clipping as one graph, and step the optimizer after it.

    The loss of an example is ``loss_fn(outputs, targets)`` on a batch that holds this example alone (by
    ``torch.func.vmap``), so any ``loss_fn`` will do, whatever it divides by: examples cannot meet in it, and it is part
    of the proof.

    Args:
        model: a :func:`dpcompile.dp_compile` model; its options apply (``loss_reduction`` has no part in it).
        loss_fn: from the model's outputs and the targets to a scalar, or to one value per example.
        optimizer: the :class:`dpcompile.DPOptimizer` of the model.
        out_dims: the dimension of the outputs that holds the examples.
        target_dims: the same for the targets; None for what all examples share.

    Every call looks at what is true then, as an ordinary call of the model does: what Python read while the graph was
    made is guarded, and the optimizer's own step (one pass with the noise for Adam on CPUs) follows the graph.

    Returns:
        A callable ``step(inputs, targets) -> loss``. ``inputs`` is a tensor, a tuple of positional arguments or a dict
        of keyword arguments of the model. The loss is the mean over the batch (padding left out), detached and not
        private. With a :class:`dpcompile.PoissonLoader` attached to model and optimizer, a draw runs in as many parts
        of the physical size as it takes; batches of its :meth:`parts` that do not end their draw only add to the sums.

    Raises:
        PrivacyError: the model or the optimizer is not private, or they do not belong together.
        TypeError: ``loss_fn`` cannot be called with outputs and targets.
    """
    engine = engine_of(model)
    _check_loss(loss_fn)
    if not isinstance(optimizer, DPOptimizer):
        raise PrivacyError(
            f"compile_step needs a DPOptimizer, got {type(optimizer).__name__}: nothing would add the noise",
            remedy="optimizer = DPOptimizer(optimizer, model, noise_multiplier=..., expected_batch_size=...)",
        )
    if optimizer.engine is not engine:
        raise PrivacyError(
            "the optimizer belongs to another private model", remedy="make the DPOptimizer with the model given here"
        )
    if isinstance(engine, RegionEngine):
        raise UnsupportedGraphError(
            "compile_step makes one graph of the whole step, and this model is compiled in regions",
            remedy="use the ordinary loop: model(inputs), loss.backward(), optimizer.step(); or compile the model "
            "without regions",
        )
    _refuse_replicas(engine)
    return CompiledStep(engine, loss_fn, optimizer, out_dims, target_dims)


def _check_loss(loss_fn: Any) -> None:
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    if isinstance(loss_fn, type):
        raise TypeError(f"loss_fn is the class {name}: give an object of it, {name}()")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is called with the model's outputs and the targets; {loss_fn!r} cannot be called")
    called = loss_fn.forward if isinstance(loss_fn, torch.nn.Module) else loss_fn
    try:
        taken = inspect.signature(called)
    except ValueError:  # a function of C
        return
    try:
        taken.bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"loss_fn is called with the model's outputs and the targets, loss_fn(outputs, targets); "
            f"{name}{taken} cannot be: {error}"
        ) from None


def _refuse_replicas(engine: Engine) -> None:
    """At every step too: a model may be wrapped later."""
    if engine.distributed:
        raise UnsupportedGraphError(
            "compile_step makes one graph of the whole step, and this model is replicated by DistributedDataParallel",
            remedy="use the ordinary loop: model(inputs), loss.backward(), optimizer.step()",
        )


@dataclass(eq=False, slots=True)
class _Run:
    """One run of a compiled graph.

    Attributes:
        forward: what is given to the model, and the mask.
        inputs: of the step.
        targets: of the step.
        dims: the targets' example dimensions, in their structure.
        awaited: where its clipped sums go, once the graph ran.
        found: what the graph gave, once it ran.
    """

    forward: Forward
    inputs: Any
    targets: Any
    dims: Any
    awaited: AwaitedBackward | None = None
    found: Gradients | None = None


class CompiledStep:
    """See :func:`compile_step`.

    **Guarantee.** Each logical step hands the :class:`dpcompile.DPOptimizer` what the ordinary loop would: for every
    trainable parameter the clipped sum over the examples of all its physical batches, by way of the ledger. Gradients
    in ``p.grad`` from before are dropped; those it leaves there are noised and spent.

    =================================================  ==========================================================
    edge case                                          outcome
    =================================================  ==========================================================
    what the traced Python read has changed            Dynamo's guards see it: compiled anew
    a tensor attribute or buffer replaced              the new one is used
    a parameter replaced                               refused
    the optimizer's numbers, sigma, hooks changed      used as they are now: its step is the ordinary one
    an error before the clipped sums are delivered     as if the call had not been, but for random numbers drawn
    =================================================  ==========================================================
    """

    def __init__(
        self,
        engine: Engine,
        loss_fn: Callable[[Any, Any], Tensor],
        optimizer: DPOptimizer,
        out_dims: int,
        target_dims: InDims,
    ) -> None:
        self._engine, self._optimizer = engine, optimizer
        self._losses = ExampleLosses(engine.module, loss_fn, out_dims)
        self._target_dims = target_dims
        self._compiled: dict[tuple[str, ...], Callable[..., Tensor]] = {}
        self._running: Running[_Run] = Running()

    def __call__(self, inputs: Any, targets: Any) -> Tensor:
        """Run one step, or one of :meth:`dpcompile.PoissonLoader.parts`; returns its examples' mean loss, detached."""
        engine, optimizer = self._engine, self._optimizer
        _refuse_replicas(engine)
        optimizer.zero_grad()  # nothing, while a logical step is under way
        optimizer.checked_parameters()
        found = (
            self._drawn(inputs, targets) if engine.claims else [self._delivered(inputs, targets, Given(reduces=False))]
        )
        losses, counts = (torch.cat([getattr(f, name) for f in found]) for name in ("losses", "counts"))
        optimizer.step()
        return (losses * counts).sum() / counts.sum().clamp_min(1)

    @property
    def _sums(self) -> list[Tensor] | None:
        """The clipped sums of a logical step that is not complete, in the order of the parameters; None without one."""
        ledger = self._engine.ledger
        totals = [ledger.total(name) for name in self._engine.trainable()] if ledger.deliveries else []
        return [t for t in totals if t is not None] or None

    def _drawn(self, inputs: Any, targets: Any) -> list[Gradients]:
        """Of a batch of the loader, in as many runs of the graph as it takes."""
        draws, dims = self._engine.draws, self._example_dims(inputs, targets)
        assert draws is not None
        claim = draws.claim([(t, dim % t.ndim) for _, t, dim in dims if dim is not None])
        batch, mask = claim.batch, claim.mask
        if batch is None or mask is None:
            assert claim.refused is not None
            raise claim.refused
        pieces = split_call((inputs, targets), {}, dims, batch.turns)
        found: list[Gradients] = []
        for ((some, their), _), rows in zip(pieces, mask.chunk(batch.turns), strict=True):
            begin = partial(draws.begin, batch) if not found else nothing
            found.append(self._delivered(some, their, Given(rows, reduces=False, more=bool(found), begin=begin)))
        draws.delivered(batch)
        return found

    def _delivered(self, inputs: Any, targets: Any, given: Given) -> Gradients:
        """Run the graph, and hand its clipped sums to the ledger."""
        engine = self._engine
        run = _Run(Forward(*_as_call(inputs), given), inputs, targets, _broadcast(self._target_dims, targets))
        found = self._gradients(run)
        sums = lying_like(engine.parameters(), found.sums.items())
        assert run.awaited is not None
        engine.deliver(run.awaited, Delivered(found.norms, found.mask, next(_BACKWARDS), sums, found.by_group))
        engine.transformed = found.transformed
        warn_of_lost_examples(found.norms, found.mask)
        return found

    def _gradients(self, run: _Run) -> Gradients:
        """Losses, norms and clipped sums of a batch, by the graph that fits what is true now."""
        names = tuple(self._engine.trainable())  # Dynamo of torch 2.11 has no guard on it
        if names not in self._compiled:
            own, backend = with_own_code(_call_losses, "losses"), constants_where_needed(self._backend)
            self._compiled[names] = one_graph(own, backend, self._engine.options.dynamic)
        self._engine.kept.numbers.begin()
        try:
            with self._running.during(run), torch.inference_mode(False), torch.enable_grad():
                losses = self._compiled[names](self._losses, run.inputs, run.targets, run.dims)
            if run.found is not None:
                self._engine.kept.check_buffers(self._engine.module)
        except Exception as error:
            if found_nothing(error):
                self._compiled.clear()
            refusal = translated(error, partial(self._example_dims, run.inputs, run.targets))
            if refusal is None:
                raise
            raise refusal.with_traceback(None) from None
        if run.found is None or losses is not run.found.losses:
            raise UnsupportedGraphError(
                "the step ran without being compiled, so nothing clipped its gradients",
                remedy="switch torch.compile on again (TORCHDYNAMO_DISABLE, torch.compiler.set_stance)",
            )
        return run.found

    def _example_dims(self, inputs: Any, targets: Any) -> list[tuple[str, Tensor, int | None]]:
        """As of an ordinary call, and of the targets."""
        dims = _broadcast(self._target_dims, targets)
        forward = self._engine.module.forward
        args, kwargs = _as_call(inputs)
        signature_of(forward).bind(*args, **kwargs)  # the plain TypeError of a plain call
        check_model(self._engine.module)
        of_inputs = example_dims(forward, args, kwargs, self._engine.options.in_dims)
        found = of_inputs + example_dims(_of_targets, (targets,), {}, {"targets": dims})
        check_rows(found, self._engine.options.examples_per_user)
        return found

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """What Dynamo runs in the place of the graph: it returns the graph's outputs, and leaves the rest here."""
        engine, step = self._engine, self._running.now
        detach_all_but(gm, 0)  # the losses: what else the model keeps has no part in them
        leaves = engine.leaves(self._example_dims(step.inputs, step.targets))
        names = {id(p): n for n, p in engine.parameters().items()}
        roles = assign_roles(gm, inputs, names, leaves, clipping=engine.options.clipping)
        reads = reads_of(engine.module)
        program = gradient_graph(gm, inputs, roles, replace(engine.options, loss_reduction="sum"))

        @disable
        def run(*values: Any) -> Sequence[Any]:
            engine.kept.note_arguments(values[p] for p in roles.examples)
            for p, name in roles.outside.items():
                engine.kept.check_input(name, values[p])
            engine.kept.check_constants(reads, engine.module)
            engine.check_parameters((name, values[p]) for p, name in roles.parameters.items())
            position, dim = roles.batch_from
            step, like = self._running.now, values[position]
            step.awaited = engine.await_backward(step.forward, like.shape[dim], like.device)
            if step.forward.batch.refused is not None:
                raise step.forward.batch.refused
            bounds = engine.clip.in_graph(step.forward.batch.bound).of(program.transformed.present)
            outputs, step.found = program(values, step.awaited.mask, bounds, step.forward.batch.rows)
            engine.kept.note(outputs, program.transformed.output_labels)
            return outputs

        return run


def _call_losses(losses: ExampleLosses, inputs: Any, targets: Any, dims: Any) -> Tensor:
    return losses(inputs, targets, dims)


def _of_targets(targets: Any) -> None:
    """A forward of this argument."""


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _broadcast(dims: InDims, value: Any) -> Any:
    """``dims`` in the structure of ``value``."""
    if dims is None or isinstance(dims, int):
        return pytree.tree_map(lambda _: dims, value)
    return dims


_BACKWARDS = itertools.count(-2, -1)  # no number of a backward() of autograd
