"""Operators that graphs hold whole, with as little between the graph and the function as torch's dispatcher allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["operator"]

_LIBRARY = torch.library.Library("dpcompile", "FRAGMENT")


def operator(name: str, tags: Sequence[torch.Tag] = ()) -> Callable[[Callable[..., Any]], Any]:
    """``dpcompile::name`` of a function, for graphs that are not differentiated again.

    ``torch.library.custom_op`` puts wrappers of Python around each call, for autograd, aliases and Dynamo, that take
    longer than a product of small matrices. The results of such a function are new tensors; it has no derivative, and
    is called where Dynamo does not trace: by compiled graphs, which run with Dynamo off.

    Args:
        name: of the operator, which gets no fake implementation here.
        tags: of torch's, besides that it is for compiled graphs.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=[torch.Tag.pt2_compliant_tag, *tags])
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        overload = getattr(torch.ops.dpcompile, name).default
        overload.in_python = function  # for whoever looks at what it runs
        return overload

    return decorate
