"""Views of all elements: reshape, permute, expand, repeat, diagonals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dpcompile.graph.labels import Examples, Label, Summed, reshape_axis
from dpcompile.graph.sizes import Size, divide, is_one, product, same_shape, size, value_of
from dpcompile.proof.rules.growth import Degrees, Homogeneous, Linear, first
from dpcompile.proof.rules.registry import Call, axis_rule
from dpcompile.proof.rules.stripes import Behind, Stripes, broadcast, row_wise


def _growth_of_view(d: Degrees) -> float | None:
    """The same bits read as another dtype are other numbers; complex ones read as their two parts are the same."""
    now, before = d.node.meta["val"].dtype, d.node.all_input_nodes[0].meta["val"].dtype
    return first(d) if now.to_real() == before.to_real() else None


@axis_rule("aten.view", growth=Homogeneous(_growth_of_view))
@axis_rule(
    "aten._unsafe_view", "aten.reshape", "aten._reshape_alias", "aten.squeeze", "aten.unsqueeze",
    "aten.flatten", "aten.unflatten", "aten._reshape_copy", "prims.collapse_view", "prims.split_dim",
    growth=Linear(),
)  # fmt: skip
def reshape(call: Call) -> Label:
    """Row-major order is kept, so the example of every flat position is known."""
    if call["dtype"] is not None:
        return view_dtype(call)
    source = call.operands[0]
    label = call.label(source)
    if not isinstance(label, Examples):
        return label
    moved = reshape_axis(label, call.shape(source), call.out_shape, call.batch)
    return moved or call.mixes(
        f"it spreads the examples over several dimensions ({_show(call.shape(source))} to {_show(call.out_shape)}, "
        f"{label})"
    )


def view_dtype(call: Call) -> Label:
    """Reinterpret the elements; only the last dimension may change its size."""
    label = call.label(call["self"])
    if isinstance(label, Examples) and label.dim == len(call.out_shape) - 1:
        return call.unsupported("it reinterprets the elements along the example axis")
    if isinstance(label, Examples):
        return label
    parts = {call["self"].meta["val"].dtype, call.node.meta["val"].dtype}
    if isinstance(label, Summed) and parts in _COMPLEX_AND_PARTS:
        return label
    return call.mixes("it is not linear in a sum over the examples")


@row_wise(reshape)
def _slices_of_reshape(call: Call, stripes: Stripes, result: int) -> Behind:
    source = call.operands[0]
    if call["dtype"] is not None:
        last = stripes.dim == len(call.out_shape) - 1
        return None if last and not same_shape(call.shape(source), call.out_shape) else [(source, stripes)]
    moved = stripes.reshaped(call.out_shape, call.shape(source))
    return None if moved is None else [(source, moved)]


_COMPLEX_AND_PARTS = ({torch.float32, torch.complex64}, {torch.float64, torch.complex128})


@axis_rule("aten.permute", "prims.transpose", growth=Linear())
def permute(call: Call) -> Label:
    """Follow the dimension."""
    label = call.label(call.operands[0])
    if not isinstance(label, Examples):
        return label
    ndim = len(call.out_shape)
    order = call["dims"] if call["dims"] is not None else call["permutation"]
    return label.at([d % ndim for d in order].index(label.dim))


@row_wise(permute)
def _slices_of_permute(call: Call, stripes: Stripes, result: int) -> Behind:
    order: Any = call["dims"] if call["dims"] is not None else call["permutation"]
    return [(call.operands[0], stripes.at(order[stripes.dim] % len(order)))]


@axis_rule("aten.transpose", "aten.t", "aten.swapaxes", growth=Linear())
def transpose(call: Call) -> Label:
    """Swap two dimensions."""
    label = call.label(call["self"])
    ndim = len(call.out_shape)
    if not isinstance(label, Examples) or ndim < 2:
        return label
    first = call["dim0"] if call["dim0"] is not None else 0
    second = call["dim1"] if call["dim1"] is not None else 1
    first, second = first % ndim, second % ndim
    return label.at({first: second, second: first}.get(label.dim, label.dim))


@row_wise(transpose)
def _slices_of_transpose(call: Call, stripes: Stripes, result: int) -> Behind:
    ndim = len(call.out_shape)
    if ndim < 2:
        return [(call["self"], stripes)]
    first = (call["dim0"] if call["dim0"] is not None else 0) % ndim
    second = (call["dim1"] if call["dim1"] is not None else 1) % ndim
    return [(call["self"], stripes.at({first: second, second: first}.get(stripes.dim, stripes.dim)))]


@axis_rule("aten.expand", "aten.broadcast_to", "prims.broadcast_in_dim", growth=Linear())
def expand(call: Call) -> Label:
    """Repeat along new or single dimensions; the example axis only moves."""
    source = call.operands[0]
    label = call.label(source)
    if isinstance(label, Examples):
        if call["broadcast_dimensions"] is not None:
            return label.at(call["broadcast_dimensions"][label.dim])
        return label.at(label.dim + len(call.out_shape) - len(call.shape(source)))
    return label


@row_wise(expand)
def _slices_of_expand(call: Call, stripes: Stripes, result: int) -> Behind:
    source, placed = call.operands[0], call["broadcast_dimensions"]
    if placed is None:
        return broadcast(call, [source], stripes)
    if stripes.dim not in placed:
        return []
    dim = list(placed).index(stripes.dim)
    return [] if is_one(call.shape(source)[dim]) else [(source, stripes.at(dim))]


@axis_rule("aten.repeat", growth=Linear())
def repeat(call: Call) -> Label:
    """Tile: along the example axis this repeats the whole batch."""
    source, times = call["self"], [size(value_of(r)) for r in call["repeats"]]
    label = call.label(source)
    if not isinstance(label, Examples):
        return label
    dim = label.dim + len(times) - len(call.shape(source))
    return Examples(dim, product([times[dim], label.outer]), label.inner)


@row_wise(repeat)
def _slices_of_repeat(call: Call, stripes: Stripes, result: int) -> Behind:
    source = call["self"]
    dim = stripes.dim - len(call.out_shape) + len(call.shape(source))
    length = call.shape(source)[dim] if dim >= 0 else 1
    if divide(stripes.axis.inner, length) is not None:  # within a place it is whole copies
        return []
    outer = divide(length, stripes.period)
    return None if outer is None else [(source, Stripes(Examples(dim, outer, stripes.axis.inner), stripes.count))]


@axis_rule("aten.diagonal", "aten.diag_embed", "aten.unfold", "aten.movedim", growth=Linear())
def structured_view(call: Call) -> Label:
    """Views that take one or two dimensions apart; the example axis must be another one."""
    source = call["self"]
    label, ndim = call.label(source), len(call.shape(source))
    if not isinstance(label, Examples):
        return label
    name = call.name
    if name == "unfold":
        if call.dim(call["dimension"], ndim) == label.dim:
            return call.mixes("it slides a window over the examples")
        return label
    if name == "diagonal":
        first = call.dim(call["dim1"] if call["dim1"] is not None else 0, ndim)
        second = call.dim(call["dim2"] if call["dim2"] is not None else 1, ndim)
        if label.dim in (first, second):
            return call.mixes("it takes a diagonal across the examples")
        return label.at(label.dim - (first < label.dim) - (second < label.dim))
    return call.unsupported("this view has no rule on values of examples")


@row_wise(structured_view)
def _slices_of_structured_view(call: Call, stripes: Stripes, result: int) -> Behind:
    if call.name != "unfold":
        return None
    dim, last = call.dim(call["dimension"], len(call.shape(call["self"]))), len(call.out_shape) - 1
    return None if stripes.dim in (dim, last) else [(call["self"], stripes)]


def _show(shape: Sequence[Size]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
