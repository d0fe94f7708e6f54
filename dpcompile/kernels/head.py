"""Cross entropy of a linear layer's outputs that never exist as a whole: the head of a language model.

Logits ``[N, V]`` are the largest tensor of a fine-tune. Here they are made for a part of the V classes at a time, in
the forward for the logarithm of their sum, and in the backward anew for what is made of them (the idea of Wijmans et
al. 2025, arXiv:2411.09009). Row n stands by itself.

Shape letters: N rows, D columns, V classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dpcompile._torch.autograd import refuse_forward_mode
from dpcompile.graph.slices import accumulation_dtype
from dpcompile.kernels.narrow import narrow_products
from dpcompile.kernels.products import product, product_
from dpcompile.kernels.rates import rates_for

__all__ = [
    "class_parts",
    "head_gradients",
    "head_hidden",
    "head_losses",
    "head_sums",
    "multiplied",
    "slopes",
    "whole_slopes",
]

_AT_ONCE = {"cpu": 2**24}  # logits that exist at once
_ON_DEVICES = 2**27
_FEWEST = 128  # classes at once: products of fewer are slow
_TAGS = (torch.Tag.flexible_layout,)


@torch.library.custom_op("dpcompile::head_losses", mutates_args=(), tags=_TAGS)
def head_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """``-log softmax(hidden @ weight^T + bias)[label]`` of every row, and the logarithm of its sum.

    Logits are float32 sums of exact products where the operands are bfloat16 or float16, and in the dtype of the
    operands otherwise, whatever ``torch.set_float32_matmul_precision`` allows.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``; rounded to the dtype of ``hidden`` where it is wider.
        bias: ``[V]`` or None.
        labels: integers in ``[0, V)``, or ``ignore_index``: then the loss is 0.
        ignore_index: marks rows that do not count.

    Returns:
        ``[N]`` twice, float32, or float64 of float64.

    Raises:
        IndexError: a label that is none, on CPUs; elsewhere its loss is NaN.
    """
    refuse_forward_mode("a cross entropy without logits")
    ignored = labels == ignore_index
    wrong = ~ignored & ((labels < 0) | (labels >= weight.shape[0]))
    if labels.device.type == "cpu" and bool(wrong.any()):
        raise IndexError(f"target {int(labels[wrong][0])} is out of bounds: there are {weight.shape[0]} classes")
    dtype = accumulation_dtype(hidden.dtype)
    total = hidden.new_full(labels.shape, -torch.inf, dtype=dtype)
    own = hidden.new_full(labels.shape, torch.nan, dtype=dtype)
    for part in class_parts(hidden, weight):
        logits = _logits(hidden, weight, bias, part)
        place, inside = _places(labels, part)
        own = torch.where(inside, logits.gather(1, place).squeeze(1), own)
        total = torch.logaddexp(total, logits.logsumexp(1))
    return torch.where(ignored, torch.zeros_like(own), total - own), total


@head_losses.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Shapes only."""
    refuse_forward_mode("a cross entropy without logits")
    dtype = accumulation_dtype(hidden.dtype)
    return hidden.new_empty(labels.shape, dtype=dtype), hidden.new_empty(labels.shape, dtype=dtype)


@torch.library.custom_op("dpcompile::head_hidden", mutates_args=(), tags=_TAGS)
def head_hidden(
    cotangent: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, totals: Tensor
) -> Tensor:
    """The gradient of ``hidden``: ``[N, D]``, of its dtype.

    Args:
        cotangent: ``[N]``, of the losses; 0 in rows that do not count.
        hidden: as in :func:`head_losses`.
        weight: "
        bias: "
        labels: "
        totals: ``[N]``, the second result of :func:`head_losses`.
    """
    result = torch.zeros(hidden.shape, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    part_of_it = torch.empty_like(result)
    for part in class_parts(hidden, weight):
        slope = slopes(cotangent, hidden, weight, bias, labels, totals, part)
        result += multiplied(slope.to(hidden.dtype), weight[part].to(hidden.dtype), part_of_it)
    return result.to(hidden.dtype)


@head_hidden.register_fake
def _(cotangent: Tensor, hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, totals: Tensor) -> Tensor:
    """Shapes only."""
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("dpcompile::head_sums", mutates_args=(), tags=_TAGS)
def head_sums(
    cotangent: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    totals: Tensor,
    of_bias: bool,
) -> Tensor:
    """The gradient of ``weight``, ``[V, D]``, or of ``bias``, ``[V]``, in float32 or float64.

    **Guarantee.** A row whose cotangent is 0 leaves no trace, whatever else it holds.

    Arguments as in :func:`head_hidden`.
    """
    dtype = accumulation_dtype(hidden.dtype)
    shape = weight.shape[:1] if of_bias else weight.shape
    result = torch.empty(shape, dtype=dtype, device=hidden.device)
    if not of_bias:
        zero = torch.zeros((), dtype=dtype, device=hidden.device)
        columns = torch.where((cotangent == 0).unsqueeze(1), zero, hidden.to(dtype))
    for part in class_parts(hidden, weight):
        slope = slopes(cotangent, hidden, weight, bias, labels, totals, part)
        if of_bias:
            result[part] = slope.sum(0)
        else:
            product_(slope.mT, columns, result[part])
    return result


@head_sums.register_fake
def _(
    cotangent: Tensor, hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, totals: Tensor, of_bias: bool
) -> Tensor:
    """Shapes only."""
    shape = weight.shape[:1] if of_bias else weight.shape
    return hidden.new_empty(shape, dtype=accumulation_dtype(hidden.dtype))


def head_gradients(
    cotangent: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    totals: Tensor,
    of_bias: bool,
) -> Tensor:
    """:func:`head_sums` of every example by itself, for tracing: rows ``[B, T, ..]`` to ``[B, V, D]`` or ``[B, V]``."""
    slope, columns = whole_slopes(cotangent, hidden, weight, bias, labels, totals)
    return slope.sum(1) if of_bias else product(slope.mT, columns)


def whole_slopes(
    cotangent: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, totals: Tensor
) -> tuple[Tensor, Tensor]:
    """For tracing, all logits' gradients at once, ``[B, T, V]``, and what they are multiplied with, ``[B, T, D]``.

    Both are zeros in rows whose cotangent is 0.
    """
    dtype = accumulation_dtype(hidden.dtype)
    flat = hidden.to(dtype).flatten(0, 1)
    logits = product(flat, weight.to(hidden.dtype).to(dtype).mT).unflatten(0, cotangent.shape)
    logits = logits if bias is None else logits + bias
    chosen = torch.arange(weight.shape[0], device=labels.device) == labels.unsqueeze(2)
    slope = ((logits - totals.unsqueeze(2)).exp() - chosen.to(dtype)) * cotangent.unsqueeze(2)
    none, zero = (cotangent == 0).unsqueeze(2), torch.zeros((), dtype=dtype, device=hidden.device)
    return torch.where(none, zero, slope), torch.where(none, zero, hidden.to(dtype))


def class_parts(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """The classes, so many at a time that their logits are few."""
    at_once = _AT_ONCE.get(hidden.device.type, _ON_DEVICES)
    step, classes = max(_FEWEST, at_once // max(1, hidden.shape[0])), weight.shape[0]
    for start in range(0, classes, step):
        yield slice(start, min(classes, start + step))


def slopes(
    cotangent: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    totals: Tensor,
    part: slice,
) -> Tensor:
    """The gradients of some classes' logits, ``[N, part]``: zeros in every row whose cotangent is 0."""
    logits = _logits(hidden, weight, bias, part)
    logits.sub_(totals.unsqueeze(1)).exp_()
    place, inside = _places(labels, part)
    logits.scatter_add_(1, place, -inside.to(logits.dtype).unsqueeze(1))
    logits.mul_(cotangent.unsqueeze(1))
    return logits.masked_fill_((cotangent == 0).unsqueeze(1), 0.0)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    own = weight[part].to(hidden.dtype)
    shape = (hidden.shape[0], own.shape[0])
    logits = torch.empty(shape, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    multiplied(hidden, own.mT, logits)
    return logits if bias is None else logits.add_(bias[part])


def _places(labels: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Where in a part of the classes a row's label is ``[N, 1]``, and whether it is there ``[N]``."""
    inside = (labels >= part.start) & (labels < part.stop)
    return (labels - part.start).clamp(0, part.stop - part.start - 1).unsqueeze(1), inside


def multiplied(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write ``a @ b`` to ``out``: exact products of narrow operands, added up in float32; else in full precision.

    Args:
        a: ``[M, K]``.
        b: ``[K, N]``, of the same dtype.
        out: ``[M, N]``, contiguous, float32, or float64 of float64.
    """
    narrow = a.dtype != out.dtype and rates_for(a.device).narrow_products
    if narrow and a.device.type == "cpu" and narrow_products(a.mT[None], b[None], out[None]) is not None:
        return out
    if narrow and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    product_(a.to(out.dtype), b.to(out.dtype), out)
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, labels, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, output[1])


def _backward(ctx: Any, cotangent: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if cotangent is None:
        return None, None, None, None, None
    hidden, weight, bias, labels, totals = ctx.saved_tensors
    own = torch.where(labels == ctx.ignore_index, torch.zeros_like(cotangent), cotangent)
    given = (own, hidden, weight, bias, labels, totals)
    wanted = ctx.needs_input_grad
    return (
        torch.ops.dpcompile.head_hidden(*given) if wanted[0] else None,
        torch.ops.dpcompile.head_sums(*given, False).to(weight.dtype) if wanted[1] else None,
        torch.ops.dpcompile.head_sums(*given, True).to(bias.dtype) if wanted[2] else None,
        None,
        None,
    )


head_losses.register_autograd(_backward, setup_context=_save)
