"""Cotangents of a table that are zero at some positions: which these are, and what they are without the zeros.

A look-up writes zeros where an index is the padding's. The cotangents behind them may be much smaller than the table's
rows for every position: those of a mean are one row for each example.
"""

from __future__ import annotations

from torch import fx

from dpcompile.graph.operations import FILLED, operation_name
from dpcompile.graph.sizes import shape_of

__all__ = ["is_zero", "zeroed_positions"]


def zeroed_positions(values: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Of ``where(left out, 0, source)``, by positions: which are left out, ``[..., 1]``, and the source; else None."""
    if values.op != "call_function" or operation_name(values.target) != "where" or len(values.args) != 3:
        return None
    left_out, zero, source = values.args
    if not (isinstance(left_out, fx.Node) and isinstance(source, fx.Node) and is_zero(zero)):
        return None
    value, shape = source.meta["val"], shape_of(values.meta["val"])
    whole = shape_of(value) == shape and value.dtype == values.meta["val"].dtype
    return (left_out, source) if whole and shape_of(left_out.meta["val"]) == (*shape[:-1], 1) else None


def is_zero(node: object) -> bool:
    """Whether a node is a constant of zeros."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    name = FILLED.get(operation_name(node.target))
    if name is None:
        return False
    schema = getattr(node.target, "_schema")  # noqa: B009
    named = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    return isinstance(named.get(name), (int, float)) and bool(named[name] == 0)
