"""Torch's way from a captured graph to compiled code, with our decompositions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from dpcompile._torch import compile as torch_compile
from dpcompile._torch.compile import BackwardCompiler, GraphPass, Watcher
from dpcompile.graph.decompositions import DECOMPOSITIONS, take_apart

__all__ = ["compile_joint", "trace_like"]


def compile_joint(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    backend: str,
    transform: GraphPass,
    key: str,
    backward: BackwardCompiler | None = None,
    watcher: Watcher | None = None,
) -> Callable[..., Any]:
    """Take apart what a captured graph calls whole, and compile it.

    The arguments are those of :func:`dpcompile._torch.compile.compile_joint`.
    """
    take_apart(gm.graph)
    gm.recompile()
    return torch_compile.compile_joint(
        gm,
        inputs,
        backend=backend,
        transform=transform,
        key=key,
        decompositions=DECOMPOSITIONS,
        backward=backward,
        watcher=watcher,
    )


def trace_like(function: Callable[..., Any], *values: Any) -> fx.GraphModule:
    """Trace ``function`` on fake values into the operations that joint graphs are made of."""
    return torch_compile.trace_like(function, *values, decompositions=DECOMPOSITIONS)
