"""The rules by which operations of a loss pass labels on: one for each name that autograd has for an operation.

A rule says :class:`Mixes` where it is certain, and ``Unknown`` where it cannot tell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from dpcompile._torch.loss_graph import operation_of, saved
from dpcompile.graph.labels import Shared
from dpcompile.proof.loss.labels import Outer, Unknown, Value

__all__ = ["depending", "dims_of", "label_of_result", "rule", "signed", "spoken"]

Rule = Callable[[Any, Sequence[Value], tuple[int, ...], int], Outer]
_RULES: dict[str, Rule] = {}


def label_of_result(node: Any, values: Sequence[Value], shape: tuple[int, ...], output: int) -> Outer:
    """The label of an output of an operation.

    Args:
        node: autograd's.
        values: its inputs; those that are no differentiable tensors are ``Shared``.
        shape: of the output.
        output: its number.

    Raises:
        Mixes: the operation mixes examples.
    """
    if all(isinstance(v.label, Shared) for v in values):
        return Shared()
    if any(isinstance(v.label, Unknown) for v in values):
        return Unknown()
    rule = _RULES.get(operation_of(node))
    return Unknown() if rule is None else rule(node, values, shape, output)


def spoken(node: Any) -> str:
    """The operation's name as torch's functions have it: ``log_softmax``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", operation_of(node)).lower().replace("loss2_d", "loss2d")


def rule(names: str) -> Callable[[Rule], Rule]:
    """The rule of operations of these names."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def depending(values: Sequence[Value]) -> list[Value]:
    """Those that are made of the model's outputs."""
    return [v for v in values if not isinstance(v.label, Shared)]


def dims_of(node: Any, ndim: int, name: str = "dim") -> set[int]:
    """The dimensions that an operation was called with; all if none."""
    try:
        given = saved(node, name)
    except AttributeError:
        given = None
    if given is None or given == ():
        return set(range(ndim))
    return {signed(d) % ndim for d in ([given] if isinstance(given, int) else given)} if ndim else set()


def signed(dim: int) -> int:
    """A number that autograd keeps without its sign."""
    return dim - 2**64 if dim >= 2**63 else dim
