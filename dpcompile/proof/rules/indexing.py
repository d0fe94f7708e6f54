"""Look-ups by index."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dpcompile.graph.labels import Examples, Label, Mixed, Shared, Summed
from dpcompile.graph.sizes import product, same
from dpcompile.proof.rules.growth import Linear, Sum
from dpcompile.proof.rules.pointwise import common_axis
from dpcompile.proof.rules.registry import Call, Labels, axis_rule
from dpcompile.proof.rules.stripes import Behind, Stripes, broadcast, row_wise, whole_dim


@axis_rule("aten.embedding", growth=Linear())
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


@row_wise(embedding)
def _slices_of_embedding(call: Call, stripes: Stripes, result: int) -> Behind:
    inside = len(call.shape(call["indices"]))
    return [(call["indices"], stripes)] if stripes.dim < inside else [(call["weight"], stripes.at(1))]


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


@axis_rule("aten.index_select", growth=Linear())
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


@row_wise(index_select)
def _slices_of_index_select(call: Call, stripes: Stripes, result: int) -> Behind:
    if call.dim(call["dim"], len(call.out_shape)) == stripes.dim:
        return [(call["index"], stripes.at(0))]
    return [(call["self"], stripes)]


def geometry_of(call: Call) -> Geometry | None:
    """Of a look-up; None where boolean masks make it something else."""
    if any(i is not None and is_mask(i) for i in call["indices"]):
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

    def own_position(self, dim: int, axis: Examples) -> Examples | None:
        """If ``dim`` is indexed by its own positions (an ``arange`` over all of it), as ``axis`` lies: the new axis."""
        index = self.indices[dim]
        label, shape = self.call.label(index), self.call.shape(index)
        if not isinstance(label, Shared) or label.counts is None:
            return None
        whole = product([axis.outer, self.call.batch, axis.inner])
        if not same(shape[label.counts], whole) or not same(self.call.shape(self.base)[dim], whole):
            return None
        return axis.at(self.dim_of_index(label.counts + self.index_ndim - len(shape)))


def _look_up(call: Call) -> Label:
    """The label of values at indices."""
    if any(i is not None and is_mask(i) for i in call["indices"]):
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


@axis_rule("aten.index", "aten._unsafe_index", growth=Linear())
def index(call: Call) -> Label:
    """Advanced indexing: shared tables by examples' indices, examples by shared indices, examples by themselves."""
    return _look_up(call)


@row_wise(index)
def _slices_of_index(call: Call, stripes: Stripes, result: int) -> Behind:
    geometry = geometry_of(call)
    if geometry is None:
        return None
    within = stripes.dim - geometry.start
    if 0 <= within < geometry.index_ndim:
        found = []
        for dim, node in zip(geometry.indexed, geometry.index_nodes, strict=True):
            label, own = call.label(node), within - geometry.index_ndim + len(call.shape(node))
            if isinstance(label, Shared) and label.counts == own:  # every row looks up its own, which may be alike
                found.append((call["self"], whole_dim(call, call["self"], dim)))
            else:
                found += broadcast(call, [node], stripes.at(within), geometry.index_ndim)
        return found
    kept = [d for d in range(len(call.shape(call["self"]))) if d not in geometry.indexed]
    return [(call["self"], stripes.at(next(d for d in kept if geometry.dim_of_base(d) == stripes.dim)))]


@axis_rule("aten._unsafe_masked_index", growth=Sum(("self", "fill")))
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
    own = geometry.own_position(label.dim, label)
    if own is None:
        return call.mixes("it picks examples by an index, so one example's values reach another")
    if isinstance(by, Examples) and (by.dim != own.dim or not by.same_layout(own)):
        return call.mixes("it picks examples by an index, so one example's values reach another")
    return geometry.by_row(own, label.dim) or own


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


@row_wise(search)
def _slices_of_search(call: Call, stripes: Stripes, result: int) -> Behind:
    table = call["boundaries"] if call["boundaries"] is not None else call["sorted_sequence"]
    by_rows = [] if len(call.shape(table)) == 1 else [(table, stripes)]
    return None if by_rows and stripes.dim == len(call.out_shape) - 1 else [(call["self"], stripes), *by_rows]


def is_mask(index: fx.Node) -> bool:
    """Whether an index says of every position if it counts."""
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


@axis_rule("aten.gather", "aten.take_along_dim", growth=Linear())
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


@row_wise(gather)
def _slices_of_gather(call: Call, stripes: Stripes, result: int) -> Behind:
    source, positions = call["self"], call["index"]
    if call.dim(call["dim"], len(call.out_shape)) == stripes.dim:
        return [(positions, stripes)]
    whole = same(call.shape(source)[stripes.dim], call.out_shape[stripes.dim])
    return [(source, stripes if whole else whole_dim(call, source, stripes.dim)), (positions, stripes)]
