"""A cross entropy whose logits never exist as a whole (:mod:`dpcompile.kernels.head`)."""

from __future__ import annotations

from dpcompile.graph.labels import Examples, Label, Summed
from dpcompile.kernels.head import head_gradients  # and registers the operations
from dpcompile.proof.rules.experts import along_rows
from dpcompile.proof.rules.growth import Linear
from dpcompile.proof.rules.registry import Call, Labels, axis_rule
from dpcompile.proof.site_kinds import SiteKind

_BY_ROW = {"cotangent": 0, "hidden": 0, "labels": 0, "totals": 0}


@axis_rule("dpcompile.head_losses")
def head_losses(call: Call) -> Labels:
    """Every row's loss, and the logarithm of the sum of its exponentials."""
    found = _own_rows(call, "hidden", "labels")
    return found, found


@axis_rule("dpcompile.head_hidden", growth=Linear("cotangent"))
def head_hidden(call: Call) -> Label:
    """Every row's gradient."""
    return _own_rows(call, *_BY_ROW)


@axis_rule(
    "dpcompile.head_sums",
    growth=Linear("cotangent"),
    site=SiteKind(("cotangent",), _BY_ROW, per_example=head_gradients, form="head", widens=True),
)
def head_sums(call: Call) -> Label:
    """The sum of all rows' gradients of the matrix, or of the bias."""
    found = _own_rows(call, *_BY_ROW)
    return Summed() if isinstance(found, Examples) else found


@axis_rule("torch_nn._linear_cross_entropy_batch_chunked", "torch_nn._linear_cross_entropy_batch_chunked_no_reduction")
def chunked(call: Call) -> Labels:
    """Torch's own, whose backward cannot be taken apart."""
    refusal = call.unsupported(
        "torch's chunked linear cross entropy is one operation forward and backward, and gives no example's gradient",
        "call dpcompile.losses.per_example_linear_cross_entropy, which does not hold the logits either, or leave out "
        "options=",
    )
    value = call.node.meta["val"]
    return tuple(refusal for _ in value) if isinstance(value, (tuple, list)) else refusal


def _own_rows(call: Call, *names: str) -> Label:
    if call.summed() or any(isinstance(call.label(call[n]), Examples) for n in ("weight", "bias")):
        return call.mixes("it multiplies every example's rows with a matrix that depends on all of them")
    return along_rows(call, *names)
