"""The loss that a user's loop makes of a private model's outputs: looked at when its backward comes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from dpcompile._torch import pytree
from dpcompile._torch.loss_graph import note, noted, roots
from dpcompile.graph.labels import Examples, Label, Shared, Summed
from dpcompile.proof.loss.labels import Of, Outer
from dpcompile.proof.loss.targets import refuse_uneven
from dpcompile.proof.loss.walk import refuse_mixing
from dpcompile.runtime.forward import Forward

__all__ = ["watch_loss", "watched"]

F = TypeVar("F", bound=Forward)
_Output: TypeAlias = "tuple[Outer, Callable[[], Tensor | None]]"
_LOOKED_AT = -1  # no output of a node has this number
_SMALL = 2**18  # numbers of an output that is held until its backward


def watched(run: Callable[[F], Any], forward: F) -> Any:
    """What a forward returns, of which the caller makes a loss."""
    result = run(forward)
    if torch.is_grad_enabled():
        watch_loss(result, forward.labels)
    return result


def watch_loss(result: Any, labels: Mapping[int, Label]) -> None:
    """Refuse the backward of a loss that mixes examples: :func:`dpcompile.proof.loss.walk.refuse_mixing`.

    What a loss is made of outside autograd is not seen: detached values, indices, targets, functions of one's own.

    Args:
        result: what a private model returns to its caller.
        labels: ``id(tensor)`` -> how the examples lie in it.
    """
    outputs = [result] if isinstance(result, Tensor) else pytree.tree_leaves(result)
    nodes: dict[Any, dict[int, _Output]] = {}
    for x in outputs:
        if type(x) is not Tensor or x.grad_fn is None:
            continue
        label = _outer(x, labels.get(id(x)))
        if label is not None:
            note(x.grad_fn, x.output_nr, label)
            nodes.setdefault(x.grad_fn, {})[x.output_nr] = label, _found_again(x)
    for node, known in nodes.items():
        node.register_prehook(partial(_look, known))


def _found_again(tensor: Tensor) -> Callable[[], Tensor | None]:
    """What an output held, while anything else holds it, or it is small; without its way back to the node."""
    if tensor.numel() > _SMALL:
        return weakref.ref(tensor)
    kept = tensor.detach()
    return lambda: kept


def _look(known: Mapping[int, _Output], cotangents: Sequence[Tensor | None]) -> None:
    new = [root for root in roots() if noted(root[0], _LOOKED_AT) is None]
    means = [mean for root in new for mean in refuse_mixing(root)]
    given = [(c, known.get(i)) for i, c in enumerate(cotangents) if c is not None]
    if len(means) == len(given) == 1:
        (cotangent, output), (mean,) = given[0], means
        values = None if output is None else output[1]()
        if output is not None and values is not None:
            refuse_uneven(mean, cotangent, values.detach(), output[0])
    for root, _ in new:
        note(root, _LOOKED_AT, True)


def _outer(tensor: Tensor, label: Label | None) -> Outer | None:
    """The label, where there are several examples; None: nothing is known."""
    if isinstance(label, Examples) and isinstance(label.outer, int) and isinstance(label.inner, int):
        return Of(label) if tensor.shape[label.dim] > label.outer * label.inner else None
    return label if isinstance(label, (Shared, Summed)) else None
