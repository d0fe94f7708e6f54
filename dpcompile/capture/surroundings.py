"""What runs a private model from outside and cannot: tracers, exporters, transforms, second derivatives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dpcompile._torch.autograd import in_functorch, in_symbolic_trace
from dpcompile._torch.parallel import in_context_parallel
from dpcompile.errors import UnsupportedGraphError

__all__ = ["BY_ITSELF", "REBUILD", "no_second_derivatives", "refuse_tracers"]

REBUILD = (
    "do it with an ordinary model: build it again and load_state_dict(private.state_dict()); a private model is for "
    "training"
)
BY_ITSELF = f"a private model is compiled by itself, and cannot be exported or be a part of another graph: {REBUILD}"


def refuse_tracers() -> None:
    """Raise UnsupportedGraphError if the call is recorded or transformed by something that would lose its backward."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise UnsupportedGraphError("a private model cannot be traced by torch.jit", remedy=REBUILD)
    if in_symbolic_trace():
        raise UnsupportedGraphError("a private model cannot be traced by torch.fx", remedy=REBUILD)
    if torch.compiler.is_exporting():
        raise UnsupportedGraphError("a private model cannot be exported", remedy=REBUILD)
    if in_functorch():
        raise UnsupportedGraphError(
            "a transform of torch.func (vmap, grad, jacrev, ..) runs over the private model",
            remedy="use the transform inside forward, where it is part of the proof; otherwise " + REBUILD,
        )

    if in_context_parallel():
        raise UnsupportedGraphError(
            "the private model is called within torch's context_parallel, where a rank is given some of the tokens of "
            "each example: each part would be clipped as an example, and an example would count several times",
            remedy="cut the tokens inside the model, by styles of parallelize_module (docs/distributed.md, context "
            "parallelism)",
        )


def no_second_derivatives(outputs: Iterable[Any]) -> None:
    """Let a backward through these outputs that is itself to be differentiated raise UnsupportedGraphError."""
    for output in outputs:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(_refuse_graph)


def _refuse_graph(_: Tensor) -> None:
    if torch.is_grad_enabled():  # as create_graph=True sets it
        raise UnsupportedGraphError(
            "a derivative of the private model is to be differentiated again (create_graph=True), as a gradient "
            "penalty does it: its second backward would not be clipped",
            remedy="compute the penalty in forward, g = torch.func.grad(lambda x: self.net(x).sum())(x), and return "
            "each example's loss with it; then one backward suffices",
        )
