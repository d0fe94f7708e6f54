"""Views that address memory by strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from dpcompile.graph.labels import Examples, Label, Summed, reshape_axis
from dpcompile.graph.sizes import Size, is_one, product, same, size, value_of
from dpcompile.proof.rules.growth import Linear, Sum
from dpcompile.proof.rules.registry import Call, axis_rule
from dpcompile.proof.rules.slices import linear_write
from dpcompile.proof.rules.stripes import Behind, Stripes, row_wise


@axis_rule("aten.as_strided", "aten.as_strided_copy", growth=Linear())
def as_strided(call: Call) -> Label:
    """Addresses into memory: followed where both sides fill the same memory without gaps or overlaps."""
    source = call["self"]
    label, old, new = call.label(source), call.shape(source), call.out_shape
    strides = [size(s) for s in source.meta["val"].stride()]
    wanted = [value_of(s) for s in call["stride"]]
    if isinstance(label, Examples) and same(value_of(call["storage_offset"] or 0), 0):
        moved = through_memory(label, (old, strides), (new, wanted), call.batch)
        if moved is not None:
            return moved
    return label if isinstance(label, Summed) else call.unsupported(_ADDRESSES)


@row_wise(as_strided)
def _slices_of_as_strided(call: Call, stripes: Stripes, result: int) -> Behind:
    source, wanted = call["self"], [value_of(s) for s in call["stride"]]
    if same(wanted[stripes.dim], 0) and is_one(stripes.axis.outer) and is_one(stripes.axis.inner):
        return []
    below = [size(s) for s in source.meta["val"].stride()]
    if not same(value_of(call["storage_offset"] or 0), 0):
        return None
    moved = through_memory(stripes.axis, (call.out_shape, wanted), (call.shape(source), below), stripes.count)
    return None if moved is None else [(source, Stripes(moved, stripes.count))]


@axis_rule("aten.as_strided_scatter", growth=Sum(("self", "src")))
def as_strided_scatter(call: Call) -> Label:
    """Write at addresses in memory: followed where all of the memory is written, without gaps or overlaps."""
    base, source = call["self"], call["src"]
    label, old, new = call.label(source), call.shape(source), call.shape(base)
    written = [value_of(s) for s in call["stride"]]
    below = [size(s) for s in base.meta["val"].stride()]
    if isinstance(label, Examples) and same(value_of(call["storage_offset"] or 0), 0):
        moved = through_memory(label, (old, written), (new, below), call.batch)
        if moved is not None:
            return moved
    if call.summed():
        return linear_write(call, base, source)
    return call.unsupported(_ADDRESSES)


_ADDRESSES = "it addresses memory directly; use view, slice, permute or Tensor.unfold"
Strided: TypeAlias = "tuple[Sequence[Size], Sequence[Size]]"


def through_memory(axis: Examples, old: Strided, new: Strided, batch: Size) -> Examples | None:
    """The example axis through memory that both sides lay out densely, each in an order of dimensions of its own."""
    order_old, order_new = _memory_order(*old), _memory_order(*new)
    if order_old is None or order_new is None or not same(product(old[0]), product(new[0])):
        return None
    shape_old, shape_new = [old[0][d] for d in order_old], [new[0][d] for d in order_new]
    moved = reshape_axis(axis.at(order_old.index(axis.dim)), shape_old, shape_new, batch)
    return None if moved is None else moved.at(order_new[moved.dim])


def _memory_order(shape: Sequence[Size], strides: Sequence[Size]) -> list[int] | None:
    """Dimensions from the slowest to the fastest, those of size 1 first; None if the memory has gaps or overlaps."""
    left = [d for d in range(len(shape)) if not same(shape[d], 1)]
    single = [d for d in range(len(shape)) if same(shape[d], 1)]
    order: list[int] = []
    step: Size = 1
    while left:
        fastest = next((d for d in left if same(strides[d], step)), None)
        if fastest is None:
            return None
        left.remove(fastest)
        order.insert(0, fastest)
        step = product([step, shape[fastest]])
    return single + order
