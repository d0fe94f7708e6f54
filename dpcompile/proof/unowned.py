"""Outputs that depend on no example: a gradient through them belongs to nobody, so there must be none.

Models return such values on the side: weights that a hook keeps on the module (old-style weight and spectral
normalisation, pruning), tables, regularisers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.insert import insert, last_of
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Shared
from dpcompile.graph.locate import where
from dpcompile.proof.prove import Proof

__all__ = ["erase_cotangents", "guarded"]


def erase_cotangents(joint: JointGraph, proof: Proof) -> dict[int, str | None]:
    """Put zeros in the place of cotangents that belong to no example.

    **Guarantee.** Whatever is handed to the compiled backward for such an output, the graph does not read it.

    Returns:
        Output position -> the user's line; :func:`guarded` refuses gradients through these outputs when it runs.
    """
    found: dict[int, str | None] = {}
    for tangent, position in joint.plain_tangents.items():
        output = joint.tangent_of[tangent]
        if not isinstance(proof.of(output), Shared):
            continue
        found[position] = where(output)
        if tangent.users:
            placeholders = joint.graph.find_nodes(op="placeholder")
            zeros = insert(joint.graph, last_of(joint.graph, placeholders), torch.zeros_like, [tangent])
            tangent.replace_all_uses_with(zeros, delete_user_cb=lambda user, zeros=zeros: user is not zeros)
    return found


def guarded(outputs: Sequence[Any], unowned: Mapping[int, str | None]) -> Sequence[Any]:
    """The outputs; a backward through one of the unowned ones raises UnsupportedGraphError."""
    if not unowned:
        return outputs
    return tuple(
        _NoGradient.apply(x, i, unowned[i]) if i in unowned and isinstance(x, Tensor) and x.requires_grad else x
        for i, x in enumerate(outputs)
    )


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, position: int, place: str | None) -> Tensor:  # type: ignore[override]
        ctx.position, ctx.place = position, place
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedGraphError(
            f"the loss depends on output {ctx.position} of the model, which does not come from the examples: its "
            "gradient belongs to no example, so it cannot be clipped",
            where=ctx.place,
            remedy="keep regularisers on parameters out of the loss (use the optimizer's weight_decay), or detach them",
        )
