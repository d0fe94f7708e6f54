"""``compile_step``: forward, loss, backward, clipping, noise and update in one compiled graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from dpcompile._torch import compile_joint, flat_graph, pytree, tracing_config, written_numbers_forgotten
from dpcompile.arguments import InDims, example_dims
from dpcompile.capture import Roles, assign_roles, extend
from dpcompile.engine import Engine, with_own_code
from dpcompile.errors import PrivacyError, UnsupportedGraphError
from dpcompile.example_losses import ExampleLosses
from dpcompile.noise_op import add_gaussian_op_, seed_words
from dpcompile.optim import DPOptimizer
from dpcompile.pipeline import Transformed, privatize
from dpcompile.region_engine import RegionEngine
from dpcompile.runtime import engine_of
from dpcompile.translate import translated

__all__ = ["CompiledStep", "compile_step"]


def compile_step(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    optimizer: DPOptimizer,
    *,
    out_dims: int = 0,
    target_dims: InDims = 0,
) -> CompiledStep:
    """Compile the whole training step.

    The loss of an example is ``loss_fn(outputs, targets)`` on a batch that holds this example alone (by
    ``torch.func.vmap``), so any ``loss_fn`` will do, whatever it divides by: examples cannot meet in it, and it is part
    of the proof.

    Args:
        model: a :func:`dpcompile.dp_compile` model; its options apply (``loss_reduction`` has no part in it).
        loss_fn: from the model's outputs and the targets to a scalar, or to one value per example.
        optimizer: the :class:`dpcompile.DPOptimizer` of the model.
        out_dims: the dimension of the outputs that holds the examples.
        target_dims: the same for the targets; None for what all examples share.

    The learning rates of the optimizer's groups become tensors, which schedulers fill, so that a changed rate is no new
    graph.

    Returns:
        A callable ``step(inputs, targets) -> loss``. ``inputs`` is a tensor, a tuple of positional arguments or a dict
        of keyword arguments of the model. The loss is the mean over the batch (padding left out), detached and not
        private. With a :class:`dpcompile.PoissonLoader` attached to model and optimizer, batches that do not end their
        logical step only add to the clipped sums.

    Raises:
        PrivacyError: the model or the optimizer is not private, or they do not belong together.
    """
    engine = engine_of(model)
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
    if engine.distributed:
        raise UnsupportedGraphError(
            "compile_step makes one graph of the whole step, and this model is replicated by DistributedDataParallel",
            remedy="use the ordinary loop: model(inputs), loss.backward(), optimizer.step()",
        )
    for group in optimizer.param_groups:
        if isinstance(group["lr"], float):  # a number would be compiled in, and every change of it compiled anew
            group["lr"] = torch.tensor(group["lr"])
    return CompiledStep(engine, loss_fn, optimizer, out_dims, target_dims)


@dataclass(slots=True)
class _Program:
    """A compiled step for one signature of inputs.

    Attributes:
        graph: the rewritten joint graph, with flat inputs and outputs.
        feeds: for every graph input a function from (leaves of the call, mask) to its value.
        slots: parameter name -> the position of its clipped sum in the graph's outputs; missing if it is zero.
        norm_slot: the position of the norms.
        transformed: plan, certificate and graph.
        batch: the number of rows.
        device: where they lie.
        outside: what the graph reads that is no argument, by name.
    """

    graph: fx.GraphModule
    feeds: list[Callable[[Sequence[Any], Tensor], Any]]
    slots: dict[str, int]
    norm_slot: int
    transformed: Transformed
    batch: int
    device: torch.device
    outside: Mapping[str, Any]


class CompiledStep:
    """See :func:`compile_step`.

    **Guarantee.** Each logical step hands the inner optimizer, for every trainable parameter, the clipped sum over the
    examples of all its physical batches plus noise that no other step of this seed has, divided by a constant.
    Gradients in ``p.grad`` from before are overwritten; those it leaves there are noised and spent.
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
        self._programs: dict[Any, tuple[_Program, Callable[..., Any]]] = {}
        self._sums: list[Tensor] | None = None  # of a logical step that is not complete

    def __call__(self, inputs: Any, targets: Any) -> Tensor:
        """Run one step, or one physical batch of it; returns the mean loss of its examples, detached."""
        engine, optimizer = self._engine, self._optimizer
        names = optimizer.checked_parameters()
        program, run = self._program(inputs, targets, names)
        leaves = pytree.tree_leaves((inputs, targets))
        mask = engine.take_mask(program.batch, program.device)
        for name, value in program.outside.items():
            engine.kept.check_input(name, value)
        flat = [feed(leaves, mask) for feed in program.feeds]
        final = not optimizer.accumulating
        step = optimizer.use_noise() if final else optimizer.logical_step
        parameters = engine.parameters()
        for name in names:
            p = parameters[name]
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        words = seed_words(optimizer.seed, step, secure=optimizer.secure)
        with torch.no_grad(), written_numbers_forgotten():
            losses, norms, self._sums = run(flat, self._sums, words, final)
        engine.grad_norms, engine.transformed = norms, program.transformed
        if final:
            optimizer.finish()
        return (losses * mask).sum() / mask.sum().clamp_min(1)

    def _program(self, inputs: Any, targets: Any, names: Sequence[str]) -> tuple[_Program, Callable[..., Any]]:
        """The compiled step for inputs like these, and for these trainable parameters."""
        leaves, structure = pytree.tree_flatten((inputs, targets))
        signature = (
            structure,
            tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves),
            tuple(names),
            tuple(m.training for m in self._engine.module.modules()),
        )
        if signature not in self._programs:
            program = self._capture(inputs, targets, leaves)
            self._programs[signature] = program, self._compile(program, names)
        return self._programs[signature]

    def _capture(self, inputs: Any, targets: Any, leaves: Sequence[Any]) -> _Program:
        """The rewritten joint graph of model and loss."""
        args, kwargs = _as_call(inputs)
        dims = _broadcast(self._target_dims, targets)
        found: list[_Program] = []

        def axes() -> list[tuple[str, Tensor, int | None]]:
            of_inputs = example_dims(self._engine.module.forward, args, kwargs, self._engine.options.in_dims)
            named = {"targets": dims}
            return of_inputs + example_dims(lambda targets: None, (targets,), {}, named)

        def backend(gm: fx.GraphModule, graph_inputs: Sequence[Any]) -> Callable[..., Any]:
            names = {id(p): n for n, p in self._engine.parameters().items()}
            roles = assign_roles(gm, graph_inputs, names, {id(t): (name, dim) for name, t, dim in axes()})
            found.append(self._rewritten(gm, graph_inputs, roles, leaves))
            return _stop

        call = torch.compile(with_own_code(_call_losses, "losses"), backend=backend, fullgraph=True, dynamic=False)
        try:
            with tracing_config(), torch.enable_grad():
                call(self._losses, inputs, targets, dims)
        except _Captured:
            return found[0]
        except Exception as error:
            refusal = translated(error, axes)
            if refusal is None:
                raise
            raise refusal.with_traceback(None) from None
        raise AssertionError("the captured step ran")

    def _rewritten(
        self, gm: fx.GraphModule, graph_inputs: Sequence[Any], roles: Roles, leaves: Sequence[Any]
    ) -> _Program:
        options = replace(self._engine.options, loss_reduction="sum")  # the graph returns one loss per example
        extended, extra = extend(gm, roles)
        result: list[Transformed] = []
        compile_joint(
            extended,
            [*graph_inputs, *extra],
            backend="eager",
            transform=lambda joint: result.append(privatize(joint, roles, options, 1)),
            key="",
        )
        (transformed,) = result
        graph, sources = flat_graph(transformed.graph)
        places = {id(x): i for i, x in enumerate(leaves) if isinstance(x, Tensor)}

        def feed(source: int | None) -> Callable[[Sequence[Any], Tensor], Any]:
            if source is None:  # the cotangents: one for every example's own loss
                return lambda _, mask: torch.ones_like(mask)
            if source == roles.inputs:
                return lambda _, mask: mask
            if source > roles.inputs:  # inputs that only receive gradients: the graph does not read them
                return lambda *_: None
            value = graph_inputs[source]
            place = places.get(id(value))
            return (lambda *_: value) if place is None else (lambda now, _: now[place])

        position, dim = roles.batch_from
        batch_of: Tensor = graph_inputs[position]
        return _Program(
            graph=graph,
            feeds=[feed(s) for s in sources],
            slots={n: s for n, s in transformed.sum_slots.items() if n in transformed.plan.rules()},
            norm_slot=transformed.norm_slot,
            transformed=transformed,
            batch=batch_of.shape[dim],
            device=batch_of.device,
            outside={name: graph_inputs[p] for p, name in roles.outside.items()},
        )

    def _compile(self, program: _Program, names: Sequence[str]) -> Callable[..., Any]:
        """Gradients, noise and update as one function, compiled."""
        engine, optimizer = self._engine, self._optimizer
        parameters = engine.parameters()
        index = [list(parameters).index(name) for name in names]
        updated = [parameters[name] for name in names]
        graph, inner, norm_slot = program.graph, optimizer.optimizer, program.norm_slot
        slots = [program.slots.get(name) for name in names]
        std, expected = optimizer.noise_multiplier * engine.max_grad_norm, float(optimizer.expected_batch_size)
        secure = optimizer.secure
        # torch wraps an optimizer's step in a profiler and in a deliberate graph break; the step itself has neither.
        update = inspect.unwrap(type(inner).step)

        def run(flat: list[Any], before: list[Tensor] | None, words: Tensor, final: bool) -> Any:
            outputs = graph(*flat)
            sums = [
                _wide(outputs[slot] if slot is not None else torch.zeros_like(p))
                for slot, p in zip(slots, updated, strict=True)
            ]
            if before is not None:
                sums = [a + b for a, b in zip(before, sums, strict=True)]
            if not final:
                return outputs[0], outputs[norm_slot], sums
            if std > 0:
                sums = [s.clone() for s in sums]
                add_gaussian_op_(sums, index, std, words, secure)
            for p, total in zip(updated, sums, strict=True):
                p.grad.copy_(total / expected)  # type: ignore[union-attr]
            update(inner)
            return outputs[0], outputs[norm_slot], None

        return torch.compile(run, backend=engine.options.backend, fullgraph=True, dynamic=False)


class _Captured(Exception):
    """Stops a call once its graph is known."""


def _stop(*_: Any) -> Any:
    raise _Captured


def _call_losses(losses: ExampleLosses, inputs: Any, targets: Any, dims: Any) -> Tensor:
    return losses(inputs, targets, dims)


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _broadcast(dims: InDims, value: Any) -> Any:
    """``dims`` in the structure of ``value``."""
    if dims is None or isinstance(dims, int):
        return pytree.tree_map(lambda _: dims, value)
    return dims


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
