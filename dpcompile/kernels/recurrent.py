"""Recurrent layers as one operation for all steps, with the products of their weights outside of it.

torch's own operation gives the gradients of the weights as sums over the examples, which cannot be clipped any more;
its decomposition makes a graph of every step. Here the operation gives the cotangents of what the layer's inputs and
its state contribute to each step; the gradients of weights and biases are products with them, as for a linear layer.

Shape letters: T steps, B examples, H hidden units, G = H times the gates of the kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpcompile._torch.autograd import refuse_forward_mode
from dpcompile.graph.slices import accumulation_dtype
from dpcompile.kernels.recurrent_cpp import backward_by_kernel, forward_by_kernel
from dpcompile.kernels.recurrent_steps import GATES, KEPT, STATES, Direction, back_through, run_through

__all__ = ["recurrence", "recurrence_backward"]

_NAME = "a recurrent layer as one operation"
_TAGS = (torch.Tag.flexible_layout,)


@torch.library.custom_op("dpcompile::recurrence", mutates_args=(), tags=_TAGS)
def recurrence(
    kind: str,
    inputs: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inside: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps of one layer in one direction.

    **Guarantee.** What example b gets, ``[:, b]`` of each result, depends on ``[:, b]`` of the operands and on the
    layer's weights.

    Args:
        kind: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        inputs: ``[T, B, G]``, what the inputs contribute to the gates, with their bias.
        state: ``[1, B, H]``, of an LSTM ``[2, B, H]``: hidden state and cell.
        weight: ``[G, H]``, of the hidden state.
        bias: ``[G]`` or None, of the hidden state.
        inside: bool ``[T, B]`` or None; where it is False an example's state stays as it is, and its output is 0.
        reverse: from the last step to the first.

    Returns:
        Outputs ``[T, B, H]`` and last state, both of the state's dtype, and what the backward needs of every step, in
        float32 or float64.

    Raises:
        ValueError: shapes that do not belong together.
    """
    refuse_forward_mode(_NAME)
    _check(kind, inputs.shape, state, weight, bias, inside)
    dtype = accumulation_dtype(inputs.dtype)
    layer = Direction(kind, weight, bias, inside, reverse).to(dtype)
    given, first = inputs.to(dtype).contiguous(), state.to(dtype).contiguous()
    found = forward_by_kernel(layer, given, first)
    if found is None:
        found = run_through(layer, given, first)
    outputs, last, saved = found
    return outputs.to(state.dtype), last.to(state.dtype), saved


def _check(
    kind: str, shape: Sequence[int], state: Tensor, weight: Tensor, bias: Tensor | None, inside: Tensor | None
) -> None:
    """The kernel reads and writes without asking: do these belong to inputs of this shape."""
    (steps, batch, gates), hidden = shape, weight.shape[1]
    right = gates == GATES[kind] * hidden == weight.shape[0] and state.shape == (STATES[kind], batch, hidden)
    if not right or (bias is not None and bias.shape != (gates,)):
        shapes = ", ".join(str(list(x)) for x in (shape, state.shape, weight.shape))
        raise ValueError(f"inputs, state and weight of {kind} do not belong together: {shapes}")
    if inside is not None and (inside.shape != (steps, batch) or inside.dtype != torch.bool):
        raise ValueError(f"inside is {inside.dtype} {list(inside.shape)}, not bool {[steps, batch]}")


@recurrence.register_fake
def _(
    kind: str, inputs: Tensor, state: Tensor, weight: Tensor, bias: Any, inside: Any, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes only."""
    refuse_forward_mode(_NAME)
    steps, batch, _ = inputs.shape
    hidden, dtype = weight.shape[1], accumulation_dtype(inputs.dtype)
    kept = inputs.new_empty(steps, batch, KEPT[kind] * hidden, dtype=dtype)
    return state.new_empty(steps, batch, hidden), state.new_empty(state.shape), kept


@torch.library.custom_op("dpcompile::recurrence_backward", mutates_args=(), tags=_TAGS)
def recurrence_backward(
    kind: str,
    cotangent: Tensor,
    of_last: Tensor,
    previous: Tensor,
    saved: Tensor,
    weight: Tensor,
    inside: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``inputs`` and ``state`` of :func:`recurrence`, linear in the two cotangents together.

    **Guarantee.** As there: example by example.

    Args:
        kind: as there.
        cotangent: ``[T, B, H]``, of the outputs.
        of_last: as ``state``, of the last state.
        previous: ``[T, B, H]``, the hidden state before every step.
        saved: the third result.
        weight: as there.
        inside: as there.
        reverse: as there.

    Returns:
        ``[T, B, G]`` in the dtype of ``saved``, and the state's gradient in that of ``of_last``.
    """
    _check(kind, (*cotangent.shape[:2], weight.shape[0]), of_last, weight, None, inside)
    dtype = saved.dtype
    layer = Direction(kind, weight, None, inside, reverse).to(dtype)
    one, last, before, kept = (x.to(dtype).contiguous() for x in (cotangent, of_last, previous, saved))
    found = backward_by_kernel(layer, one, last, before, kept)
    of_inputs, of_state = back_through(layer, one, last, before, kept) if found is None else found
    return of_inputs, of_state.to(of_last.dtype)


@recurrence_backward.register_fake
def _(
    kind: str,
    cotangent: Tensor,
    of_last: Tensor,
    previous: Tensor,
    saved: Tensor,
    weight: Tensor,
    inside: Any,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes only."""
    return saved.new_empty(*cotangent.shape[:2], weight.shape[0]), of_last.new_empty(of_last.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.kind, given, state, weight, bias, inside, ctx.reverse = inputs
    outputs, _, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.dtypes = given.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(state, weight, inside, outputs, saved)


def _backward(ctx: Any, cotangent: Tensor | None, of_last: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if cotangent is None and of_last is None:
        return (None,) * 7
    state, weight, inside, outputs, saved = ctx.saved_tensors
    cotangent = torch.zeros_like(outputs) if cotangent is None else cotangent
    of_last = torch.zeros_like(state) if of_last is None else of_last
    previous = _before_each_step(outputs, state[0], inside, ctx.reverse)
    of_inputs, of_state = torch.ops.dpcompile.recurrence_backward(
        ctx.kind, cotangent, of_last, previous, saved, weight, inside, ctx.reverse
    )
    of_products = of_inputs
    if ctx.kind == "gru":  # the reset gate lies between the product and the third of its parts
        hidden = weight.shape[1]
        third = of_inputs[..., 2 * hidden :] * saved[..., :hidden]
        of_products = torch.cat([of_inputs[..., : 2 * hidden], third], -1)
    of_products = of_products.to(weight.dtype)
    dtype, of_bias = ctx.dtypes
    wanted = ctx.needs_input_grad
    rows = of_products.flatten(0, 1)
    return (
        None,
        of_inputs.to(dtype) if wanted[1] else None,
        of_state if wanted[2] else None,
        rows.mT @ previous.to(weight.dtype).flatten(0, 1) if wanted[3] else None,
        rows.sum(0).to(of_bias) if wanted[4] else None,
        None,
        None,
    )


def _before_each_step(outputs: Tensor, first: Tensor, inside: Tensor | None, reverse: bool) -> Tensor:
    """The hidden state that every step begins with: ``[T, B, H]``."""
    start = first.unsqueeze(0)
    if inside is not None and reverse:  # steps behind an example's end come first, and leave its state as it was
        outputs = torch.where(inside.unsqueeze(2), outputs, start)
    return torch.cat([outputs[1:], start] if reverse else [start, outputs[:-1]])


recurrence.register_autograd(_backward, setup_context=_save)
