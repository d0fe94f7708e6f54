"""Recurrent layers inside a private model: one operation for all steps (:mod:`dpcompile.kernels.recurrent`).

It stands in for torch's functions while a private model is captured. On other devices than CPUs, with projections, and
under transforms of torch.func, a layer is what torch makes of it, step by step; for padded sequences the same is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpcompile._torch.dynamo import seen_in_functorch
from dpcompile.capture.packed import Padded
from dpcompile.kernels.recurrent import recurrence

__all__ = ["layers"]

_KEPT_WIDE = ("gru",)  # under autocast, whose state torch then keeps in float32


def layers(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A function in place of ``torch._VF``'s ``kind``: "lstm", "gru", "rnn_tanh" or "rnn_relu".

    Both are called with ``(input, hx, weights, bias, layers, dropout, train, bidirectional, batch_first)`` or with what
    stands for packed sequences, ``(data, sizes, hx, weights, bias, layers, dropout, train, bidirectional)``; both
    return outputs and last states.
    """

    def run(*args: Any) -> Any:
        padded = args[0] if isinstance(args[0], Padded) else None
        if padded is not None:
            data, _, hx, weights, biased, count, dropout, train, bidirectional = args
            values, inside, batch_first = data.values, data.inside, False
        else:
            values, hx, weights, biased, count, dropout, train, bidirectional, batch_first = args
            inside = None
        each = len(weights) // (count * (2 if bidirectional else 1))
        projected = each > (4 if biased else 2)
        by_steps = projected or values.device.type != "cpu" or seen_in_functorch()
        if padded is None and by_steps:
            return original(*args)
        states = hx if kind == "lstm" else (hx,)
        values, states, weights = _under_autocast(kind, values, states, weights)
        values = values.transpose(0, 1) if batch_first else values
        run_one: Any = _by_steps if by_steps else _at_once
        last = []
        for layer in range(count):
            if layer and dropout and train:
                values = F.dropout(values, dropout)
            found = []
            for row in range(layer * 2, layer * 2 + 2) if bidirectional else (layer,):
                own = weights[row * each : (row + 1) * each]
                reverse = bool(bidirectional) and row % 2 == 1
                outputs, state = run_one(kind, values, inside, tuple(h[row] for h in states), own, biased, reverse)
                found.append(outputs)
                last.append(state)
            values = torch.cat(found, -1) if bidirectional else found[0]
        after = tuple(torch.stack([state[i] for state in last]) for i in range(len(states)))
        if padded is not None:
            return (Padded(values, padded.inside, padded.lengths), *after)
        return (values.transpose(0, 1) if batch_first else values, *after)

    return run


def _under_autocast(
    kind: str, values: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """Operands in autocast's dtype, where torch runs a layer of this kind in it."""
    device = values.device.type
    if not torch.is_autocast_enabled(device) or kind in _KEPT_WIDE:
        return values, states, weights
    dtype = torch.get_autocast_dtype(device)
    return values.to(dtype), [h.to(dtype) for h in states], [w.to(dtype) for w in weights]


def _at_once(
    kind: str,
    values: Tensor,
    inside: Tensor | None,
    state: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    biased: bool,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``[T, B, D]`` to ``[T, B, H]``, 0 behind the end, and the state after each example's last step."""
    b_ih, b_hh = weights[2:4] if biased else (None, None)
    inputs = F.linear(values, weights[0], b_ih)
    outputs, last, _ = recurrence(kind, inputs, torch.stack(state), weights[1], b_hh, inside, reverse)
    return outputs, last.unbind()


def _by_steps(
    kind: str,
    values: Tensor,
    inside: Tensor,
    state: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    biased: bool,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same of a padded sequence."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if biased else (None, None)
    projection = rest[2 if biased else 0] if len(rest) > (2 if biased else 0) else None
    inputs, outputs = F.linear(values, w_ih, b_ih), []
    steps = range(values.shape[0])
    for t in reversed(steps) if reverse else steps:
        new = _CELLS[kind](inputs[t], state, w_hh, b_hh)
        if projection is not None:
            new = (F.linear(new[0], projection), *new[1:])
        here = inside[t].unsqueeze(-1)
        state = tuple(torch.where(here, n, old) for n, old in zip(new, state, strict=True))
        outputs.append(torch.where(here, state[0], torch.zeros_like(state[0])))
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _lstm(x: Tensor, state: tuple[Tensor, ...], w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
    i, f, g, o = (x + F.linear(state[0], w, b)).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(x: Tensor, state: tuple[Tensor, ...], w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), F.linear(state[0], w, b).chunk(3, -1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return (n + z * (state[0] - n),)


def _rnn_tanh(x: Tensor, state: tuple[Tensor, ...], w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
    return (torch.tanh(x + F.linear(state[0], w, b)),)


def _rnn_relu(x: Tensor, state: tuple[Tensor, ...], w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
    return (torch.relu(x + F.linear(state[0], w, b)),)


_CELLS = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _rnn_tanh, "rnn_relu": _rnn_relu}
