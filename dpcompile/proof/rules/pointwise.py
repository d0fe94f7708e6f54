"""Element by element operations, with broadcasting."""

from __future__ import annotations

import torch
from torch import fx

from dpcompile.graph.labels import Examples, Label, Shared, Summed
from dpcompile.graph.sizes import divide, value_of
from dpcompile.proof.rules.growth import (
    SIGN,
    Degrees,
    Homogeneous,
    Linear,
    Product,
    ProductAndSum,
    Quotient,
    Sum,
    add_growth,
    first,
    power,
)
from dpcompile.proof.rules.registry import Call, axis_rule
from dpcompile.proof.rules.stripes import Behind, Stripes, broadcast, row_wise

__all__ = ["combine", "common_axis", "pointwise"]


@axis_rule("aten.masked_fill", growth=Sum(("self", "value")))
@axis_rule("aten.where", growth=Sum(("self", "other")))
@axis_rule("aten.complex", growth=Sum(("real", "imag")))
@axis_rule("prims.fma", growth=ProductAndSum(("a", "b"), "c"))
@axis_rule(
    "aten.clone", "aten.alias", "aten.detach", "aten._to_copy", "aten.to", "aten.contiguous", "aten.lift_fresh_copy",
    "aten._conj", "aten._neg_view", "prims.convert_element_type", "prims.device_put", "prims.view_of",
    "prims.inductor_force_stride_order", growth=Linear(),
)  # fmt: skip
@axis_rule(
    "aten.native_dropout", "aten.native_dropout_backward", "aten.polar", "aten.bernoulli",
    "aten.rrelu_with_noise_functional", "aten.rrelu_with_noise_backward", "aten._prelu_kernel",
    "aten._prelu_kernel_backward", "aten.nan_to_num", "aten.floor_divide", "aten.uniform", "aten.normal",
    "aten.normal_functional", "aten.exponential", "aten.geometric", "aten.log_normal", "aten.cauchy", "aten.random",
    "aten.fake_quantize_per_tensor_affine_cachemask", "aten.fake_quantize_per_tensor_affine_cachemask_backward",
)  # fmt: skip
def pointwise(call: Call) -> Label:
    """Position by position: the result has the example axis of its operands, which must agree."""
    if call.summed():
        return _linear(call)
    return combine(call, call.operands, call.out_shape)


@row_wise(pointwise)
def _slices_of_pointwise(call: Call, stripes: Stripes, result: int) -> Behind:
    return broadcast(call, call.operands, stripes)


@row_wise("remainder")
def _slices_of_remainder(call: Call, stripes: Stripes, result: int) -> Behind:
    """``arange(B * T) % T`` is the position within an example."""
    source, divisor = call["self"], call["other"]
    counts = getattr(call.label(source), "counts", None) if isinstance(source, fx.Node) else None
    if counts is not None and not call.shape(divisor) and call.shape(source) == call.out_shape:
        if counts != stripes.dim or divide(stripes.axis.inner, value_of(divisor)) is not None:
            return []
    return broadcast(call, call.operands, stripes)


@axis_rule("aten.copy", growth=Homogeneous(lambda d: d.of(d.arguments["src"])))
def copy(call: Call) -> Label:
    """The values of the source, in the shape of a destination whose values do not matter."""
    source = call["src"]
    label = call.label(source)
    if isinstance(label, Examples):
        return label.at(label.dim + len(call.out_shape) - len(call.shape(source)))
    if isinstance(label, Summed):
        return call.mixes("it rounds a sum over the examples") if _rounds(call) else label
    return Shared(zero=isinstance(label, Shared) and label.zero)


@row_wise(copy)
def _slices_of_copy(call: Call, stripes: Stripes, result: int) -> Behind:
    return broadcast(call, [call["src"]], stripes)


@axis_rule("aten.tril", "aten.triu", growth=Linear())
def triangle(call: Call) -> Label:
    """Keep what lies below, or above, a diagonal of the last two dimensions."""
    label = call.label(call["self"])
    if isinstance(label, Examples) and label.dim >= len(call.out_shape) - 2:
        return call.mixes("what it keeps of an example depends on the example's row number in the batch")
    return label


@row_wise("tril", "triu")
def _slices_of_triangle(call: Call, stripes: Stripes, result: int) -> Behind:
    return None if stripes.dim >= len(call.out_shape) - 2 else [(call["self"], stripes)]


def combine(call: Call, operands: list[fx.Node], shape: tuple) -> Label:
    """The label of values broadcast together to ``shape``: one example axis, in one layout, or none.

    Shared values may not differ from example to example along it.
    """
    label = common_axis(call, operands, shape)
    if not isinstance(label, Examples):
        return label
    return call.any_by_row(operands, label, len(shape)) or label


def common_axis(call: Call, operands: list[fx.Node], shape: tuple) -> Label:
    """The same, whatever shared values are."""
    found: Examples | None = None
    for operand in operands:
        label = call.label(operand)
        if not isinstance(label, Examples):
            continue
        here = label.at(label.dim + len(shape) - len(call.shape(operand)))
        if found is None:
            found = here
        elif found.dim != here.dim:
            return call.mixes(
                f"it pairs a value whose examples lie along dim {found.dim} with one whose examples lie along dim "
                f"{here.dim}, so every example meets every other"
            )
        elif not found.same_layout(here):
            return call.mixes("its operands enumerate the examples in different orders")
    return found or Shared()


def _linear(call: Call) -> Label:
    """Keep a sum over examples linear, or say that it is not."""
    name = call.name
    if "::" in name:
        return call.mixes("it is not known to be linear in a sum over the examples")
    labels = [call.label(n) for n in call.operands]
    if any(isinstance(x, Examples) for x in labels):
        return call.mixes("it combines a sum over all examples with values of single examples")
    if not isinstance(call.node.meta["val"], torch.Tensor):
        return call.mixes("it is not linear in a sum over the examples")
    first, second = call["self"], call["other"]
    summed = [isinstance(call.label(x), Summed) for x in (first, second)]
    if name == "div" and summed == [True, True]:
        return call.mixes(
            "it divides a sum over the examples by another one, as in a mean over all tokens or labels that count: the "
            "share of one example depends on the others",
            remedy="compute one loss per example outside the model, from its outputs, and take the plain mean: "
            "dpcompile.losses.per_example_causal_lm or per_example_cross_entropy, or reduction='none'. Call a Hugging "
            "Face model without labels=",
        )
    if _rounds(call):
        return call.mixes("it rounds a sum over the examples")
    degree = degree_in_sums(call)
    if degree == 1:
        return Summed()
    if degree is None and isinstance(call.growth, (Sum, ProductAndSum)):
        return call.mixes("it adds a part that belongs to no example to a sum over the examples")
    return call.mixes("it is not linear in a sum over the examples")


def degree_in_sums(call: Call) -> float | None:
    """How the (first) result grows with the sums over examples among its operands: 1 if it is linear in them.

    None if that is not known.
    """
    if call.growth is None or isinstance(call.growth, Homogeneous):
        return None
    degrees = {n: float(isinstance(call.label(n), Summed)) for n in call.operands}
    degrees = dict.fromkeys(call.node.all_input_nodes, 0.0) | degrees
    degree = call.growth.degree(Degrees(call.node, call.arguments, degrees, lambda n: _is_zero(call.label(n))))
    return degree[0] if isinstance(degree, tuple) else degree


def _is_zero(label: Label) -> bool:
    return isinstance(label, Shared) and label.zero


def _rounds(call: Call) -> bool:
    dtype = call.node.meta["val"].dtype
    return not (dtype.is_floating_point or dtype.is_complex)


# Operations that torch tags as pointwise need no rule of their own.
add_growth(Linear(), "neg", "positive", "_conj_physical", "conj_physical", "real", "imag")
add_growth(Homogeneous(first), "abs", "relu")
add_growth(Product(("self", "other")), "mul")
add_growth(Quotient("self", "other"), "div")
add_growth(power(2), "square")
add_growth(power(0.5), "sqrt")
add_growth(power(-0.5), "rsqrt")
add_growth(power(-1), "reciprocal")
add_growth(power(), "pow")
add_growth(Sum(("self", "other")), "add", "sub", "rsub")
add_growth(Sum(("self", "end")), "lerp")
add_growth(ProductAndSum(("tensor1", "tensor2"), "self"), "addcmul")
add_growth(Homogeneous(Sum(("self", "other")).degree), "maximum", "minimum")
add_growth(
    Homogeneous(lambda d: d.common(Sum(("self", "min", "max")).among(d.arguments))), "clamp", "clamp_min", "clamp_max"
)
add_growth(
    SIGN, "sign", "sgn", "signbit", "gt", "lt", "ge", "le", "eq", "ne", "isnan", "isinf", "isfinite", "logical_not"
)
