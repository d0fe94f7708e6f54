"""What the places of a shared result are made of, operation by operation: see :mod:`dpcompile.proof.rules.rows`."""

from __future__ import annotations

from typing import Any

from torch import fx

from dpcompile.graph.labels import Examples, Shared
from dpcompile.graph.sizes import divide, is_one, same, same_shape, shape_of, size
from dpcompile.proof.rules.attention import attention
from dpcompile.proof.rules.collectives import all_reduce, wait
from dpcompile.proof.rules.contractions import add_product, bmm, mm, mv
from dpcompile.proof.rules.indexing import embedding, gather, geometry_of, index, index_select, scatter, search
from dpcompile.proof.rules.layers import convolution, spatial, spatial_dims
from dpcompile.proof.rules.pointwise import copy, pointwise
from dpcompile.proof.rules.reductions import along_dim, reduced_dims, reduction, touched_dims
from dpcompile.proof.rules.registry import Call
from dpcompile.proof.rules.rows import Behind, Stripes, broadcast, row_wise
from dpcompile.proof.rules.strided import as_strided, through_memory
from dpcompile.proof.rules.views import (
    cat,
    expand,
    is_padded,
    pad,
    permute,
    repeat,
    reshape,
    scatter_diagonal,
    scatter_slice,
    select,
    slice_,
    split,
    structured_view,
    transpose,
    value_of,
)


@row_wise(pointwise)
def _pointwise(call: Call, stripes: Stripes, result: int) -> Behind:
    return broadcast(call, call.operands, stripes)


@row_wise("remainder")
def _remainder(call: Call, stripes: Stripes, result: int) -> Behind:
    """``arange(B * T) % T`` is the position within an example."""
    source, divisor = call["self"], call["other"]
    counts = getattr(call.label(source), "counts", None) if isinstance(source, fx.Node) else None
    if counts is not None and not call.shape(divisor) and call.shape(source) == call.out_shape:
        if counts != stripes.dim or divide(stripes.axis.inner, value_of(divisor)) is not None:
            return []
    return broadcast(call, call.operands, stripes)


@row_wise("tril", "triu")
def _triangle(call: Call, stripes: Stripes, result: int) -> Behind:
    return None if stripes.dim >= len(call.out_shape) - 2 else [(call["self"], stripes)]


@row_wise(copy)
def _copy(call: Call, stripes: Stripes, result: int) -> Behind:
    return broadcast(call, [call["src"]], stripes)


@row_wise(wait, all_reduce, "inductor_force_stride_order")
def _same_places(call: Call, stripes: Stripes, result: int) -> Behind:
    return [(call.operands[0], stripes)]


# --- views ------------------------------------------------------------------------------------------------------------


@row_wise(reshape)
def _reshape(call: Call, stripes: Stripes, result: int) -> Behind:
    source = call.operands[0]
    if call["dtype"] is not None:
        last = stripes.dim == len(call.out_shape) - 1
        return None if last and not same_shape(call.shape(source), call.out_shape) else [(source, stripes)]
    moved = stripes.reshaped(call.out_shape, call.shape(source))
    return None if moved is None else [(source, moved)]


@row_wise(permute)
def _permute(call: Call, stripes: Stripes, result: int) -> Behind:
    order: Any = call["dims"] if call["dims"] is not None else call["permutation"]
    return [(call.operands[0], stripes.at(order[stripes.dim] % len(order)))]


@row_wise(transpose)
def _transpose(call: Call, stripes: Stripes, result: int) -> Behind:
    ndim = len(call.out_shape)
    if ndim < 2:
        return [(call["self"], stripes)]
    first = (call["dim0"] if call["dim0"] is not None else 0) % ndim
    second = (call["dim1"] if call["dim1"] is not None else 1) % ndim
    return [(call["self"], stripes.at({first: second, second: first}.get(stripes.dim, stripes.dim)))]


@row_wise(expand)
def _expand(call: Call, stripes: Stripes, result: int) -> Behind:
    source, placed = call.operands[0], call["broadcast_dimensions"]
    if placed is None:
        return broadcast(call, [source], stripes)
    if stripes.dim not in placed:
        return []
    dim = list(placed).index(stripes.dim)
    return [] if is_one(call.shape(source)[dim]) else [(source, stripes.at(dim))]


@row_wise(repeat)
def _repeat(call: Call, stripes: Stripes, result: int) -> Behind:
    source = call["self"]
    dim = stripes.dim - len(call.out_shape) + len(call.shape(source))
    length = call.shape(source)[dim] if dim >= 0 else 1
    if divide(stripes.axis.inner, length) is not None:  # within a place it is whole copies
        return []
    outer = divide(length, stripes.period)
    return None if outer is None else [(source, Stripes(Examples(dim, outer, stripes.axis.inner), stripes.count))]


def _whole_dim(call: Call, source: fx.Node, dim: int) -> Stripes:
    """The stronger question, whether all positions along a dimension are the same."""
    return Stripes(Examples(dim), call.shape(source)[dim])


@row_wise(slice_)
def _slice(call: Call, stripes: Stripes, result: int) -> Behind:
    source = call["self"]
    cut = call.dim(call["dim"] or 0, len(call.out_shape)) == stripes.dim
    whole = not cut or same(call.shape(source)[stripes.dim], call.out_shape[stripes.dim])
    return [(source, stripes if whole else _whole_dim(call, source, stripes.dim))]


@row_wise(select)
def _select(call: Call, stripes: Stripes, result: int) -> Behind:
    dim = call.dim(call["dim"], len(call.shape(call["self"])))
    return [(call["self"], stripes.at(stripes.dim + (dim <= stripes.dim)))]


@row_wise(split)
def _split(call: Call, stripes: Stripes, result: int) -> Behind:
    source = call["self"]
    piece = shape_of(call.node.meta["val"][result])
    dim = call.dim(call["dim"] or 0, len(call.shape(source)))
    if len(piece) < len(call.shape(source)):  # unbind drops the dimension
        return [(source, stripes.at(stripes.dim + (dim <= stripes.dim)))]
    whole = dim != stripes.dim or same(piece[dim], call.shape(source)[dim])
    return [(source, stripes if whole else _whole_dim(call, source, dim))]


@row_wise(cat)
def _cat(call: Call, stripes: Stripes, result: int) -> Behind:
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


@row_wise(scatter_slice)
def _scatter_slice(call: Call, stripes: Stripes, result: int) -> Behind:
    base, source = call["self"], call["src"]
    dim = call.dim(call["dim"] or 0, len(call.out_shape))
    if len(call.shape(source)) < len(call.out_shape):  # select_scatter
        if dim == stripes.dim:
            return None
        return [(base, stripes), (source, stripes.at(stripes.dim - (dim < stripes.dim)))]
    if same_shape(call.shape(base), call.shape(source)):
        return [(source, stripes)]
    return None if dim == stripes.dim else [(base, stripes), (source, stripes)]


@row_wise(scatter_diagonal)
def _scatter_diagonal(call: Call, stripes: Stripes, result: int) -> Behind:
    ndim = len(call.out_shape)
    others = [d for d in range(ndim) if d not in (call.dim(call["dim1"], ndim), call.dim(call["dim2"], ndim))]
    if stripes.dim not in others:
        return None
    return [(call["self"], stripes), (call["src"], stripes.at(others.index(stripes.dim)))]


@row_wise(structured_view)
def _structured_view(call: Call, stripes: Stripes, result: int) -> Behind:
    if call.name != "unfold":
        return None
    dim, last = call.dim(call["dimension"], len(call.shape(call["self"]))), len(call.out_shape) - 1
    return None if stripes.dim in (dim, last) else [(call["self"], stripes)]


@row_wise(pad)
def _pad(call: Call, stripes: Stripes, result: int) -> Behind:
    return None if is_padded(call, stripes.dim) else [(call["self"], stripes)]


@row_wise(as_strided)
def _as_strided(call: Call, stripes: Stripes, result: int) -> Behind:
    source, wanted = call["self"], [value_of(s) for s in call["stride"]]
    if same(wanted[stripes.dim], 0) and is_one(stripes.axis.outer) and is_one(stripes.axis.inner):
        return []
    below = [size(s) for s in source.meta["val"].stride()]
    if not same(value_of(call["storage_offset"] or 0), 0):
        return None
    moved = through_memory(stripes.axis, (call.out_shape, wanted), (call.shape(source), below), stripes.count)
    return None if moved is None else [(source, Stripes(moved, stripes.count))]


# --- reductions, products ---------------------------------------------------------------------------------------------


@row_wise(reduction)
def _reduction(call: Call, stripes: Stripes, result: int) -> Behind:
    source = call.operands[0]
    ndim = len(call.shape(source))
    if len(call.out_shape) == ndim:
        return [(source, stripes)]
    kept = [d for d in range(ndim) if d not in reduced_dims(call, ndim)]
    return [(source, stripes.at(kept[stripes.dim]))]


@row_wise(along_dim)
def _along_dim(call: Call, stripes: Stripes, result: int) -> Behind:
    if stripes.dim in touched_dims(call, len(call.out_shape)):
        return None
    return broadcast(call, call.operands, stripes)


@row_wise(mm, bmm, mv, add_product)
def _product(call: Call, stripes: Stripes, result: int) -> Behind:
    spec, operands = _PRODUCTS[call.name]
    inputs, _, output = spec.partition("->")
    letter = output[stripes.dim]
    places = [(call[k], i.find(letter)) for k, i in zip(operands, inputs.split(","), strict=True)]
    found = [(x, stripes.at(d)) for x, d in places if d >= 0]
    return found + (broadcast(call, [call["self"]], stripes) if "self" not in operands else [])


_PRODUCTS = {
    "mm": ("pn,nd->pd", ("self", "mat2")),
    "bmm": ("kpn,knd->kpd", ("self", "mat2")),
    "mv": ("pn,n->p", ("self", "vec")),
    "addmm": ("pn,nd->pd", ("mat1", "mat2")),
    "baddbmm": ("kpn,knd->kpd", ("batch1", "batch2")),
    "addmv": ("pn,n->p", ("mat", "vec")),
}


@row_wise(convolution)
def _convolution(call: Call, stripes: Stripes, result: int) -> Behind:
    return [(call["input"], stripes)] if stripes.dim == 0 else None


@row_wise(spatial)
def _spatial(call: Call, stripes: Stripes, result: int) -> Behind:
    if stripes.dim >= len(call.out_shape) - spatial_dims(call):
        return None
    return broadcast(call, call.operands, stripes)


@row_wise(attention)
def _attention(call: Call, stripes: Stripes, result: int) -> Behind:
    if stripes.dim != 0 or not is_one(stripes.axis.outer) or not is_one(stripes.axis.inner):
        return None
    return broadcast(call, [n for n in call.operands if len(call.shape(n)) == 4], stripes, 4)


# --- look-ups ---------------------------------------------------------------------------------------------------------


@row_wise(embedding)
def _embedding(call: Call, stripes: Stripes, result: int) -> Behind:
    inside = len(call.shape(call["indices"]))
    return [(call["indices"], stripes)] if stripes.dim < inside else [(call["weight"], stripes.at(1))]


@row_wise(index_select)
def _index_select(call: Call, stripes: Stripes, result: int) -> Behind:
    if call.dim(call["dim"], len(call.out_shape)) == stripes.dim:
        return [(call["index"], stripes.at(0))]
    return [(call["self"], stripes)]


@row_wise(index)
def _index(call: Call, stripes: Stripes, result: int) -> Behind:
    geometry = geometry_of(call)
    if geometry is None:
        return None
    within = stripes.dim - geometry.start
    if 0 <= within < geometry.index_ndim:
        found = []
        for dim, node in zip(geometry.indexed, geometry.index_nodes, strict=True):
            label, own = call.label(node), within - geometry.index_ndim + len(call.shape(node))
            if isinstance(label, Shared) and label.counts == own:  # every row looks up its own, which may be alike
                found.append((call["self"], _whole_dim(call, call["self"], dim)))
            else:
                found += broadcast(call, [node], stripes.at(within), geometry.index_ndim)
        return found
    kept = [d for d in range(len(call.shape(call["self"]))) if d not in geometry.indexed]
    return [(call["self"], stripes.at(next(d for d in kept if geometry.dim_of_base(d) == stripes.dim)))]


@row_wise(gather)
def _gather(call: Call, stripes: Stripes, result: int) -> Behind:
    source, positions = call["self"], call["index"]
    if call.dim(call["dim"], len(call.out_shape)) == stripes.dim:
        return [(positions, stripes)]
    whole = same(call.shape(source)[stripes.dim], call.out_shape[stripes.dim])
    return [(source, stripes if whole else _whole_dim(call, source, stripes.dim)), (positions, stripes)]


@row_wise(scatter)
def _scatter(call: Call, stripes: Stripes, result: int) -> Behind:
    if call.dim(call["dim"], len(call.out_shape)) == stripes.dim:
        return None
    parts = [call["self"], call["index"], call["src"] if call["src"] is not None else call["value"]]
    tensors = [p for p in parts if isinstance(p, fx.Node) and call.shape(p)]
    fits = all(same(call.shape(p)[stripes.dim], call.out_shape[stripes.dim]) for p in tensors)
    return [(p, stripes) for p in tensors] if fits else None


@row_wise(search)
def _search(call: Call, stripes: Stripes, result: int) -> Behind:
    table = call["boundaries"] if call["boundaries"] is not None else call["sorted_sequence"]
    by_rows = [] if len(call.shape(table)) == 1 else [(table, stripes)]
    return None if by_rows and stripes.dim == len(call.out_shape) - 1 else [(call["self"], stripes), *by_rows]
