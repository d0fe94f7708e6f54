"""A prediction of the non-private step's time, from its joint graph and the machine's rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from dpcompile.graph.operations import operation_name
from dpcompile.graph.sizes import hinted
from dpcompile.kernels.narrow import NARROW
from dpcompile.kernels.rates import Rates
from dpcompile.planning.replay import bytes_of, is_fused

__all__ = ["plain_seconds"]


def plain_seconds(graph: fx.Graph, hints: Mapping[sympy.Symbol, int], rates: Rates) -> float:
    """Seconds of forward and backward: products by their operations, everything else by the bytes that it moves."""
    seconds = 0.0
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        flops = _flops(node, hints)
        if flops:
            seconds += flops / _rate(node, rates) + rates.call
        elif not is_fused(node) and bytes_of(node, hints):
            moved = bytes_of(node, hints) + sum(bytes_of(n, hints) for n in node.all_input_nodes if not is_fused(n))
            seconds += moved / rates.traffic + rates.call
    return seconds


def _rate(node: fx.Node, rates: Rates) -> float:
    if "convolution" in operation_name(node.target):
        return rates.convolution
    operands = [n.meta["val"].dtype for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    return rates.narrow if any(dtype in NARROW for dtype in operands) else rates.large


def _flops(node: fx.Node, hints: Mapping[sympy.Symbol, int]) -> float:
    if "scaled_dot_product" in operation_name(node.target):
        return _attention(node, hints)
    formula = flop_registry.get(node.target.overloadpacket)  # type: ignore[union-attr]
    if formula is None:
        return 0.0
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _sized(n.meta["val"], hints))
    return float(formula(*args, **kwargs, out_val=_sized(node.meta["val"], hints)))


def _attention(node: fx.Node, hints: Mapping[sympy.Symbol, int]) -> float:
    """Two products forward, five backward (scores again, and four gradients), each of ``2 B H T T' d`` operations."""
    backward = "backward" in operation_name(node.target)
    tensors = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    query, key = (_sized(t, hints) for t in tensors[1:3]) if backward else (_sized(t, hints) for t in tensors[:2])
    heads = query.shape[0] * query.shape[1]
    return (5 if backward else 2) * 2.0 * heads * query.shape[-2] * key.shape[-2] * query.shape[-1]


def _sized(value: Any, hints: Mapping[sympy.Symbol, int]) -> Any:
    """The value with numbers for its symbols, and without data."""
    if isinstance(value, Tensor):
        shape = [hinted(n, hints) for n in value.shape]
        return torch.empty(shape, dtype=value.dtype, device="meta")
    if isinstance(value, (tuple, list)):
        return type(value)(_sized(v, hints) for v in value)
    if isinstance(value, torch.SymInt):
        return hinted(value, hints)
    return value
