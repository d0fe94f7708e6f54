"""How values of the backward grow with the cotangents.

A mean loss divides every cotangent by B, and the gradients are multiplied by B afterwards; a second backward scales the
cotangents by the clip weights. Both are exact if a gradient grows in proportion to the cotangents. All of torch's own
backwards are linear in them; that of a ``torch.autograd.Function`` or a hook on a gradient can be anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.locate import where
from dpcompile.graph.operations import operation_name
from dpcompile.proof.degrees import degrees_of, is_zero
from dpcompile.proof.prove import Proof

__all__ = ["check_scaling"]


def check_scaling(joint: JointGraph, proof: Proof, *, mean: bool, twice: bool) -> None:
    """Refuse gradients that do not grow in proportion to the cotangents, where that would be relied on.

    **Guarantee.** If this returns, and ``mean`` or ``twice`` is set, then s > 0 times the cotangents gives s times each
    gradient, up to rounding.

    ==========================================  ==========================================================
    backward of a custom Function               outcome
    ==========================================  ==========================================================
    ``-g``, ``g * mask``, ``g * (g > 0)``       right
    ``sign(g)``, ``g / g.norm()``, ``g * g``    refused under a mean loss; right if the loss is a sum
    ``g.clamp(-1, 1)``, ``g + noise``           the same
    a constant instead of ``g``                 the same
    ==========================================  ==========================================================

    Args:
        joint: the graph.
        proof: of it.
        mean: the loss is a mean over the batch.
        twice: a second backward runs on scaled cotangents.

    Raises:
        UnsupportedGraphError: naming the operation.
    """
    if not (mean or twice):
        return
    degrees = degrees_of(joint, proof)
    gradients = [(f"parameter '{n}'", g) for n, g in joint.gradients.items()]
    gradients += [(f"input '{joint.input_name(n)}'", g) for n, g in joint.input_gradients.items()]
    for of, gradient in gradients:
        if gradient is None or degrees[gradient] == 1 or is_zero(proof, gradient):
            continue
        culprit = _culprit(gradient, degrees)
        name = (
            operation_name(culprit.target).removeprefix("python::") if culprit.op == "call_function" else culprit.name
        )
        raise UnsupportedGraphError(
            f"the gradient of {of} does not grow in proportion to the cotangents (`{name}` in the backward of a custom "
            f"autograd.Function, or in a hook), and {_RELIES[mean]}",
            where=where(culprit),
            remedy="make that backward linear in what it is given, or use loss_reduction='sum' with the sum of the "
            "examples' losses, and a norm= that needs one backward only",
        )


_RELIES = {
    True: "the 1/B of a mean loss, which is in the cotangents, could not be undone",
    False: "the second backward, on cotangents times the clip weights, would give something else",
}


def _culprit(gradient: fx.Node, degrees: Mapping[fx.Node, Any]) -> fx.Node:
    """The operation that changed the degree, or has none."""
    if isinstance(degrees[gradient], fx.Node):
        return degrees[gradient]
    seen, waiting = {gradient}, [gradient]
    while waiting:
        node = waiting.pop(0)
        if degrees[node] != 1 and any(degrees[n] == 1 for n in node.all_input_nodes):
            return node
        found = [n for n in node.all_input_nodes if n not in seen]
        seen.update(found)
        waiting += found
    return gradient
