"""Views, and operations that move whole slices: reshape, permute, expand, slice, concatenate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from dpcompile.graph.labels import Examples, Label, Shared, Summed, reshape_axis
from dpcompile.graph.sizes import Size, divide, product, same, same_shape, shape_of, size
from dpcompile.proof.rules.registry import Call, Labels, axis_rule


@axis_rule(
    "aten.view", "aten._unsafe_view", "aten.reshape", "aten._reshape_alias", "aten.squeeze", "aten.unsqueeze",
    "aten.flatten", "aten.unflatten", "aten._reshape_copy", "prims.collapse_view", "prims.split_dim",
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


_COMPLEX_AND_PARTS = ({torch.float32, torch.complex64}, {torch.float64, torch.complex128})


@axis_rule("aten.permute", "prims.transpose")
def permute(call: Call) -> Label:
    """Follow the dimension."""
    label = call.label(call.operands[0])
    if not isinstance(label, Examples):
        return label
    ndim = len(call.out_shape)
    order = call["dims"] if call["dims"] is not None else call["permutation"]
    return label.at([d % ndim for d in order].index(label.dim))


@axis_rule("aten.transpose", "aten.t", "aten.swapaxes")
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


@axis_rule("aten.expand", "aten.broadcast_to", "prims.broadcast_in_dim")
def expand(call: Call) -> Label:
    """Repeat along new or single dimensions; the example axis only moves."""
    source = call.operands[0]
    label = call.label(source)
    if isinstance(label, Examples):
        if call["broadcast_dimensions"] is not None:
            return label.at(call["broadcast_dimensions"][label.dim])
        return label.at(label.dim + len(call.out_shape) - len(call.shape(source)))
    return label


@axis_rule("aten.repeat")
def repeat(call: Call) -> Label:
    """Tile: along the example axis this repeats the whole batch."""
    source, times = call["self"], [size(value_of(r)) for r in call["repeats"]]
    label = call.label(source)
    if not isinstance(label, Examples):
        return label
    dim = label.dim + len(times) - len(call.shape(source))
    return Examples(dim, product([times[dim], label.outer]), label.inner)


@axis_rule("aten.slice", "aten.narrow")
def slice_(call: Call) -> Label:
    """Cut out a range; along the example axis only whole batches may be cut out."""
    source = call["self"]
    label = call.label(source)
    if not isinstance(label, Examples):
        return label
    old, new = call.shape(source), call.out_shape
    dim = call.dim(call["dim"] or 0, len(old))
    if dim != label.dim or same(old[dim], new[dim]):
        return label
    period = product([call.batch, label.inner])
    start, outer = call["start"] or 0, divide(new[dim], period)
    start = _from_front(value_of(start), old[dim])
    if outer is None or divide(start, period) is None or not same(value_of(call["step"] or 1), 1):
        return call.mixes("it picks out some of the examples")
    return Examples(label.dim, outer, label.inner)


@axis_rule("aten.select")
def select(call: Call) -> Label:
    """Take one position; along the example axis that is one example, for everyone."""
    source = call["self"]
    label = call.label(source)
    if not isinstance(label, Examples):
        return label
    dim = call.dim(call["dim"], len(call.shape(source)))
    if dim == label.dim:
        return call.mixes("it picks out one of the examples")
    return label.at(label.dim - (dim < label.dim))


@axis_rule("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.unsafe_split")
def split(call: Call) -> Labels:
    """Cut into pieces; along the example axis every piece must be whole batches."""
    source = call["self"]
    label, old = call.label(source), call.shape(source)
    pieces = [shape_of(v) for v in call.node.meta["val"]]
    if not isinstance(label, Examples):
        return tuple(label for _ in pieces)
    dim = call.dim(call["dim"] or 0, len(old))
    if dim != label.dim:
        shift = len(old) - len(pieces[0])  # unbind drops the dimension
        return tuple(label.at(label.dim - (shift if dim < label.dim else 0)) for _ in pieces)
    period = product([call.batch, label.inner])
    outers = [divide(p[dim], period) if len(p) == len(old) else None for p in pieces]
    if any(o is None for o in outers):
        return tuple(call.mixes("it cuts the batch between examples") for _ in pieces)
    return tuple(Examples(dim, o, label.inner) for o in outers if o is not None)


@axis_rule("aten.cat", "aten.stack")
def cat(call: Call) -> Label:
    """Join: along the example axis every piece must be whole batches in one layout."""
    parts: Sequence[fx.Node] = call["tensors"]
    labels = [call.label(p) for p in parts]
    if call.summed():
        if all(isinstance(x, Summed) or (isinstance(x, Shared) and x.zero) for x in labels):
            return Summed()
        return call.mixes("it joins a sum over all examples with other values")
    ndim = len(call.out_shape)
    dim = call.dim(call["dim"] or 0, ndim)
    if call.name == "stack":
        shifted = [x.at(x.dim + (dim <= x.dim)) if isinstance(x, Examples) else x for x in labels]
    else:
        shifted = labels
        if any(isinstance(x, Examples) and x.dim == dim for x in labels):
            return _join(call, dim, list(parts))
    axes = [x for x in shifted if isinstance(x, Examples)]
    if any(x.dim != axes[0].dim or not x.same_layout(axes[0]) for x in axes):
        return call.mixes("the pieces it joins carry their examples in different places")
    if call.name == "stack":  # along a dimension of its own
        refusal = call.any_by_row(parts, axes[0].at(axes[0].dim - (dim < axes[0].dim)), ndim - 1)
    else:
        refusal = call.any_by_row(parts, axes[0], ndim)
    return refusal or axes[0]


def _join(call: Call, dim: int, parts: list[fx.Node]) -> Label:
    outer: Size = 0
    inner: Size | None = None
    for part in parts:
        label = call.label(part)
        if not isinstance(label, Examples) or label.dim != dim or not same(inner or label.inner, label.inner):
            return call.mixes("it joins the batch with something that is not a batch of the same layout")
        inner, outer = label.inner, outer + label.outer  # type: ignore[operator]
    assert inner is not None
    return Examples(dim, outer, inner)


@axis_rule("aten.diagonal_scatter")
def scatter_diagonal(call: Call) -> Label:
    """Write the diagonal of two dimensions of a copy; the examples must lie along another one."""
    base, source = call["self"], call["src"]
    if call.summed():
        return linear_write(call, base, source)
    label, written, ndim = call.label(base), call.label(source), len(call.out_shape)
    others = [d for d in range(ndim) if d not in (call.dim(call["dim1"], ndim), call.dim(call["dim2"], ndim))]
    if isinstance(written, Examples):
        if written.dim >= len(others):
            return call.mixes("it writes the examples along a diagonal")
        written = written.at(others[written.dim])
    found = [x for x in (label, written) if isinstance(x, Examples)]
    if any(x.dim not in others or x.dim != found[0].dim or not x.same_layout(found[0]) for x in found):
        return call.mixes("the diagonal carries its examples elsewhere than the value it is written into")
    return call.by_row(base, found[0]) or call.by_row(source, found[0].at(others.index(found[0].dim))) or found[0]


@axis_rule("aten.slice_scatter", "aten.select_scatter")
def scatter_slice(call: Call) -> Label:
    """Write a slice into a copy; the slice may not run across the example axis."""
    base, source = call["self"], call["src"]
    if call.summed():
        return linear_write(call, base, source)
    old, part = call.shape(base), call.shape(source)
    dim = call.dim(call["dim"], len(old))
    selects = len(part) < len(old)
    label = call.label(source)
    if isinstance(label, Examples) and selects:
        label = label.at(label.dim + (dim <= label.dim))
    found = [x for x in (call.label(base), label) if isinstance(x, Examples)]
    if any(x.dim != found[0].dim or not x.same_layout(found[0]) for x in found):
        return call.mixes("the slice carries its examples elsewhere than the value it is written into")
    if found[0].dim == dim and (selects or not same_shape(old, part)):
        return _write_batches(call, found[0])
    within = found[0].at(found[0].dim - (selects and dim < found[0].dim))
    return call.by_row(base, found[0]) or call.by_row(source, within) or found[0]


def _write_batches(call: Call, label: Examples) -> Label:
    """A slice of whole batches inside a longer dimension keeps the layout of that dimension."""
    base, source = call["self"], call["src"]
    if call["index"] is not None:
        return call.mixes("it writes to some of the examples")
    dim, period = label.dim, product([call.batch, label.inner])
    start = _from_front(value_of(call["start"] or 0), call.shape(base)[dim])
    outer = divide(call.shape(base)[dim], period)
    written = divide(call.shape(source)[dim], period)
    aligned = divide(start, period) is not None
    if outer is None or written is None or not aligned or not same(value_of(call["step"] or 1), 1):
        return call.mixes("it writes to some of the examples")
    axis = Examples(dim, outer, label.inner)
    return call.by_row(base, axis) or call.by_row(source, Examples(dim, written, label.inner)) or axis


def linear_write(call: Call, base: object, source: object) -> Label:
    """Write into a copy, where one or both are sums over the examples: both must be, or zero."""
    if all(isinstance(x, Summed) or (isinstance(x, Shared) and x.zero) for x in map(call.label, (base, source))):
        return Summed()
    return call.mixes("it writes a sum over the examples into other values")


@axis_rule("aten.diagonal", "aten.diag_embed", "aten.unfold", "aten.movedim")
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


@axis_rule(
    "aten.constant_pad_nd", "aten.pad", "aten.reflection_pad1d", "aten.reflection_pad2d", "aten.replication_pad1d",
    "aten.replication_pad2d", "aten.reflection_pad3d", "aten.replication_pad3d",
)  # fmt: skip
def pad(call: Call) -> Label:
    """Pad the last dimensions; the example axis must not be among them."""
    source = call["self"]
    label = call.label(source)
    if isinstance(label, Summed):
        constant = call["value"] if call["value"] is not None else 0
        return label if constant == 0 else call.mixes("it pads a sum over the examples with a constant")
    assert isinstance(label, Examples)
    if is_padded(call, label.dim):
        return call.mixes("it pads or cuts the example axis")
    return label


def is_padded(call: Call, dim: int) -> bool:
    """Whether a padding adds to, or cuts, a dimension."""
    amounts = call["pad"] if call["pad"] is not None else call["padding"]
    from_last = len(call.out_shape) - 1 - dim
    return any(value_of(a) != 0 for a in amounts[2 * from_last : 2 * from_last + 2])


def value_of(number: object) -> Size:
    """A size that may stand in the graph as a node."""
    if isinstance(number, fx.Node):
        number = number.meta["val"]
    return size(number)  # type: ignore[arg-type]


def _from_front(start: Size, length: Size) -> Size:
    return length + start if isinstance(start, int) and start < 0 else start  # type: ignore[operator]


def _show(shape: Sequence[Size]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
