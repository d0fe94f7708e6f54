"""Rules of what moves: views, parts, and what is put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpcompile._torch.loss_graph import operation_of, saved
from dpcompile.graph.labels import Examples, Shared, Summed, reshape_axis
from dpcompile.proof.loss.labels import EVERY, Of, OneExample, Outer, Unknown, Value, combined
from dpcompile.proof.loss.registry import depending, dims_of, rule, signed


@rule("View UnsafeView ReshapeAlias Squeeze Unsqueeze Unflatten")
def _view(_: Any, values: Sequence[Value], shape: tuple[int, ...], __: int) -> Outer:
    (value,) = values
    if not isinstance(value.label, Of):
        return value.label
    axis = value.label.axis
    batch = value.shape[axis.dim] // (axis.outer * axis.inner)  # type: ignore[operator]
    found = reshape_axis(axis, value.shape, shape, batch) if batch > 1 else None
    return Unknown() if found is None else Of(found, value.label.picked)


@rule("Expand")
def _expand(_: Any, values: Sequence[Value], shape: tuple[int, ...], __: int) -> Outer:
    return combined(values, len(shape), linear=True)


@rule("T Transpose Permute")
def _permute(node: Any, values: Sequence[Value], shape: tuple[int, ...], _: int) -> Outer:
    (value,) = values
    if not isinstance(value.label, Of) or not shape:
        return value.label
    order = list(range(len(shape)))
    if operation_of(node) == "Permute":
        order = [signed(d) % len(shape) for d in saved(node, "dims")]
    elif len(shape) > 1:
        a, b = (0, 1) if operation_of(node) == "T" else (signed(saved(node, f"dim{i}")) % len(shape) for i in (0, 1))
        order[a], order[b] = b, a
    return Of(value.label.axis.at(order.index(value.label.axis.dim)), value.label.picked)


@rule("Select Unbind Slice Split SplitWithSizes Narrow")
def _part(node: Any, values: Sequence[Value], shape: tuple[int, ...], output: int) -> Outer:
    (value,) = values
    name = operation_of(node)
    if not isinstance(value.label, Of):
        return value.label
    axis = value.label.axis
    dim = signed(saved(node, "dim")) % len(value.shape)
    if dim != axis.dim:
        gone = name in ("Select", "Unbind") and dim < axis.dim
        return Of(axis.at(axis.dim - gone), value.label.picked)
    length = value.shape[dim]
    if shape == value.shape:
        return value.label
    if not value.label.plain or value.label.picked != EVERY:
        return Unknown()
    if name in ("Select", "Unbind"):
        return OneExample(signed(saved(node, "index")) % length if name == "Select" else output)
    start, step = _start(node, name, output, length), saved(node, "step") if name == "Slice" else 1
    if shape[dim] == 1:
        return OneExample(start)
    return Of(axis, EVERY if (start, step) == (0, 1) else (start, step))  # beside others: as many, from the first on


def _start(node: Any, name: str, output: int, length: int) -> int:
    if name == "Split":
        return output * saved(node, "split_size")
    if name == "SplitWithSizes":
        return sum(saved(node, "split_sizes")[:output])
    start = signed(saved(node, "start") or 0)
    return min(start + length if start < 0 else start, length)


@rule("Flip Roll")
def _moved(node: Any, values: Sequence[Value], shape: tuple[int, ...], _: int) -> Outer:
    (value,) = values
    if not isinstance(value.label, Of) or value.label.axis.dim not in dims_of(node, len(shape), "dims"):
        return value.label
    return Of(value.label.axis, ("moved", id(node))) if value.label.plain else Unknown()


@rule("IndexSelect Gather Repeat Diagonal ConstantPadNd")
def _taken(node: Any, values: Sequence[Value], shape: tuple[int, ...], _: int) -> Outer:
    (value,) = depending(values)
    if not isinstance(value.label, Of) or operation_of(node) == "Diagonal":
        return value.label if not isinstance(value.label, Of) else Unknown()
    dim, ndim = value.label.axis.dim, len(value.shape)
    if operation_of(node) == "Repeat" or len(shape) != ndim or shape[dim] != value.shape[dim]:
        return Unknown()
    if operation_of(node) in ("IndexSelect", "Gather") and dim in dims_of(node, ndim):
        return Unknown()
    return value.label


@rule("Stack Cat")
def _together(node: Any, values: Sequence[Value], shape: tuple[int, ...], _: int) -> Outer:
    stacked = operation_of(node) == "Stack"
    dim = signed(saved(node, "dim")) % len(shape)
    labels = [v.label for v in values]
    if all(isinstance(x, (Summed, Shared)) for x in labels):
        return Summed()
    rows = [x.index for x in labels if isinstance(x, OneExample)]
    if len(rows) == len(labels) > 1:
        whole = len(set(rows)) == len(rows) == shape[dim]
        picked = EVERY if rows == list(range(len(rows))) else ("these", *rows)
        return labels[0] if len(set(rows)) == 1 else Of(Examples(dim), picked) if whole else Unknown()
    if any(not isinstance(x, (Of, Shared)) for x in labels):
        return Unknown()
    axes = {(x.axis.dim, x.picked, x.axis.outer, x.axis.inner) for x in labels if isinstance(x, Of)}
    first = next(x for x in labels if isinstance(x, Of))
    if len(axes) > 1 or (first.axis.dim == dim and not stacked):
        return Unknown()
    return Of(first.axis.at(first.axis.dim + (stacked and dim <= first.axis.dim)), first.picked)
