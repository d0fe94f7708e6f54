"""All steps of a recurrent layer as one operation (:mod:`dpcompile.kernels.recurrent`)."""

from __future__ import annotations

import dpcompile.kernels.recurrent  # noqa: F401  # registers the operations
from dpcompile.graph.labels import Examples, Label
from dpcompile.proof.rules.growth import Sum
from dpcompile.proof.rules.registry import Call, Labels, axis_rule
from dpcompile.proof.rules.stripes import Behind, Stripes, row_wise

_FORWARD = ("inputs", "state", "inside")
_BACKWARD = ("cotangent", "of_last", "previous", "saved", "inside")


@axis_rule("dpcompile.recurrence")
def recurrence(call: Call) -> Labels:
    """Every example's outputs and states, from its own."""
    return _along_examples(call, _FORWARD, results=3)


@axis_rule("dpcompile.recurrence_backward", growth=Sum(("cotangent", "of_last")))
def recurrence_backward(call: Call) -> Labels:
    """Every example's gradients, from its own."""
    return _along_examples(call, _BACKWARD, results=2)


def _along_examples(call: Call, names: tuple[str, ...], results: int) -> Labels:
    """Examples lie in dimension 1 of all operands but the weights, and of all results."""
    return (_axis(call, names),) * results


def _axis(call: Call, names: tuple[str, ...]) -> Label:
    if call.summed():
        return call.mixes("it runs a recurrent layer on a sum over all examples")
    if any(isinstance(call.label(call[n]), Examples) for n in ("weight", "bias")):
        return call.mixes("it runs every example through weights that depend on all of them")
    axes = [x for n in names if isinstance(x := call.label(call[n]), Examples)]
    if any(x.dim != 1 for x in axes):
        return call.mixes(
            "it runs through the examples one after another: a recurrent layer takes [T, B, ..], or [B, T, ..] with "
            "batch_first=True"
        )
    if any(not x.same_layout(axes[0]) for x in axes):
        return call.mixes("its operands enumerate the examples in different orders")
    refusals = (call.by_row(call[n], axes[0]) for n in names)
    return next((r for r in refusals if r is not None), axes[0])


@row_wise(recurrence, recurrence_backward)
def _slices(call: Call, stripes: Stripes, result: int) -> Behind:
    if stripes.dim != 1:
        return None
    return [(call[n], stripes) for n in dict.fromkeys((*_FORWARD, *_BACKWARD)) if call[n] is not None]
