"""Per-example gradients themselves: ``[B, *parameter shape]``, through any tail."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dpcompile.graph.labels import Examples
from dpcompile.graph.operations import operation_name
from dpcompile.graph.slices import in_front
from dpcompile.proof.sites import ParameterGradient, Site

__all__ = ["OVER_RANKS", "per_example_site", "run_operation", "run_tail", "tail_inputs", "through_tail"]

aten = torch.ops.aten
# Operations that add up over ranks, element by element: those of all examples at once are those of each.
OVER_RANKS = ("_c10d_functional::all_reduce", "_c10d_functional::wait_tensor")


def run_operation(node: fx.Node, values: Mapping[fx.Node, Any], dtype: torch.dtype) -> Any:
    """Run one node on other values than its own, in ``dtype`` or wider.

    Casts between floating dtypes are followed only upwards: the gradient is handed to the parameter's dtype once, at
    the end.
    """
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
    name = operation_name(node.target)
    schema = getattr(node.target, "_schema", None)
    if name in _UNDER_VMAP and schema is not None:
        named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        return _UNDER_VMAP[name](named, dtype)
    if name in _BY_ADDRESS and schema is not None:
        named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        return _BY_ADDRESS[name](named, node.args[0].meta["val"].stride())  # type: ignore[union-attr]
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _cast(named: dict[str, Any], dtype: torch.dtype) -> Tensor:
    value, wanted = named.get("a", named.get("self")), named.get("dtype")
    assert isinstance(value, Tensor)
    return value.to(dtype if wanted is None or wanted.is_floating_point else wanted)


def _slice_scatter(named: dict[str, Any], _: torch.dtype) -> Tensor:
    base, source, dim = named["self"], named["src"], named.get("dim", 0)
    length = base.shape[dim]
    if named.get("step", 1) != 1:
        raise NotImplementedError("writing every n-th slice of a parameter")
    start, end = (_inside(named.get(k), default, length) for k, default in (("start", 0), ("end", length)))
    dim %= base.ndim
    padded = F.pad(source, [*[0, 0] * (base.ndim - 1 - dim), start, length - end])
    positions = torch.arange(length, device=base.device).reshape(-1, *[1] * (base.ndim - 1 - dim))
    return torch.where((positions >= start) & (positions < end), padded, base)


def _inside(bound: int | None, default: int, length: int) -> int:
    bound = default if bound is None else bound
    return min(max(bound + length if bound < 0 else bound, 0), length)


def _select_scatter(named: dict[str, Any], dtype: torch.dtype) -> Tensor:
    dim = named["dim"] % named["self"].ndim
    index = named["index"] % named["self"].shape[dim]
    source = named["src"].unsqueeze(dim)
    return _slice_scatter({"self": named["self"], "src": source, "dim": dim, "start": index, "end": index + 1}, dtype)


def _cat(named: dict[str, Any], _: torch.dtype) -> Tensor:
    parts: Sequence[Tensor] = named["tensors"]
    dim = named.get("dim", 0) % parts[0].ndim
    total, behind = None, sum(p.shape[dim] for p in parts)
    before = 0
    for part in parts:
        behind -= part.shape[dim]
        padded = F.pad(part, [*[0, 0] * (part.ndim - 1 - dim), before, behind])
        total = padded if total is None else total + padded
        before += part.shape[dim]
    assert total is not None
    return total


def _view(named: dict[str, Any], _: torch.dtype) -> Tensor:
    value, wanted = named["self"], named.get("dtype")
    if wanted is None:
        return value.reshape(named["size"])  # one example's value may lie in memory otherwise than the sum does
    if wanted.is_complex and not value.is_complex():
        return torch.view_as_complex(value.contiguous().unflatten(-1, (-1, 2)))
    if value.is_complex() and wanted.is_floating_point:
        return torch.view_as_real(value).flatten(-2)
    raise NotImplementedError("a parameter reinterpreted in another dtype")


def _copy(named: dict[str, Any], _: torch.dtype) -> Tensor:
    return named["src"].expand(named["self"].shape).clone()


def _fma(named: dict[str, Any], _: torch.dtype) -> Tensor:
    a, b, c = named.values()
    return a * b + c


def _rev(named: dict[str, Any], _: torch.dtype) -> Tensor:
    return named["a"].flip(named["dims"])


# Operations that torch.vmap has no rule for, or one that is wrong, fixes the batch size or asks for a memory layout,
# and how to run them instead.
_UNDER_VMAP = {
    "convert_element_type": _cast,
    "_to_copy": _cast,
    "cat": _cat,
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
    "fma": _fma,
    "copy": _copy,
    "view": _view,
    "_unsafe_view": _view,
    "rev": _rev,
}


def _as_strided(named: dict[str, Any], strides: Sequence[int]) -> Tensor:
    memory, _ = _in_memory(named["self"], strides)
    return memory[_addresses(named, memory)]


def _as_strided_scatter(named: dict[str, Any], strides: Sequence[int]) -> Tensor:
    memory, order = _in_memory(named["self"], strides)
    written = memory.index_put((_addresses(named, memory),), named["src"])
    back = sorted(range(len(order)), key=order.__getitem__)
    return written.reshape([named["self"].shape[d] for d in order]).permute(back)


def _in_memory(value: Tensor, strides: Sequence[int]) -> tuple[Tensor, list[int]]:
    """The elements in the order in which a tensor of ``strides`` has them in memory, and that order of dimensions."""
    single = [d for d in range(value.ndim) if value.shape[d] == 1]
    order = single + sorted((d for d in range(value.ndim) if d not in single), key=lambda d: -strides[d])
    step = 1
    for d in reversed(order[len(single) :]):
        if strides[d] != step:
            raise NotImplementedError("addressing the memory of a value that has gaps in it")
        step *= value.shape[d]
    return value.permute(order).reshape(-1), order


def _addresses(named: dict[str, Any], memory: Tensor) -> Tensor:
    addresses = torch.arange(memory.shape[0], device=memory.device)
    return addresses.as_strided(named["size"], named["stride"], named.get("storage_offset") or 0)


# Operations on addresses in memory: where an example's own value lies differently, the addresses do not hold.
_BY_ADDRESS = {"as_strided": _as_strided, "as_strided_copy": _as_strided, "as_strided_scatter": _as_strided_scatter}


def per_example_site(site: Site, operands: Mapping[fx.Node, Any], batch: int, dtype: torch.dtype) -> Tensor:
    """The site's operation on every example by itself: ``[B, *value shape]``.

    Args:
        site: any site but a whole one.
        operands: the values of all operands of the operation, floating ones in ``dtype``.
        batch: B.
        dtype: the dtype to work in.
    """
    if site.known is not None and site.known.per_example is not None:
        return _by_function(site, site.known.per_example, operands, batch)
    axes: dict[fx.Node, Examples] = {site.operands[name]: axis for name, axis in site.axes.items()}
    nodes = list(axes)
    shared = {n: v for n, v in operands.items() if n not in axes}

    def one(*slices: Tensor) -> Tensor:
        values = {**shared, **dict(zip(nodes, slices, strict=True))}
        result = run_operation(site.operation, values, dtype)
        return result if site.value is site.operation else result[site.value.args[1]]  # type: ignore[index]

    fronts = [in_front(operands[n], axes[n], batch) for n in nodes]
    result = torch.vmap(one)(*fronts)
    if site.kind == "mean":  # the mean of one example divides by B times fewer elements
        result = result / batch
    return result


def _by_function(site: Site, function: Callable[..., Tensor], operands: Mapping[fx.Node, Any], batch: int) -> Tensor:
    """What the user registered: the operation's arguments, those with an example axis with the examples in front."""
    values = dict(operands)
    for name, axis in site.axes.items():
        values[site.operands[name]] = in_front(operands[site.operands[name]], axis, batch)
    args, kwargs = fx.map_arg((site.operation.args, dict(site.operation.kwargs)), lambda n: values[n])
    result = function(*args, **kwargs)
    wanted = (batch, *site.value.meta["val"].shape)
    if not isinstance(result, Tensor) or tuple(result.shape) != wanted:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise NotImplementedError(f"the function registered for `{site.kind}` gave {got}, not {wanted}")
    return result


def run_tail(
    gradient: ParameterGradient, sums: Mapping[fx.Node, Tensor], shared: Mapping[fx.Node, Any], dtype: Any
) -> Tensor:
    """The tail of a gradient on other values of its sites."""
    values: dict[fx.Node, Any] = {**shared, **sums}
    for node in gradient.tail:
        values[node] = run_operation(node, values, dtype)
    return values[gradient.gradient]


def tail_inputs(gradient: ParameterGradient) -> list[fx.Node]:
    """Values that the tail needs besides its sites: shared ones."""
    inside = {*gradient.tail, *(s.value for s in gradient.sites)}
    needed: dict[fx.Node, None] = {}
    for node in gradient.tail:
        needed.update(dict.fromkeys(n for n in node.all_input_nodes if n not in inside))
    return list(needed)


def through_tail(
    gradient: ParameterGradient, sites: Sequence[Tensor], shared: Mapping[fx.Node, Any], dtype: torch.dtype
) -> Tensor:
    """The tail on every example's site values: ``[B, *value shape]`` each to ``[B, *parameter shape]``."""
    if not gradient.tail:
        return sites[0]
    values = [s.value for s in gradient.sites]
    if any(operation_name(n.target) in OVER_RANKS for n in gradient.tail):
        return _step_by_step(gradient, dict(zip(values, sites, strict=True)), shared, dtype)

    def one(*slices: Tensor) -> Tensor:
        return run_tail(gradient, dict(zip(values, slices, strict=True)), shared, dtype)

    return torch.vmap(one)(*sites)


def _step_by_step(
    gradient: ParameterGradient, sites: dict[fx.Node, Any], shared: Mapping[fx.Node, Any], dtype: torch.dtype
) -> Tensor:
    """The same where ranks add up in between, which they do for all examples at once."""
    values: dict[fx.Node, Any] = dict(sites)
    for node in gradient.tail:
        own = [n for n in node.all_input_nodes if n in values]
        if node.target is operator.getitem or operation_name(node.target) in OVER_RANKS:
            values[node] = node.target(*fx.map_arg(node.args, lambda n: values[n]), **node.kwargs)  # type: ignore[operator]
            continue

        def one(*slices: Tensor, node: fx.Node = node, own: Sequence[fx.Node] = own) -> Any:
            return run_operation(node, {**shared, **dict(zip(own, slices, strict=True))}, dtype)

        values[node] = torch.vmap(one)(*(values[n] for n in own))
    return values[gradient.gradient]
