"""Which operands of a site run along its example axis, position by position.

The proof labels operands that depend on examples. A shared operand can be as long as the batch too (positions computed
for every row of the batch, say): taking one example out must take its part of that operand out as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from dpcompile.graph.labels import Examples
from dpcompile.graph.sizes import is_one, shape_of
from dpcompile.proof.site_kinds import SiteKind

__all__ = ["complete_axes"]


def complete_axes(
    kind: str,
    known: SiteKind,
    operation: fx.Node,
    operands: Mapping[str, fx.Node],
    axes: Mapping[str, Examples],
) -> dict[str, Examples]:
    """Add the operands that lie along the example axis of the labelled ones.

    Args:
        kind: the site's operation.
        known: what is known of it.
        operation: its node.
        operands: tensor operands by name; elements of a list as ``name.position``.
        axes: of the operands that depend on examples; at least one.
    """
    completed = dict(axes)
    name, axis = next(iter(axes.items()))
    if known.lies_along:
        for name, dim in known.lies_along.items():
            shape = shape_of(operands[name].meta["val"]) if name in operands else ()
            if shape and not is_one(shape[dim]):
                completed[name] = axis.at(dim % len(shape))
    elif kind in ("index_put", "_unsafe_index_put"):
        completed.update(_index_put(operation, operands, name, axis))
    elif kind == "scatter_add":
        completed.update({n: axis for n in ("index", "src") if n in operands})
    elif kind == "index_add":
        completed.update({"index": axis.at(0), "source": axis.at(_dim(operation))})
    return completed


def _index_put(operation: fx.Node, operands: Mapping[str, fx.Node], name: str, axis: Examples) -> dict[str, Examples]:
    indices: Any = operation.args[1]
    indexed = [d for d, i in enumerate(indices) if i is not None]
    index_ndim = max(_ndim(indices[d]) for d in indexed)
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    start = indexed[0] if adjacent else 0
    base = _ndim(operation.args[0])
    ends = {f"indices.{d}": start + index_ndim for d in indexed}  # where each operand's last dimension ends
    ends["values"] = base - len(indexed) + index_ndim
    place = axis.dim + ends[name] - _ndim(operands[name])  # in the shape that is written to
    completed = {}
    for operand, end in ends.items():
        node = operands[operand]
        dim = place - end + _ndim(node)
        if 0 <= dim < _ndim(node) and not is_one(shape_of(node.meta["val"])[dim]):
            completed[operand] = axis.at(dim)
    return completed


def _ndim(node: Any) -> int:
    return node.meta["val"].ndim


def _dim(operation: fx.Node) -> int:
    dim: Any = operation.args[1]
    return dim % _ndim(operation.args[0])
