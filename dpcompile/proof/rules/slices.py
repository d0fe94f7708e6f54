"""Operations that move whole slices: cut, pick, join, write into, pad."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from dpcompile.graph.labels import Examples, Label, Shared, Summed
from dpcompile.graph.sizes import Size, divide, product, same, same_shape, shape_of, value_of
from dpcompile.proof.rules.growth import Degrees, Homogeneous, Linear, Sum, first
from dpcompile.proof.rules.registry import Call, Labels, axis_rule
from dpcompile.proof.rules.stripes import Behind, Stripes, row_wise, whole_dim


@axis_rule("aten.slice", "aten.narrow", growth=Linear())
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


@row_wise(slice_)
def _slices_of_slice(call: Call, stripes: Stripes, result: int) -> Behind:
    source = call["self"]
    cut = call.dim(call["dim"] or 0, len(call.out_shape)) == stripes.dim
    whole = not cut or same(call.shape(source)[stripes.dim], call.out_shape[stripes.dim])
    return [(source, stripes if whole else whole_dim(call, source, stripes.dim))]


@axis_rule("aten.select", growth=Linear())
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


@row_wise(select)
def _slices_of_select(call: Call, stripes: Stripes, result: int) -> Behind:
    dim = call.dim(call["dim"], len(call.shape(call["self"])))
    return [(call["self"], stripes.at(stripes.dim + (dim <= stripes.dim)))]


@axis_rule("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.unsafe_split", growth=Linear())
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


@row_wise(split)
def _slices_of_split(call: Call, stripes: Stripes, result: int) -> Behind:
    source = call["self"]
    piece = shape_of(call.node.meta["val"][result])
    dim = call.dim(call["dim"] or 0, len(call.shape(source)))
    if len(piece) < len(call.shape(source)):  # unbind drops the dimension
        return [(source, stripes.at(stripes.dim + (dim <= stripes.dim)))]
    whole = dim != stripes.dim or same(piece[dim], call.shape(source)[dim])
    return [(source, stripes if whole else whole_dim(call, source, dim))]


@axis_rule("aten.cat", "aten.stack", growth=Sum(("tensors",)))
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
    """Whole batches one behind the other; shared values that are the same for every example may be some of them."""
    other = "it joins the batch with something that is not a batch of the same layout"
    inner = next(x.inner for p in parts if isinstance(x := call.label(p), Examples))
    outer: Size = 0
    for part in parts:
        label, shape = call.label(part), call.shape(part)
        if len(shape) < len(call.out_shape):  # torch lets empty ones pass
            continue
        if isinstance(label, Shared):
            batches = divide(shape[dim], product([call.batch, inner]))
            if batches is None:
                return call.mixes(other)
            label = Examples(dim, batches, inner)
            if (refusal := call.by_row(part, label)) is not None:
                return refusal
        if not isinstance(label, Examples) or label.dim != dim or not same(inner, label.inner):
            return call.mixes(other)
        outer = outer + label.outer  # type: ignore[operator]
    return Examples(dim, outer, inner)


@row_wise(cat)
def _slices_of_cat(call: Call, stripes: Stripes, result: int) -> Behind:
    parts = call["tensors"]
    dim = call.dim(call["dim"] or 0, len(call.out_shape))
    if call.name == "stack":
        if dim == stripes.dim:
            return None
        return [(p, stripes.at(stripes.dim - (dim < stripes.dim))) for p in parts]
    parts = [p for p in parts if len(call.shape(p)) == len(call.out_shape)]  # torch lets empty ones pass
    if dim != stripes.dim:
        return [(p, stripes) for p in parts]
    outers = [divide(call.shape(p)[dim], stripes.period) for p in parts]
    if any(o is None for o in outers):
        return None
    layouts = [Examples(dim, o, stripes.axis.inner) for o in outers if o is not None]
    return [(p, Stripes(x, stripes.count)) for p, x in zip(parts, layouts, strict=True)]


@axis_rule("aten.diagonal_scatter", growth=Sum(("self", "src")))
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


@row_wise(scatter_diagonal)
def _slices_of_scatter_diagonal(call: Call, stripes: Stripes, result: int) -> Behind:
    ndim = len(call.out_shape)
    others = [d for d in range(ndim) if d not in (call.dim(call["dim1"], ndim), call.dim(call["dim2"], ndim))]
    if stripes.dim not in others:
        return None
    return [(call["self"], stripes), (call["src"], stripes.at(others.index(stripes.dim)))]


@axis_rule("aten.slice_scatter", "aten.select_scatter", growth=Sum(("self", "src")))
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


@row_wise(scatter_slice)
def _slices_of_scatter_slice(call: Call, stripes: Stripes, result: int) -> Behind:
    base, source = call["self"], call["src"]
    dim = call.dim(call["dim"] or 0, len(call.out_shape))
    if len(call.shape(source)) < len(call.out_shape):  # select_scatter
        if dim == stripes.dim:
            return None
        return [(base, stripes), (source, stripes.at(stripes.dim - (dim < stripes.dim)))]
    if same_shape(call.shape(base), call.shape(source)):
        return [(source, stripes)]
    return None if dim == stripes.dim else [(base, stripes), (source, stripes)]


def linear_write(call: Call, base: object, source: object) -> Label:
    """Write into a copy, where one or both are sums over the examples: both must be, or zero."""
    if all(isinstance(x, Summed) or (isinstance(x, Shared) and x.zero) for x in map(call.label, (base, source))):
        return Summed()
    return call.mixes("it writes a sum over the examples into other values")


def _growth_of_padded(d: Degrees) -> float | None:
    return None if d.arguments.get("value") else first(d)


@axis_rule("aten.constant_pad_nd", "aten.pad", growth=Homogeneous(_growth_of_padded))
@axis_rule(
    "aten.reflection_pad1d", "aten.reflection_pad2d", "aten.reflection_pad3d", "aten.replication_pad1d",
    "aten.replication_pad2d", "aten.replication_pad3d",
    growth=Linear(),
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


@row_wise(pad)
def _slices_of_pad(call: Call, stripes: Stripes, result: int) -> Behind:
    return None if is_padded(call, stripes.dim) else [(call["self"], stripes)]


def _from_front(start: Size, length: Size) -> Size:
    return length + start if isinstance(start, int) and start < 0 else start  # type: ignore[operator]
