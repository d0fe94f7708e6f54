"""Writes and accumulations by index."""

from __future__ import annotations

from torch import fx

from dpcompile.graph.labels import Examples, Label, Mixed, Shared, Summed
from dpcompile.graph.sizes import is_one, same
from dpcompile.proof.rules.growth import Sum
from dpcompile.proof.rules.indexing import Geometry, is_mask
from dpcompile.proof.rules.registry import Call, axis_rule
from dpcompile.proof.rules.stripes import Behind, Stripes, row_wise
from dpcompile.proof.site_kinds import SiteKind


@axis_rule(
    "aten.index_put",
    "aten._unsafe_index_put",
    growth=Sum(("self", "values")),
    site=SiteKind(("values",), form="table"),
)
@axis_rule("aten.index_put_", "aten._index_put_impl", growth=Sum(("self", "values")))
def index_put(call: Call) -> Label:
    """Write or accumulate at indices: into a shared table this sums over the examples."""
    base, values = call["self"], call["values"]
    if any(i is not None and is_mask(i) for i in call["indices"]):
        return _write_by_mask(call)
    geometry = Geometry(call, base, call["indices"])
    label, by, value = call.label(base), geometry.index_label(), call.label(values)
    if isinstance(by, Mixed):
        return by
    if isinstance(value, Examples):
        ndim = geometry.index_ndim + len(call.shape(base)) - len(geometry.indexed)
        value = value.at(value.dim + ndim - len(call.shape(values)))
    zero = isinstance(label, Shared) and label.zero
    if isinstance(value, Summed) or isinstance(label, Summed):
        if isinstance(by, Shared) and all(_neutral(x) for x in (label, value)):
            return Summed()
        return call.mixes("it writes a sum over the examples at positions or into values that are not")
    if isinstance(by, Examples) and isinstance(value, Examples) and (by.dim != value.dim or not by.same_layout(value)):
        return call.mixes("the indices enumerate the examples in a different order than the values")
    if isinstance(label, Examples) or not zero or isinstance(by, Shared):
        return _write_to_examples(call, geometry, label, by, value)
    assert isinstance(by, Examples)
    for dim in geometry.indexed:
        own = geometry.own_position(dim, by)
        if own is not None and own.dim == by.dim:
            return _written(call, geometry, own, dim) or by.at(dim)
    if call["accumulate"]:
        return _written(call, geometry, by) or Summed()
    return call.mixes("examples overwrite each other's values in a shared table")


def _written(call: Call, geometry: Geometry, axis: Examples, own: int | None = None) -> Mixed | None:
    """The refusal where shared indices or values go by the row number along an axis of what is written."""
    ndim = geometry.index_ndim + len(call.shape(call["self"])) - len(geometry.indexed)
    return geometry.by_row(axis, own) or call.any_by_row([call["values"]], axis, ndim)


def _write_by_mask(call: Call) -> Label:
    """One value at all places of a mask over the leading dimensions: element by element, like ``torch.where``."""
    base, (mask, *others), values = call["self"], call["indices"], call["values"]
    if others or mask is None or not all(is_one(n) for n in call.shape(values)) or call["accumulate"]:
        return call.unsupported("it writes several values through a boolean mask; use torch.where")
    labels = [call.label(x) for x in (base, mask, values)]
    if call.summed():
        linear = isinstance(labels[1], Shared) and _neutral(labels[0]) and _neutral(labels[2])
        return Summed() if linear else call.mixes("it is not linear in a sum over the examples")
    if isinstance(labels[2], Examples):
        return call.mixes("it writes a value of one example to all the others")
    axes = [x for x in labels[:2] if isinstance(x, Examples)]  # the dimensions of the mask are the first of the base
    if any(x.dim != axes[0].dim or not x.same_layout(axes[0]) for x in axes):
        return call.mixes("the mask enumerates the examples in a different order than the values")
    return call.by_row(base, axes[0]) or call.by_row(mask, axes[0]) or axes[0]


def _write_to_examples(call: Call, geometry: Geometry, label: Label, by: Label, value: Label) -> Label:
    """The base has an example axis, or gets it from the values written at shared positions."""
    axis = label if isinstance(label, Examples) else None
    if axis is None:
        carrier = value if isinstance(value, Examples) else by
        assert isinstance(carrier, Examples)
        for dim in range(len(call.shape(call["self"]))):
            indexed = dim in geometry.indexed
            target = geometry.own_position(dim, carrier) if indexed else carrier.at(geometry.dim_of_base(dim))
            if target is not None and target.dim == carrier.dim and target.same_layout(carrier):
                differing = _written(call, geometry, carrier, dim if indexed else None)
                return differing or call.by_row(call["self"], carrier.at(dim)) or carrier.at(dim)
        if call["accumulate"] and isinstance(label, Shared) and label.zero:
            return _written(call, geometry, carrier) or Summed()
        return call.mixes("examples write into a value that all of them share")
    indexed = axis.dim in geometry.indexed
    target = geometry.own_position(axis.dim, axis) if indexed else axis.at(geometry.dim_of_base(axis.dim))
    if target is None:
        return call.mixes("it writes to examples picked by an index")
    for other in (by, value):
        if isinstance(other, Examples) and (other.dim != target.dim or not other.same_layout(target)):
            return call.mixes("one example writes into another's values")
    return _written(call, geometry, target, axis.dim if indexed else None) or axis


@axis_rule("aten.scatter", growth=Sum(("self", "src", "value")))
@axis_rule("aten.scatter_add", growth=Sum(("self", "src")), site=SiteKind(("src",)))
@axis_rule("aten.scatter_reduce")
def scatter(call: Call) -> Label:
    """Write along one dimension, position by position in all the others."""
    base, by = call["self"], call.label(call["index"])
    source = call["src"] if call["src"] is not None else call["value"]
    labels = [call.label(base), by, call.label(source)]
    dim = call.dim(call["dim"], len(call.out_shape))
    if call.summed():
        if isinstance(by, Shared) and _neutral(labels[0]) and _neutral(labels[2]):
            return Summed()
        return call.mixes("it scatters a sum over the examples at positions that depend on examples")
    axes = [x for x in labels if isinstance(x, Examples)]
    if any(x.dim != axes[0].dim or not x.same_layout(axes[0]) for x in axes):
        return call.mixes("its operands carry their examples in different places")
    differing = call.any_by_row([base, call["index"], source], axes[0], len(call.out_shape))
    if axes[0].dim != dim:
        return differing or axes[0]
    adds = call.name == "scatter_add"
    if differing is not None:
        return differing
    if adds and isinstance(labels[0], Shared) and labels[0].zero:
        return Summed()
    return call.mixes("it scatters across the examples")


@row_wise(scatter)
def _slices_of_scatter(call: Call, stripes: Stripes, result: int) -> Behind:
    if call.dim(call["dim"], len(call.out_shape)) == stripes.dim:
        return None
    parts = [call["self"], call["index"], call["src"] if call["src"] is not None else call["value"]]
    tensors = [p for p in parts if isinstance(p, fx.Node) and call.shape(p)]
    fits = all(same(call.shape(p)[stripes.dim], call.out_shape[stripes.dim]) for p in tensors)
    return [(p, stripes) for p in tensors] if fits else None


@axis_rule("aten.index_add", growth=Sum(("self", "source")), site=SiteKind(("source",)))
@axis_rule("aten.index_copy", growth=Sum(("self", "source")))
def index_add(call: Call) -> Label:
    """Accumulate slices along one dimension."""
    base, by, value = call.label(call["self"]), call.label(call["index"]), call.label(call["source"])
    dim = call.dim(call["dim"], len(call.out_shape))
    if call.summed():
        if isinstance(by, Shared) and _neutral(base) and _neutral(value):
            return Summed()
        return call.mixes("it writes a sum over the examples into other values")
    axes = [x for x in (base, value) if isinstance(x, Examples)]
    if isinstance(by, Shared) and axes and all(x.dim == axes[0].dim and x.same_layout(axes[0]) for x in axes):
        if axes[0].dim != dim:
            return call.by_row(call["self"], axes[0]) or call.by_row(call["source"], axes[0]) or axes[0]
    adds = call.name == "index_add"
    aligned = isinstance(value, Examples) and value.dim == dim
    same_order = not isinstance(by, Examples) or (isinstance(value, Examples) and by.same_layout(value))
    if adds and isinstance(base, Shared) and base.zero and aligned and same_order:
        assert isinstance(value, Examples)
        return call.by_row(call["index"], value.at(0)) or Summed()
    return call.mixes("it writes across the examples")


def _neutral(label: Label) -> bool:
    return isinstance(label, Summed) or (isinstance(label, Shared) and label.zero)
