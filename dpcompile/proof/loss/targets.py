"""A mean over the targets that count, of the whole batch: whether examples have different numbers of them.

Autograd has freed the targets when the backward of the model begins. What is left is that a target that is ignored
hands nothing back: its row of the cotangent is zero. That of any other one is a softmax less one class, and zero only
where the softmax of the row is that class alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpcompile._torch.loss_graph import inputs_of, noted, operation_of, saved
from dpcompile.errors import ExampleMixingError, running_line
from dpcompile.proof.loss.labels import Of, Outer, Value

__all__ = ["MeanOfTargets", "means_of_targets", "refuse_uneven"]

_PASS_ON = (
    "LogSoftmax",
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Permute",
    "Transpose",
    "T",
    "Slice",
    "ToCopy",
    "Clone",
)
_LOOKED_AT = 8  # classes of each target, before all of them are
_SMALL = 2**16  # numbers of a cotangent that are looked at all together
_CERTAIN = 0.999  # the probability from which on a row may round to one class alone


@dataclass(frozen=True, slots=True)
class MeanOfTargets:
    """A mean of ``nll_loss``: the number of its targets and of its classes, and the shape of its input."""

    targets: int
    classes: int
    shape: tuple[int, ...]


def means_of_targets(node: Any, inputs: Sequence[Value]) -> list[MeanOfTargets]:
    """The operation, if it is such a mean of what the model returned as it is."""
    if operation_of(node) not in ("NllLoss", "NllLoss2D") or saved(node, "reduction") != 1:
        return []
    shape = inputs[0].shape
    if len(shape) < 2 or not _of_outputs(node):
        return []
    return [MeanOfTargets(math.prod((shape[0], *shape[2:])), shape[1], shape)]


def _of_outputs(node: Any) -> bool:
    """Whether nothing lies between the model's outputs and the mean that could make a row of the cotangent zero."""
    while True:
        inputs = [edge for edge in inputs_of(node) if edge[0] is not None]
        if len(inputs) != 1:
            return False
        node, output = inputs[0]
        if noted(node, output) is not None:
            return True
        if operation_of(node) not in _PASS_ON:
            return False


def refuse_uneven(mean: MeanOfTargets, cotangent: Tensor, output: Tensor, label: Outer) -> None:
    """Refuse a mean over targets of which the examples have different numbers.

    Args:
        mean: the one of the loss.
        cotangent: of the model's output that it is made of.
        output: that output.
        label: of that output.

    Raises:
        ExampleMixingError: a mean that divides by a number which depends on all examples. Rows that the loss does not
            read are zero too, as many of each example.
    """
    if not isinstance(label, Of) or not label.plain:
        return
    if cotangent.device.type != "cpu" or cotangent.dtype == torch.float16:
        return  # another device would have to be waited for; float16 rounds small ones to zero
    if cotangent.numel() <= _SMALL and int(torch.count_nonzero(cotangent)) == cotangent.numel():
        return
    of_classes = _dim_of_classes(mean, cotangent, label.axis.dim)
    if of_classes is None:
        return
    rows = cotangent.movedim((label.axis.dim, of_classes), (0, -1))
    if int(torch.count_nonzero(rows[..., :_LOOKED_AT].ne(0).any(-1))) >= mean.targets:
        return
    nothing = rows.eq(0).all(-1)
    scores = output.movedim((label.axis.dim, of_classes), (0, -1))[nothing].float()
    ignored = nothing.clone()
    ignored[nothing] = scores.softmax(-1).amax(-1) < _CERTAIN  # and not NaN
    none, certain = (x.reshape(len(rows), -1).sum(1) for x in (nothing, ignored))
    if not bool(nothing.all()) and int(certain.max()) > int(none.min()):
        of_examples = nothing[0].numel() - none
        raise ExampleMixingError(
            "the loss mixes examples: its mean divides by the number of targets that are not ignored, of the whole "
            f"batch, and the examples have from {int(of_examples.min())} to {int(of_examples.max())} of them",
            where=running_line(),
            remedy="take the mean of dpcompile.losses.per_example_cross_entropy(outputs, targets), or of another loss "
            "of each example, [B]",
        )


def _dim_of_classes(mean: MeanOfTargets, cotangent: Tensor, examples: int) -> int | None:
    """The dimension of the output along which the classes lie, as far as its size tells."""
    if tuple(cotangent.shape) == mean.shape and examples != 1:
        return 1
    last = cotangent.ndim - 1
    return last if last != examples and cotangent.shape[last] == mean.classes else None
