"""Element by element operations, with broadcasting."""

from __future__ import annotations

import torch
from torch import fx

from dpcompile.graph.labels import Examples, Label, Shared, Summed
from dpcompile.proof.rules.registry import Call, axis_rule

__all__ = ["combine", "common_axis", "pointwise"]

_LINEAR_IN_ONE = {
    "neg", "positive", "clone", "alias", "detach", "_to_copy", "convert_element_type", "to", "contiguous",
    "lift_fresh_copy", "_conj", "_conj_physical", "conj_physical", "real", "imag", "view_of", "device_put",
    "tril", "triu", "_neg_view",
}  # fmt: skip


@axis_rule(
    "aten.clone", "aten.alias", "aten.detach", "aten._to_copy", "aten.to", "aten.contiguous",
    "aten.lift_fresh_copy", "aten.masked_fill", "aten.where", "aten.native_dropout", "aten.native_dropout_backward",
    "aten.complex", "aten.polar", "aten.bernoulli", "aten.rrelu_with_noise_functional",
    "aten.rrelu_with_noise_backward", "aten._conj", "aten._neg_view",
    "aten._prelu_kernel", "aten._prelu_kernel_backward", "aten.nan_to_num", "aten.floor_divide",
    "prims.convert_element_type", "prims.device_put", "prims.view_of", "prims.inductor_force_stride_order",
    "prims.fma", "aten.uniform", "aten.normal", "aten.normal_functional", "aten.exponential", "aten.geometric",
    "aten.log_normal", "aten.cauchy", "aten.random", "aten.fake_quantize_per_tensor_affine_cachemask",
    "aten.fake_quantize_per_tensor_affine_cachemask_backward",
)  # fmt: skip
def pointwise(call: Call) -> Label:
    """Position by position: the result has the example axis of its operands, which must agree."""
    if call.summed():
        return _linear(call)
    return combine(call, call.operands, call.out_shape)


@axis_rule("aten.copy")
def copy(call: Call) -> Label:
    """The values of the source, in the shape of a destination whose values do not matter."""
    source = call["src"]
    label = call.label(source)
    if isinstance(label, Examples):
        return label.at(label.dim + len(call.out_shape) - len(call.shape(source)))
    if isinstance(label, Summed):
        return call.mixes("it rounds a sum over the examples") if _rounds(call) else label
    return Shared(zero=isinstance(label, Shared) and label.zero)


@axis_rule("aten.tril", "aten.triu")
def triangle(call: Call) -> Label:
    """Keep what lies below, or above, a diagonal of the last two dimensions."""
    label = call.label(call["self"])
    if isinstance(label, Examples) and label.dim >= len(call.out_shape) - 2:
        return call.mixes("what it keeps of an example depends on the example's row number in the batch")
    return label


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
    if name in _LINEAR_IN_ONE:
        return Summed()
    if name == "mul" and sum(summed) == 1:
        return Summed()
    if name == "div" and summed == [True, False] and call["rounding_mode"] is None:
        return Summed()
    if name == "fma":  # a * b + c
        a, b, c = call.node.args
        if isinstance(call.label(a), Summed) != isinstance(call.label(b), Summed):
            return _all_summed_or_zero(call, [c])
    if name == "complex":
        return _all_summed_or_zero(call, [call["real"], call["imag"]])
    if name in ("add", "sub"):
        return _all_summed_or_zero(call, [first, second])
    if name == "where" and not isinstance(call.label(call["condition"]), Summed):
        return _all_summed_or_zero(call, [first, second])
    if name == "masked_fill" and summed[0] and not isinstance(call.label(call["mask"]), Summed):
        return _all_summed_or_zero(call, [first, call["value"]])
    return call.mixes("it is not linear in a sum over the examples")


def _rounds(call: Call) -> bool:
    dtype = call.node.meta["val"].dtype
    return not (dtype.is_floating_point or dtype.is_complex)


def _all_summed_or_zero(call: Call, operands: list) -> Label:
    for operand in operands:
        label = call.label(operand)
        if not isinstance(label, Summed) and not (isinstance(label, Shared) and label.zero):
            return call.mixes("it adds a part that belongs to no example to a sum over the examples")
    return Summed()
