"""Reductions, and operations that run along one dimension."""

from __future__ import annotations

from typing import Any

from dpcompile.graph.labels import Examples, Label, Summed
from dpcompile.graph.sizes import shape_of
from dpcompile.proof.rules.growth import Homogeneous, Linear, first
from dpcompile.proof.rules.registry import Call, Labels, axis_rule
from dpcompile.proof.rules.stripes import Behind, Stripes, broadcast, row_wise
from dpcompile.proof.site_kinds import SiteKind


@axis_rule("aten.sum", "aten.mean", "prims.sum", growth=Linear(), site=SiteKind(("self",)))
@axis_rule(
    "aten.amax", "aten.amin", "aten.linalg_vector_norm", "aten.nansum", "prims.amax", "prims.amin",
    growth=Homogeneous(first),
)  # fmt: skip
@axis_rule(
    "aten.var", "aten.var_mean", "aten.std", "aten.std_mean", "aten.logsumexp", "aten.prod", "aten.any", "aten.all",
    "aten.argmax", "aten.argmin", "aten.norm", "aten.max", "aten.min", "aten.median", "aten.nanmedian", "aten.mode",
    "aten.count_nonzero", "aten.aminmax", "aten.kthvalue", "aten.quantile", "prims.var", "prims.prod",
)  # fmt: skip
def reduction(call: Call) -> Labels:
    """Reduce dimensions away: a sum or mean over the example axis is a sum over examples, all else mixes them."""
    source = call.operands[0]
    label, shape = call.label(source), call.shape(source)
    name = call.name
    value = call.node.meta["val"]
    count = len(value) if isinstance(value, (tuple, list)) else 0
    if isinstance(label, Examples):
        label = _reduce(call, label, len(shape), name)
    elif not isinstance(call.growth, Linear):
        label = call.mixes("it is not linear in a sum over the examples")
    return tuple(label for _ in range(count)) if count else label


def _reduce(call: Call, label: Examples, ndim: int, name: str) -> Label:
    dims = reduced_dims(call, ndim)
    if label.dim in dims:
        if isinstance(call.growth, Linear):
            return Summed()
        return call.mixes(f"`{name}` runs over the examples")
    kept_dims = len(call.out_shape) == ndim
    return label if kept_dims else label.at(label.dim - sum(d < label.dim for d in dims))


def reduced_dims(call: Call, ndim: int) -> set[int]:
    """The dimensions that a reduction takes away."""
    dims: Any = next((call[k] for k in ("dim", "dims", "axis") if call[k] is not None), None)
    if dims is None or dims == []:
        return set(range(ndim))
    return {d % ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])}


@row_wise(reduction)
def _slices_of_reduction(call: Call, stripes: Stripes, result: int) -> Behind:
    source = call.operands[0]
    ndim = len(call.shape(source))
    if len(call.out_shape) == ndim:
        return [(source, stripes)]
    kept = [d for d in range(ndim) if d not in reduced_dims(call, ndim)]
    return [(source, stripes.at(kept[stripes.dim]))]


@axis_rule("aten.cumsum", "aten.flip", "aten.roll", "aten.rot90", "prims.cumsum", "prims.rev", growth=Linear())
@axis_rule(
    "aten._softmax", "aten._log_softmax", "aten._softmax_backward_data", "aten._log_softmax_backward_data",
    "aten.cumprod", "aten.cummax", "aten.cummin", "aten.logcumsumexp", "aten.sort", "aten.topk", "aten.argsort",
    "aten.glu", "aten.glu_backward", "aten.softmax", "aten.log_softmax", "aten._safe_softmax",
    "prims.prepare_softmax_online",
)  # fmt: skip
def along_dim(call: Call) -> Labels:
    """Work along one dimension (or a few), which must not be the example axis."""
    value = call.node.meta["val"]
    count = len(value) if isinstance(value, (tuple, list)) else 0
    label = _along(call)
    return tuple(label for _ in range(count)) if count else label


def _along(call: Call) -> Label:
    name = call.name
    axes = [(n, x) for n in call.operands if isinstance(x := call.label(n), Examples)]
    if call.summed():
        linear = isinstance(call.growth, Linear) and not axes
        return Summed() if linear else call.mixes("it is not linear in a sum over the examples")
    node, label = axes[0]
    if any(x.dim != label.dim or not x.same_layout(label) for _, x in axes):
        return call.mixes("its operands carry their examples in different places")
    ndim = len(shape_of(node.meta["val"]))
    touched = touched_dims(call, ndim)
    if label.dim in touched:
        return call.mixes(f"`{name}` runs along the examples", _SORTED if name == "sort" else None)
    if name == "prepare_softmax_online" and label.dim > min(touched):
        return call.unsupported("its result drops a dimension before the example axis")
    return call.any_by_row(call.operands, label, ndim) or label


_SORTED = (
    "rows may be sorted by a vector of numbers if each is handled by itself and comes back to its place: `rows = "
    "x[order]`, .., `x.index_add(0, order, rows)` or `rows[order.argsort()]`; where each kind of rows ends must be "
    "counted: torch.nn.functional.one_hot(numbers, E).sum(0).cumsum(0), or torch.histc; in Transformers: "
    "experts_implementation='grouped_mm' or 'batched_mm'"
)


def touched_dims(call: Call, ndim: int) -> set[int]:
    """The dimensions that an operation works along."""
    dims = call["dims"] if call["dims"] is not None else call["dim"]
    if call.name == "roll" and not call["dims"]:
        return set(range(ndim))
    if dims is None:
        dims = -1
    return {d % ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])}


@row_wise(along_dim)
def _slices_of_along_dim(call: Call, stripes: Stripes, result: int) -> Behind:
    if stripes.dim in touched_dims(call, len(call.out_shape)):
        return None
    return broadcast(call, call.operands, stripes)


@axis_rule("aten.multinomial")
def multinomial(call: Call) -> Label:
    """Draws from the distribution that each row holds."""
    label = call.label(call["self"])
    if not isinstance(label, Examples) or len(call.out_shape) != 2 or label.dim != 0:
        return call.mixes("it draws from a distribution over the examples")
    return label
