"""Look-ups and accumulations by index."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dpcompile.graph.labels import Examples, Label, Mixed, Shared, Summed
from dpcompile.graph.sizes import is_one, same
from dpcompile.proof.rules.pointwise import common_axis
from dpcompile.proof.rules.registry import Call, Labels, axis_rule


@axis_rule("aten.embedding")
def embedding(call: Call) -> Label:
    """Rows of a table, one for each index."""
    table, indices = call.label(call["weight"]), call.label(call["indices"])
    if call["scale_grad_by_freq"]:
        return call.mixes(
            "scale_grad_by_freq divides the gradient of a row by how often the whole batch looks it up",
            "make the embedding with scale_grad_by_freq=False",
        )
    if isinstance(table, Summed):
        return Summed() if isinstance(indices, Shared) else call.mixes("it looks examples up in a sum over all of them")
    if isinstance(table, Examples):
        return _rows(call, table, indices)
    return indices


def _rows(call: Call, table: Examples, indices: Label) -> Label:
    if table.dim != 0 and isinstance(indices, Shared):
        return table.at(table.dim - 1 + len(call.shape(call["indices"])))
    return call.mixes("it looks up values of examples by an index across the examples")


@axis_rule("aten.embedding_renorm")
def embedding_renorm(call: Call) -> Label:
    """Rescale the rows of a table that are looked up."""
    return call.mixes(
        "max_norm rewrites the rows that the examples look up: the table itself would show them",
        "make the embedding with max_norm=None, and normalise what it returns",
    )


@axis_rule("aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(call: Call) -> Labels:
    """Bags of equal size are taken apart before; here the values of the offsets say whose rows are whose."""
    refusal = call.unsupported(
        "bags given by offsets have no example axis",
        "pass ids as [B, T], filled up with the bag's padding_idx (and per_sample_weights as [B, T])",
    )
    return tuple(refusal for _ in call.node.meta["val"])


@axis_rule("aten.index_select")
def index_select(call: Call) -> Label:
    """Positions along one dimension."""
    label, index = call.label(call["self"]), call.label(call["index"])
    dim = call.dim(call["dim"], len(call.out_shape))
    if isinstance(label, Summed):
        return label if isinstance(index, Shared) else call.mixes("it looks examples up in a sum over all of them")
    if isinstance(label, Shared):
        assert isinstance(index, Examples)
        return index.at(dim)
    if isinstance(label, Examples) and label.dim != dim and isinstance(index, Shared):
        return label
    return call.mixes("it selects by an index across the examples")


def geometry_of(call: Call) -> Geometry | None:
    """Of a look-up; None where boolean masks make it something else."""
    if any(i is not None and _is_mask(i) for i in call["indices"]):
        return None
    return Geometry(call, call["self"], call["indices"])


class Geometry:
    """Where the dimensions of ``base[indices]`` come from (NumPy's advanced indexing)."""

    def __init__(self, call: Call, base: Any, indices: list[fx.Node | None]) -> None:
        self.call, self.base = call, base
        ndim = len(call.shape(base))
        self.indices: list[fx.Node | None] = list(indices) + [None] * (ndim - len(indices))
        self.indexed = [d for d, i in enumerate(self.indices) if i is not None]
        self.index_ndim = max(len(call.shape(self.indices[d])) for d in self.indexed)
        adjacent = self.indexed == list(range(self.indexed[0], self.indexed[-1] + 1))
        self.start = self.indexed[0] if adjacent else 0

    @property
    def index_nodes(self) -> list[fx.Node]:
        """All indices, by dimension."""
        return [i for i in self.indices if i is not None]

    def dim_of_index(self, dim: int) -> int:
        """The dimension of the result that a dimension of the broadcast indices becomes."""
        return self.start + dim

    def dim_of_base(self, dim: int) -> int:
        """The dimension of the result that an unindexed dimension of the base becomes."""
        before = sum(1 for d in range(dim) if d not in self.indexed)
        return before if before < self.start else before + self.index_ndim

    def index_label(self) -> Label:
        """The example axis of the broadcast indices, on a dimension of the result."""
        label = common_axis(self.call, self.index_nodes, (1,) * self.index_ndim)
        return label.at(self.dim_of_index(label.dim)) if isinstance(label, Examples) else label

    def by_row(self, axis: Examples, own: int | None = None) -> Mixed | None:
        """The refusal where a shared index or base goes by the row number along an axis of the result.

        Args:
            axis: of the result.
            own: the dimension that is indexed by every example's own position, which may.
        """
        if self.start <= axis.dim < self.start + self.index_ndim:
            others = [i for d, i in enumerate(self.indices) if i is not None and d != own]
            return self.call.any_by_row(others, axis.at(axis.dim - self.start), self.index_ndim)
        kept = [d for d in range(len(self.indices)) if d not in self.indexed and self.dim_of_base(d) == axis.dim]
        return self.call.by_row(self.base, axis.at(kept[0])) if kept else None

    def own_position(self, dim: int) -> Examples | None:
        """If ``dim`` is indexed by every example's own position (an ``arange`` over the batch): its new axis."""
        index = self.indices[dim]
        label, shape = self.call.label(index), self.call.shape(index)
        if not isinstance(label, Shared) or label.counts is None:
            return None
        if not same(shape[label.counts], self.call.batch) or not same(self.call.shape(self.base)[dim], self.call.batch):
            return None
        return Examples(self.dim_of_index(label.counts + self.index_ndim - len(shape)))


def _look_up(call: Call) -> Label:
    """The label of values at indices."""
    if any(i is not None and _is_mask(i) for i in call["indices"]):
        return call.mixes("a boolean mask makes the number of results depend on the data")
    geometry = Geometry(call, call["self"], call["indices"])
    label, by = call.label(call["self"]), geometry.index_label()
    if isinstance(by, Mixed):
        return by
    if isinstance(label, Summed):
        return label if isinstance(by, Shared) else call.mixes("it looks examples up in a sum over all of them")
    if isinstance(label, Shared):
        return geometry.by_row(by) or by if isinstance(by, Examples) else by
    assert isinstance(label, Examples)
    if label.dim not in geometry.indexed:
        if isinstance(by, Examples):
            return call.mixes("it indexes every example by the indices of all the others")
        return label.at(geometry.dim_of_base(label.dim))
    return _own(call, geometry, label, by)


@axis_rule("aten.index", "aten._unsafe_index")
def index(call: Call) -> Label:
    """Advanced indexing: shared tables by examples' indices, examples by shared indices, examples by themselves."""
    return _look_up(call)


@axis_rule("aten._unsafe_masked_index")
def masked_index(call: Call) -> Label:
    """The same, with a number where a mask, broadcast to the result, says so."""
    found, mask = _look_up(call), call.label(call["mask"])
    geometry = Geometry(call, call["self"], call["indices"])
    if len(call.out_shape) != len(call.shape(call["self"])) - len(geometry.indexed) + geometry.index_ndim:
        return call.unsupported("its mask has more dimensions than what it looks up")
    if isinstance(found, Summed):
        linear = isinstance(mask, Shared) and call["fill"] == 0
        return found if linear else call.mixes("it is not linear in a sum over the examples")
    if isinstance(found, Mixed):
        return found
    if not isinstance(mask, Examples):
        if not isinstance(found, Examples):
            return call.mixes("its mask is a sum over the examples")
        return call.any_by_row([call["mask"]], found, len(call.out_shape)) or found
    mask = mask.at(mask.dim + len(call.out_shape) - len(call.shape(call["mask"])))
    if isinstance(found, Shared):
        return geometry.by_row(mask) or mask
    if isinstance(found, Examples) and (found.dim != mask.dim or not found.same_layout(mask)):
        return call.mixes("the mask enumerates the examples in a different order than the values")
    return mask


def _own(call: Call, geometry: Geometry, label: Examples, by: Label) -> Label:
    """The example axis is indexed: right only where every example picks itself."""
    own = geometry.own_position(label.dim)
    if own is None or not (is_one(label.outer) and is_one(label.inner)):
        return call.mixes("it picks examples by an index, so one example's values reach another")
    if isinstance(by, Examples) and (by.dim != own.dim or not by.same_layout(own)):
        return call.mixes("it picks examples by an index, so one example's values reach another")
    return geometry.by_row(own, label.dim) or own


@axis_rule("aten.index_put", "aten._unsafe_index_put", "aten.index_put_", "aten._index_put_impl")
def index_put(call: Call) -> Label:
    """Write or accumulate at indices: into a shared table this sums over the examples."""
    base, values = call["self"], call["values"]
    if any(i is not None and _is_mask(i) for i in call["indices"]):
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
        own = geometry.own_position(dim)
        if own is not None and own.dim == by.dim:
            return _written(call, geometry, own, dim) or Examples(dim)
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
            target = geometry.own_position(dim) if indexed else carrier.at(geometry.dim_of_base(dim))
            if target is not None and target.dim == carrier.dim and target.same_layout(carrier):
                differing = _written(call, geometry, carrier, dim if indexed else None)
                return differing or call.by_row(call["self"], carrier.at(dim)) or carrier.at(dim)
        if call["accumulate"] and isinstance(label, Shared) and label.zero:
            return _written(call, geometry, carrier) or Summed()
        return call.mixes("examples write into a value that all of them share")
    target = (
        geometry.own_position(axis.dim) if axis.dim in geometry.indexed else axis.at(geometry.dim_of_base(axis.dim))
    )
    if target is None:
        return call.mixes("it writes to examples picked by an index")
    for other in (by, value):
        if isinstance(other, Examples) and (other.dim != target.dim or not other.same_layout(target)):
            return call.mixes("one example writes into another's values")
    return _written(call, geometry, target, axis.dim if axis.dim in geometry.indexed else None) or axis


def _neutral(label: Label) -> bool:
    return isinstance(label, Summed) or (isinstance(label, Shared) and label.zero)


@axis_rule("aten.searchsorted", "aten.bucketize")
def search(call: Call) -> Label:
    """Positions in sorted values: those of a table that all share, or those of each row."""
    table = call["boundaries"] if call["boundaries"] is not None else call["sorted_sequence"]
    found, by = call.label(table), call.label(call["self"])
    if call.summed() or call["sorter"] is not None:
        return call.unsupported("it has no rule on sums over the examples, nor with a sorter")
    if len(call.shape(table)) == 1:
        return by if isinstance(found, Shared) else call.mixes("it searches all examples' values for one example's")
    axes = [x for x in (found, by) if isinstance(x, Examples)]
    if any(x.dim != axes[0].dim or not x.same_layout(axes[0]) for x in axes):
        return call.mixes("its operands carry their examples in different places")
    if axes[0].dim == len(call.shape(table)) - 1:
        return call.mixes("it searches among the examples")
    return call.by_row(table, axes[0]) or call.by_row(call["self"], axes[0]) or axes[0]


def _is_mask(index: fx.Node) -> bool:
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


@axis_rule("aten.gather", "aten.take_along_dim")
def gather(call: Call) -> Label:
    """Pick along one dimension, position by position in all the others."""
    label, by = call.label(call["self"]), call.label(call["index"])
    dim = call.dim(call["dim"], len(call.out_shape))
    if isinstance(label, Summed):
        return label if isinstance(by, Shared) else call.mixes("it looks examples up in a sum over all of them")
    if isinstance(label, Examples) and label.dim == dim:
        return call.mixes("it picks across the examples")
    if isinstance(by, Examples) and isinstance(label, Examples) and (by.dim != label.dim or not by.same_layout(label)):
        return call.mixes("its operands carry their examples in different places")
    axis = label if isinstance(label, Examples) else by
    assert isinstance(axis, Examples)
    return (call.by_row(call["self"], axis) if axis.dim != dim else None) or call.by_row(call["index"], axis) or axis


@axis_rule("aten.scatter", "aten.scatter_add", "aten.scatter_reduce")
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


@axis_rule("aten.index_add", "aten.index_copy")
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
