"""Attention: ``scaled_dot_product_attention`` and ``flex_attention``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from dpcompile.graph.labels import Examples, Label, Mixed, Shared, Summed
from dpcompile.graph.operations import operation_name
from dpcompile.graph.sizes import is_one
from dpcompile.proof.rules.growth import Degrees, Homogeneous
from dpcompile.proof.rules.pointwise import combine
from dpcompile.proof.rules.registry import Call, Labels, axis_rule
from dpcompile.proof.rules.stripes import Behind, Stripes, broadcast, row_wise


@axis_rule(
    "aten._scaled_dot_product_flash_attention_for_cpu", "aten._scaled_dot_product_flash_attention_for_cpu_backward",
    "aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_flash_attention_backward",
    "aten._scaled_dot_product_efficient_attention", "aten._scaled_dot_product_efficient_attention_backward",
    "aten._scaled_dot_product_cudnn_attention", "aten._scaled_dot_product_cudnn_attention_backward",
    "aten._scaled_dot_product_fused_attention_overrideable",
    "aten._scaled_dot_product_fused_attention_overrideable_backward",
)  # fmt: skip
def attention(call: Call) -> Labels:
    """Attention runs within each ``[batch, head]``; the examples must lie along one of these two dimensions."""
    values = call.node.meta["val"]
    if call.summed():
        refusal = call.mixes("attention is not linear in a sum over the examples")
        return tuple(refusal for _ in values)
    mask = call["attn_mask"] if call["attn_mask"] is not None else call["attn_bias"]
    tensors = [n for n in call.operands if len(call.shape(n)) == 4 or n is mask]
    label = combine(call, tensors, (1, 1, 1, 1))
    if isinstance(label, Examples) and label.dim > 1:
        label = call.mixes("every example attends to the others")
    return tuple(_attention_output(label, v) for v in values)


def _attention_output(label: Label, value: object) -> Label:
    """Tensors with batch and head dimensions get the axis; seeds, offsets and empty masks are shared."""
    ndim = getattr(value, "ndim", 0)
    return label if ndim >= 2 or not isinstance(label, Examples) else Shared()


@row_wise(attention)
def _slices_of_attention(call: Call, stripes: Stripes, result: int) -> Behind:
    if stripes.dim != 0 or not is_one(stripes.axis.outer) or not is_one(stripes.axis.inner):
        return None
    return broadcast(call, [n for n in call.operands if len(call.shape(n)) == 4], stripes, 4)


@axis_rule("higher_order.flex_attention")
def flex_attention(call: Call) -> Labels:
    """Attention with a score and a mask function, which may index captured tensors by the number of the example."""
    score_mod, block_mask, score_captured, mask_captured = (call.node.args[i] for i in (3, 4, 7, 8))
    label = _flex_axis(call, call.node.args[:3])
    label = _check_captured(call, label, score_mod, score_captured, 5)
    label = _check_captured(call, label, block_mask[-1], mask_captured, 4)  # type: ignore[index]
    label = _check_block_mask(call, label, block_mask)
    return tuple(_attention_output(label, v) for v in call.node.meta["val"])


def _growth_of_flex_attention_backward(d: Degrees) -> float | None:
    given = [n for n in d.node.args[5:7] if isinstance(n, fx.Node)]
    return d.common(given) if all(not d.of(n) for n in d.node.all_input_nodes if n not in given) else None


@axis_rule("higher_order.flex_attention_backward", growth=Homogeneous(_growth_of_flex_attention_backward))
def flex_attention_backward(call: Call) -> Labels:
    """Gradients of queries, keys and values lie like these; those of captured tensors are summed over the examples."""
    arguments = call.node.args
    label = _flex_axis(call, [n for n in arguments[:7] if isinstance(n, fx.Node)])
    label = _check_captured(call, label, arguments[7], arguments[12], 5)
    label = _check_captured(call, label, arguments[9][-1], arguments[13], 4)  # type: ignore[index]
    label = _check_block_mask(call, label, arguments[9])
    captured = call.unsupported(
        "the gradient of a tensor that score_mod captures is summed over the examples inside",
        remedy="freeze that tensor, or add it to the scores as attn_mask of scaled_dot_product_attention",
    )
    results = [_of_operand(call, label, n) for n in arguments[:3]]
    return (*results, *(captured for _ in call.node.meta["val"][3:]))


def _flex_axis(call: Call, operands: Sequence[Any]) -> Label:
    if call.summed():
        return call.mixes("attention is not linear in a sum over the examples")
    label = combine(call, [n for n in operands if len(call.shape(n)) == 4], (1, 1, 1, 1))
    if isinstance(label, Examples) and label.dim != 0:
        return call.mixes("the examples lie along its heads or positions")
    return label


def _of_operand(call: Call, label: Label, operand: Any) -> Label:
    """A gradient of an operand that is broadcast over the examples would be a sum over them."""
    if isinstance(label, Examples) and is_one(call.shape(operand)[0]):
        return call.unsupported("it adds up a gradient over the examples inside; expand the operand before")
    return label


def _check_captured(call: Call, label: Label, function: Any, captured: Any, indices: int) -> Label:
    """Captured values of examples must be read at the example's own number, and nothing else may depend on it.

    **Guarantee.** The function is called for every (example, head, query, key); a captured tensor that depends on
    examples is read through ``tensor[b, ..]`` alone, with ``b`` the argument itself and not computed from it. ``b`` has
    no other use, but to read shared values that are the same for every example.
    """
    if isinstance(label, Mixed) or not isinstance(function, fx.Node):
        return label
    inputs = getattr(call.node.graph.owning_module, str(function.target)).graph.find_nodes(op="placeholder")
    example = inputs[1 if indices == 5 else 0]
    tensors = dict(zip(inputs[indices:], captured or (), strict=False))
    for value, operand in tensors.items():
        own = call.label(operand)
        if isinstance(own, Shared):
            continue
        if not isinstance(own, Examples) or not isinstance(label, Examples) or not own.same_layout(label):
            return call.mixes("a tensor captured by score_mod or mask_mod enumerates the examples in another order")
        if not _reads_own(value, own.dim, example):
            return call.mixes("score_mod or mask_mod reads a captured tensor at other examples than its own")
    if not isinstance(label, Examples):
        return label
    for use in example.users:
        indexed: Any = use.args[1] if operation_name(use.target) == "index" and use.args[0] in tensors else ()
        if example not in indexed:
            return call.mixes(
                "score_mod or mask_mod computes with the number of the example in the batch; with one example less the "
                "others would get other scores",
                remedy="let it read what belongs to an example from a tensor with an example axis, as lengths[b]",
            )
        operand = tensors[use.args[0]]  # type: ignore[index]
        refusals = (call.by_row(operand, label.at(d)) for d, i in enumerate(indexed) if i is example)
        refusal = next((r for r in refusals if r is not None), None)
        if refusal is not None:
            return refusal
    return label


def _reads_own(value: fx.Node, dim: int, example: fx.Node) -> bool:
    for user in value.users:
        indices: Any = user.args[1] if operation_name(user.target) == "index" else ()
        if user.args[0] is not value or len(indices) <= dim or indices[dim] is not example:
            return False
    return True


def _check_block_mask(call: Call, label: Label, block_mask: Any) -> Label:
    """Which blocks an example looks at must be its own choice."""
    for operand in block_mask:
        own = call.label(operand) if isinstance(operand, fx.Node) else Shared()
        if isinstance(label, Examples) and (refusal := call.by_row(operand, label)) is not None:
            return refusal
        if isinstance(own, (Shared, Mixed)) or isinstance(label, Mixed):
            continue
        if isinstance(own, Summed) or not isinstance(label, Examples) or own != label:
            return call.mixes("its block mask enumerates the examples in another order")
    return label
