"""``per_example_gradients``: every example's own gradient of chosen parameters, for research, beside the training."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dpcompile._torch import pytree
from dpcompile.capture.arguments import InDims
from dpcompile.errors import DPCompileError, PrivacyWarning, UnsupportedGraphError
from dpcompile.module import Engine, engine_of, private_view

__all__ = ["PerExampleGradients", "per_example_gradients"]

_Gradients = dict[str, Tensor]


def per_example_gradients(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    parameters: Sequence[str] | None = None,
    target_dims: InDims = 0,
) -> PerExampleGradients:
    """A callable that gives every example's own gradient, before clipping and without noise.

    To look at, not to train with: what it returns is not private, and one example's gradient can be as good as the
    example (Zhu, Liu, Han 2019, "Deep leakage from gradients"). It writes no ``p.grad``, takes no draw of a loader, no
    random number and no buffer's update, and what it returns holds no graph.

    Args:
        model: a :func:`dpcompile.dp_compile` model, also one that trains; its ``in_dims`` apply.
        loss_fn: from the outputs and the targets of a batch of one example to its loss, a single number.
        parameters: names as in ``model.named_parameters()``; None: all that require a gradient.
        target_dims: the dimension of the targets that holds the examples; None for what all examples share.

    Returns:
        A callable ``gradients(inputs, targets) -> {name: [B, *shape]}``. ``inputs`` is a tensor, a tuple of positional
        arguments or a dict of keyword arguments of the model. It takes memory for as many gradients as there are
        examples: take few parameters, or small batches.

    Raises:
        PrivacyError: a model that is not private.
        DPCompileError: a name of no such parameter.
        UnsupportedGraphError: parameters that are sharded or replicated, or users in the place of examples.

    Warns:
        PrivacyWarning: once for each callable.
    """
    engine = engine_of(model)
    if engine.distributed:
        raise UnsupportedGraphError(
            "per-example gradients of a model on several ranks",
            remedy="look at them in a copy of the model on one rank",
        )
    if engine.options.examples_per_user > 1:
        raise UnsupportedGraphError(
            "per-example gradients, and a model whose batches are of users",
            remedy="call dp_compile on a copy of the ordinary model, without examples_per_user",
        )
    trained = engine.trained()
    for name in trained if parameters is None else parameters:
        if name not in trained:
            close = difflib.get_close_matches(name, trained, n=1) or sorted(trained)[:1]
            known = name in engine.parameters()
            raise DPCompileError(
                f"parameter {name!r} is frozen" if known else f"the model has no parameter {name!r}",
                remedy=f"give names of parameters that require a gradient{f', such as {close[0]!r}' if close else ''}",
            )
    warnings.warn(
        "per-example gradients are not private: nothing clips them or adds noise. To look at in research; publish "
        "nothing that was computed from them, and choose nothing by them that is published",
        PrivacyWarning,
        stacklevel=2,
    )
    return PerExampleGradients(engine, loss_fn, tuple(trained if parameters is None else parameters), target_dims)


class PerExampleGradients:
    """See :func:`per_example_gradients`.

    **Guarantee.** The model is proved on these inputs first, as in training: examples do not mix. Then row i is the
    gradient of the loss of a batch that holds example i alone, whatever else the batch holds.

    =================================================  ==========================================================
    edge case                                          outcome
    =================================================  ==========================================================
    what ``torch.func.vmap`` cannot run                one forward and backward for each example, one by one
    a parameter that the loss does not depend on       zeros
    dropout                                            drawn for each example, other draws than training's
    a buffer that the forward writes                   stays as it was
    a batch without examples                           ``[0, *shape]``
    the result becomes part of the model               refused when a forward with gradients reads it
    the result is written to ``p.grad``                refused by the optimizer's step
    the result, or numbers from it, change weights     not recognised (docs/sharp_edges.md)
    by hand, or choose examples or settings
    =================================================  ==========================================================
    """

    def __init__(self, engine: Engine, loss_fn: Callable[[Any, Any], Tensor], names: Sequence[str], dims: Any) -> None:
        self._engine, self._loss_fn, self._names, self._target_dims = engine, loss_fn, names, dims
        proved = replace(engine.options, backend="eager", verify=False, check=False, memory_budget=None)
        self._view = private_view(engine.module, proved)

    def __call__(self, inputs: Any, targets: Any = None) -> _Gradients:
        """Gradients ``[B, *shape]`` by name, detached. Not private.

        Raises:
            DPCompileError: what the model is refused for, or a loss that is not one number.
        """
        positional = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        call = ((), dict(inputs)) if isinstance(inputs, dict) else (positional, {})
        call, targets = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (call, targets))
        dims = self._dims(call, targets)
        rows = {x.shape[d] for x, d in zip(pytree.tree_leaves((call, targets)), dims, strict=True) if d is not None}
        if len(rows) != 1:
            raise DPCompileError(
                f"inputs and targets have {' and '.join(map(str, sorted(rows))) or 'no'} examples",
                remedy="give as many of each; target_dims=None for targets that all examples share",
            )
        trained = {name: self._engine.trained()[name].detach() for name in self._names}
        if rows == {0}:
            return {name: p.new_zeros((0, *p.shape)) for name, p in trained.items()}
        with torch.random.fork_rng(devices=sorted({p.device.index or 0 for p in trained.values() if p.is_cuda})):
            self._view.trace(*call[0], **call[1])
            found = self._of_rows(trained, (call, targets), dims)
        self._engine.kept.note_arguments(found.values(), trained=False)
        return found

    def _dims(self, call: Any, targets: Any) -> list[int | None]:
        """The dimension of the examples of every leaf of both; None for what is shared, or no tensor."""
        named = {id(t): d for _, t, d in self._engine.example_dims(call)}
        given = self._target_dims
        of_targets = given if not isinstance(given, int) and given is not None else None
        if of_targets is None:
            of_targets = pytree.tree_map(lambda x: given if isinstance(x, Tensor) else None, targets)
        found = [named.get(id(x)) if isinstance(x, Tensor) else None for x in pytree.tree_leaves(call)]
        leaves, structure = pytree.tree_flatten(targets)
        found += structure.flatten_up_to(of_targets) if leaves else []
        both = [*pytree.tree_leaves(call), *leaves]
        return [None if d is None else d % x.ndim for x, d in zip(both, found, strict=True)]

    def _of_rows(self, trained: _Gradients, both: Any, dims: Sequence[int | None]) -> _Gradients:
        leaves, structure = pytree.tree_flatten(both)
        split = [i for i, d in enumerate(dims) if d is not None]

        def loss(parameters: _Gradients, rows: Sequence[Tensor]) -> Tensor:
            values = list(leaves)
            for i, row in zip(split, rows, strict=True):
                values[i] = row
            (args, kwargs), targets = pytree.tree_unflatten(values, structure)
            module = self._engine.module
            kept = {n: b.clone() for n, b in module.named_buffers()}
            rest = {n: p.detach() for n, p in module.named_parameters()}
            found = self._loss_fn(
                torch.func.functional_call(module, {**rest, **kept, **parameters}, args, kwargs), targets
            )
            if not isinstance(found, Tensor) or found.numel() != 1:
                what = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise DPCompileError(
                    f"loss_fn gave {what} for one example", remedy="give one number, a mean or sum over its positions"
                )
            return found.reshape(())

        # An example's slice keeps its dimension, of size 1: the batch of one.
        along = [leaves[i].unflatten(dims[i], (-1, 1)) for i in split]
        axes = [dims[i] for i in split]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # operations that vmap runs one example at a time
                each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, axes), randomness="different")
                return {n: g.detach() for n, g in each(trained, along).items()}
        except RuntimeError:
            count = along[0].shape[axes[0]]
            found = [
                _alone(loss, trained, [x.select(d, i) for x, d in zip(along, axes, strict=True)]) for i in range(count)
            ]
            return {name: torch.stack([one[name] for one in found]) for name in trained}


def _alone(
    loss: Callable[[_Gradients, Sequence[Tensor]], Tensor], trained: _Gradients, rows: Sequence[Tensor]
) -> _Gradients:
    """One forward and backward."""
    parameters = {name: p.clone().requires_grad_() for name, p in trained.items()}
    with torch.enable_grad():
        value = loss(parameters, rows)
        if not value.requires_grad:
            return {name: torch.zeros_like(p) for name, p in trained.items()}
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))
