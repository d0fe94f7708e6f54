"""What is worth knowing of values that depend on no example: zeros, positions, cotangents of sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpcompile.graph.labels import Examples, Label, Shared, reshape_axis
from dpcompile.graph.operations import FILLED, KEEPS_VALUES, RESHAPES, ZEROS
from dpcompile.graph.sizes import Size, same, same_shape
from dpcompile.proof.rules.growth import Linear, Product, ProductAndSum, Quotient, Sum
from dpcompile.proof.rules.registry import Call

__all__ = ["shared"]

# How many positions, counted from 0, a dtype tells apart.
_POSITIONS = {
    torch.int64: 2**63, torch.int32: 2**31, torch.int16: 2**15, torch.int8: 2**7, torch.uint8: 2**8,
    torch.float64: 2**53, torch.float32: 2**24, torch.float16: 2**11, torch.bfloat16: 2**8,
}  # fmt: skip
_FOR_ANY_BATCH = {torch.int64, torch.int32, torch.float64}
_KEEPS_COTANGENT = KEEPS_VALUES | {"mul", "div", "neg"}


def shared(call: Call) -> Label:
    """The label of an operation on shared values only; most often just ``Shared()``."""
    name = call.name
    labels = [x for n in call.operands if isinstance(x := call.label(n), Shared)]
    cotangent = name in _KEEPS_COTANGENT and any(x.cotangent for x in labels)
    if cotangent and name == "expand":
        handed_out = _hand_out(call)
        if handed_out is not None:
            return handed_out
    return Shared(zero=_zero(call, name, labels), counts=_counts(call, name), cotangent=cotangent)


def _zero(call: Call, name: str, labels: list[Shared]) -> bool:
    if name in ZEROS:
        return True
    if name in FILLED:
        value = call[FILLED[name]]
        return isinstance(value, (int, float)) and value == 0
    if name in KEEPS_VALUES:
        return bool(labels) and labels[0].zero
    match call.growth:
        case Linear(operand, first_result):
            linear = call.node.args[0] if operand is None else call[operand]
            return not first_result and _all_zero(call, [linear])
        case Quotient(numerator):
            return _all_zero(call, [call[numerator]])
        case Product(factors):
            return any(_all_zero(call, [call[k]]) for k in factors)
        case ProductAndSum(factors, added):
            product = any(_all_zero(call, [call[k]]) for k in factors)
            return product and (call[added] is None or _all_zero(call, [call[added]]))
        case Sum() as total:
            return _all_zero(call, total.among(call.arguments))
    return False


def _all_zero(call: Call, operands: Sequence[object]) -> bool:
    labels = [call.label(x) for x in operands]
    return bool(labels) and all(isinstance(x, Shared) and x.zero for x in labels)


def _counts(call: Call, name: str) -> int | None:
    """The dimension along which the value is its own position, all positions told apart by every dtype on the way."""
    dim = _counted_dim(call, name)
    return dim if dim is not None and _tells_apart(call.node.meta["val"].dtype, call.out_shape[dim]) else None


def _tells_apart(dtype: torch.dtype, count: Size) -> bool:
    if not isinstance(count, int):
        return dtype in _FOR_ANY_BATCH
    return count <= _POSITIONS.get(dtype, 0)


def _counted_dim(call: Call, name: str) -> int | None:
    if name in ("iota", "arange"):
        plain = call["start"] in (None, 0) and call["step"] in (None, 1)
        return 0 if plain else None
    if name not in KEEPS_VALUES or not call.operands or name in ("slice", "select") or _reinterprets(call, name):
        return None
    source = call.operands[0]
    label = call.label(source)
    if not isinstance(label, Shared) or label.counts is None:
        return None
    old, new, dim = call.shape(source), call.out_shape, label.counts
    if name == "expand":
        moved = dim + len(new) - len(old)
        return moved if same(new[moved], old[dim]) else None
    if name == "permute":
        return [d % len(new) for d in call["dims"]].index(dim)
    if name in ("transpose", "t"):
        return None
    axis = reshape_axis(Examples(dim), old, new, old[dim])
    return axis.dim if axis is not None and same(new[axis.dim], old[dim]) else None


def _reinterprets(call: Call, name: str) -> bool:
    """Whether a view reads the bytes of its operand as another dtype."""
    return name in RESHAPES and call["self"].meta["val"].dtype != call.node.meta["val"].dtype


def _hand_out(call: Call) -> Examples | None:
    """The adjoint of a sum over examples gives each example its own cotangent.

    The forward sum and its adjoint carry the same sequence number; the sum's operand says where the examples lay.
    """
    found = call.forward_sums.get(call.node.meta.get("seq_nr", -1))
    if found is None or not same_shape(found[1], call.out_shape):
        return None
    return found[0]
