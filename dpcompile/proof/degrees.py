"""By which power of the cotangents each value of a graph grows.

Multiplied by s > 0, the cotangents multiply a value by ``s ** degree``. What is known of operations stands in the table
at the end; all of torch's own backwards are linear in the gradients that they are given.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import fx

from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Shared
from dpcompile.graph.operations import IN_THE_SAME_MEMORY, KEEPS_VALUES, operation_name, takes_only_shapes
from dpcompile.proof.prove import Proof
from dpcompile.proof.rules import named_arguments

__all__ = ["degrees_of", "is_zero"]


def degrees_of(joint: JointGraph, proof: Proof) -> dict[fx.Node, Any]:
    """The degree of every node; a node instead of a number: the operation that has none, on which the value depends.

    Several results of an operation have a tuple of degrees.
    """
    degrees: dict[fx.Node, Any] = {}
    for node in joint.graph.nodes:
        degrees[node] = 1.0 if node in joint.tangent_of else 0.0
        if node.op == "call_function":
            degrees[node] = _degree(node, degrees, proof)
    return degrees


def _degree(node: fx.Node, degrees: Mapping[fx.Node, Any], proof: Proof) -> Any:
    if node.target is operator.getitem:
        found = degrees[node.args[0]]  # type: ignore[index]
        return found[node.args[1]] if isinstance(found, tuple) else found  # type: ignore[index]
    known = [degrees[n] for n in node.all_input_nodes]
    unknown = next((d for d in known if isinstance(d, fx.Node)), None)
    if unknown is not None:
        return unknown
    tensors = isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))
    if not any(known) or takes_only_shapes(node.target) or not tensors:
        return 0.0
    degree = _Degrees(node, degrees, proof).of_result()
    return node if degree is None else degree


def is_zero(proof: Proof, node: fx.Node) -> bool:
    """Whether a value is known to be zeros, which have any degree."""
    label = proof.of(node)
    return isinstance(label, Shared) and label.zero


class _Degrees:
    """The degree of one operation's result, from those of its operands."""

    def __init__(self, node: fx.Node, degrees: Mapping[fx.Node, Any], proof: Proof) -> None:
        self.node, self.arguments, self._degrees, self._proof = node, named_arguments(node), degrees, proof
        self.name = operation_name(node.target)

    def of(self, operand: Any) -> float:
        """Of an operand; what is no value of the graph has degree 0."""
        found = self._degrees[operand] if isinstance(operand, fx.Node) else 0.0
        return found[0] if isinstance(found, tuple) else found

    def only(self, *names: str) -> bool:
        """Whether no other operands have a degree."""
        counted = [n for k in names for n in _nodes(self.arguments.get(k))]
        return all(not self.of(n) for n in self.node.all_input_nodes if n not in counted)

    def of_result(self) -> Any:
        """None where it has none."""
        if "::" in self.name and not self.name.startswith(("python::", "_c10d_functional::")):
            return max((self.of(n) for n in self.node.all_input_nodes), default=0.0)  # linear: see register_axis_rule
        value = self.node.meta["val"]
        rounds = isinstance(value, torch.Tensor) and not (value.dtype.is_floating_point or value.dtype.is_complex)
        rule = _RULES.get(self.name)
        if rule is None and "backward" in self.name:
            rule = _backward
        if rule is None or (rounds and rule is not _sign):
            return None
        return rule(self)

    def common(self, operands: list[Any]) -> float | None:
        """The degree of operands that are added up, or among which one is chosen; zeros have any."""
        found = {self.of(x) for x in operands if not self._zero(x)}
        return found.pop() if len(found) == 1 else None

    def _zero(self, operand: Any) -> bool:
        return is_zero(self._proof, operand) if isinstance(operand, fx.Node) else operand is None or operand == 0


def _nodes(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _nodes(v)


Rule: TypeAlias = "Callable[[_Degrees], Any]"


def _keeps(operand: str) -> Rule:
    """A linear function of one operand, or one that takes positive factors out, with the others fixed."""
    return lambda d: d.of(d.arguments[operand]) if d.only(operand) else None


def _first(d: _Degrees) -> float | None:
    first = d.node.all_input_nodes[0]
    return d.of(first) if not any(d.of(n) for n in d.node.all_input_nodes[1:]) else None


def _view(d: _Degrees) -> float | None:
    """The same bits read as another dtype are other numbers; complex ones read as their two parts are the same."""
    now, before = d.node.meta["val"].dtype, d.node.all_input_nodes[0].meta["val"].dtype
    return _first(d) if now.to_real() == before.to_real() else None


def _padded(d: _Degrees) -> float | None:
    return None if d.arguments.get("value") else _first(d)


def _product(*names: str) -> Rule:
    return lambda d: sum(d.of(d.arguments.get(k)) for k in names) if d.only(*names) else None


def _quotient(d: _Degrees) -> float | None:
    if d.arguments.get("rounding_mode") is not None:
        return None
    return d.of(d.arguments["self"]) - d.of(d.arguments["other"])


def _sum_of(*names: str) -> Rule:
    def rule(d: _Degrees) -> float | None:
        values = [d.arguments.get(k) for k in names]
        parts = [x for v in values for x in (v if isinstance(v, (list, tuple)) else [v])]
        return d.common(parts) if d.only(*names) else None

    return rule


def _product_and_sum(first: str, second: str, added: str) -> Rule:
    def rule(d: _Degrees) -> float | None:
        product = d.of(d.arguments[first]) + d.of(d.arguments[second])
        added_degree = d.common([d.arguments[added]])
        return product if added_degree in (None, product) and d.only(first, second, added) else None

    return rule


def _fma(d: _Degrees) -> float | None:
    a, b, c = d.node.args
    product, added = d.of(a) + d.of(b), d.common([c])
    return product if added in (None, product) else None


def _sign(d: _Degrees) -> float | None:
    """Comparisons of values of one degree, and with zero: no positive factor changes them."""
    names = [k for k in ("self", "other") if k in d.arguments]
    return 0.0 if len(names) == 1 or d.common([d.arguments[k] for k in names]) is not None else None


def _clamped(d: _Degrees) -> float | None:
    return d.common([d.arguments.get(k) for k in ("self", "min", "max") if d.arguments.get(k) is not None])


def _power(exponent: float | None) -> Rule:
    def rule(d: _Degrees) -> float | None:
        power = d.arguments["exponent"] if exponent is None else exponent
        return d.of(d.arguments["self"]) * float(power) if isinstance(power, (int, float)) else None

    return rule


def _backward(d: _Degrees) -> float | None:
    """Torch's own backwards are linear in the gradients that they are given."""
    given = [k for k in d.arguments if k.startswith("grad") and isinstance(d.arguments[k], fx.Node)]
    return d.common([d.arguments[k] for k in given]) if d.only(*given) else None


def _convolution_backward(d: _Degrees) -> tuple[Any, ...] | None:
    cotangent, source, weight = (d.of(d.arguments[k]) for k in ("grad_output", "input", "weight"))
    return (cotangent + weight, cotangent + source, cotangent)


def _flex_attention_backward(d: _Degrees) -> float | None:
    given = [n for n in d.node.args[5:7] if isinstance(n, fx.Node)]
    return d.common(given) if all(not d.of(n) for n in d.node.all_input_nodes if n not in given) else None


def _where(d: _Degrees) -> float | None:
    return None if d.of(d.arguments["condition"]) else d.common([d.arguments["self"], d.arguments["other"]])


# Linear in their first operand, or such that positive factors come out of it, besides those that only move elements.
_OF_THE_FIRST = frozenset({
    "neg", "positive", "to", "contiguous", "_conj", "_conj_physical", "conj_physical", "real", "imag", "view_of",
    "tril", "triu", "_neg_view", "_reshape_alias", "flatten", "unflatten", "collapse_view", "split_dim", "swapaxes",
    "movedim", "broadcast_to", "broadcast_in_dim", "repeat", "narrow", "chunk", "unsafe_split", "diagonal",
    "diag_embed", "unfold", "as_strided", "as_strided_copy", "sum", "mean", "nansum", "cumsum", "flip", "roll",
    "rev", "rot90", "trace", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "_fft_c2c", "_fft_r2c", "_fft_c2r", "view_as_real", "view_as_complex",
    "view_as_real_copy", "view_as_complex_copy", "index", "_unsafe_index", "index_select", "gather",
    "take_along_dim", "embedding", "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
    "inductor_force_stride_order", "abs", "relu", "amax", "amin", "linalg_vector_norm",
    "_c10d_functional::wait_tensor", "_c10d_functional::all_reduce", "_c10d_functional::all_gather_into_tensor",
    "_c10d_functional::reduce_scatter_tensor"
})  # fmt: skip

_RULES: dict[str, Rule] = {
    **dict.fromkeys((KEEPS_VALUES | IN_THE_SAME_MEMORY) - {"getitem"}, _first),
    **dict.fromkeys(_OF_THE_FIRST, _first),
    "view": _view,
    **dict.fromkeys(("constant_pad_nd", "pad"), _padded),
    "copy": lambda d: d.of(d.arguments["src"]),
    "mul": _product("self", "other"),
    "mm": _product("self", "mat2"),
    "bmm": _product("self", "mat2"),
    "mv": _product("self", "vec"),
    "dot": _product("self", "tensor"),
    "vdot": _product("self", "other"),
    "complex": _sum_of("real", "imag"),
    "div": _quotient,
    "square": _power(2),
    "sqrt": _power(0.5),
    "rsqrt": _power(-0.5),
    "reciprocal": _power(-1),
    "pow": _power(None),
    "add": _sum_of("self", "other"),
    "sub": _sum_of("self", "other"),
    "rsub": _sum_of("self", "other"),
    "maximum": _sum_of("self", "other"),
    "minimum": _sum_of("self", "other"),
    "cat": _sum_of("tensors"),
    "stack": _sum_of("tensors"),
    "lerp": _sum_of("self", "end"),
    "where": _where,
    "masked_fill": _sum_of("self", "value"),
    "clamp": _clamped,
    "clamp_min": _clamped,
    "clamp_max": _clamped,
    "fma": _fma,
    "addmm": _product_and_sum("mat1", "mat2", "self"),
    "baddbmm": _product_and_sum("batch1", "batch2", "self"),
    "addmv": _product_and_sum("mat", "vec", "self"),
    "addcmul": _product_and_sum("tensor1", "tensor2", "self"),
    "convolution": _product_and_sum("input", "weight", "bias"),
    "convolution_backward": _convolution_backward,
    "flex_attention_backward": _flex_attention_backward,
    "python::flex_attention_backward": _flex_attention_backward,
    **dict.fromkeys(("index_put", "_unsafe_index_put", "index_put_", "_index_put_impl"), _sum_of("self", "values")),
    **dict.fromkeys(("index_add", "index_copy"), _sum_of("self", "source")),
    **dict.fromkeys(
        ("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter", "scatter_add"),
        _sum_of("self", "src"),
    ),
    "scatter": _sum_of("self", "src", "value"),
    "_unsafe_masked_index": _sum_of("self", "fill"),
    "_unsafe_masked_index_put_accumulate": _sum_of("self", "values"),
    **dict.fromkeys(("linalg_solve_triangular", "_linalg_solve_ex", "linalg_lu_solve"), _keeps("B")),
    "cholesky_solve": _keeps("self"),
    "matrix_exp_adjoint": _keeps("g"),
    **dict.fromkeys(
        ("sign", "sgn", "signbit", "gt", "lt", "ge", "le", "eq", "ne", "isnan", "isinf", "isfinite", "logical_not"),
        _sign,
    ),
}
