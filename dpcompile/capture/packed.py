"""Packed sequences inside a private model: padded tensors and lengths, so that every example keeps a row of its own.

``pack_padded_sequence`` interleaves the steps of all examples, in an order and a number that their lengths decide.
While a private model is captured, these functions stand in for torch's (:mod:`dpcompile.capture.tracing`): a
packed sequence then carries the padded tensor, and recurrent layers hold their state where a sequence has ended.
Outputs, last states and gradients are those of torch, with three differences: lengths need not be sorted, one may be 0,
and ``pad_packed_sequence`` pads to the length of the padded input, not to that of the batch's longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import rnn

from dpcompile.errors import UnsupportedGraphError

__all__ = ["REPLACED", "recurrent", "refuse_returned"]

_pad_packed_sequence = rnn.pad_packed_sequence


def refuse_returned(values: Iterable[Any]) -> None:
    """Raise UnsupportedGraphError if one of the leaves that a model returned stands for a packed sequence's data."""
    if any(isinstance(value, _Padded) for value in values):
        raise UnsupportedGraphError(
            "the model returns a packed sequence, whose rows hold the steps of several examples",
            remedy="return pad_packed_sequence(..) of it, and mask the loss by the lengths",
        )


class _Padded:
    """In place of a packed sequence's data.

    Attributes:
        values: ``[T, B, ..]``, 0 behind the end of each sequence.
        inside: bool ``[T, B]``.
        lengths: as they were given.
    """

    def __init__(self, values: Tensor, inside: Tensor, lengths: Tensor) -> None:
        self.values, self.inside, self.lengths = values, inside, lengths
        self.dtype, self.device = values.dtype, values.device

    def dim(self) -> int:
        """As torch's layers expect it of a packed sequence's data."""
        return self.values.dim() - 1

    def size(self, dim: int) -> int:
        """Of the last dimension, which is all that torch's layers ask for."""
        assert dim == -1
        return self.values.shape[-1]


class _Sizes:
    """In place of a packed sequence's batch sizes, of which torch's layers take the first."""

    def __init__(self, batch: int) -> None:
        self.batch, self.device = batch, torch.device("cpu")

    def __getitem__(self, _: int) -> int:
        return self.batch


def _pack_padded(
    input: Tensor,  # noqa: A002
    lengths: Any,
    batch_first: bool = False,
    enforce_sorted: bool = True,
) -> Any:
    values = input.transpose(0, 1) if batch_first else input
    lengths = torch.as_tensor(lengths)
    steps = torch.arange(values.shape[0], device=values.device).unsqueeze(1)
    inside = steps < lengths.to(values.device).unsqueeze(0)
    values = _where(inside, values, torch.zeros_like(values))
    padded: Any = _Padded(values, inside, lengths)
    sizes: Any = _Sizes(values.shape[1])
    return rnn.PackedSequence(padded, sizes, None, None)


def _pad_packed(
    sequence: Any, batch_first: bool = False, padding_value: float = 0.0, total_length: int | None = None
) -> tuple[Tensor, Tensor]:
    padded = sequence.data
    if not isinstance(padded, _Padded):
        return _pad_packed_sequence(sequence, batch_first, padding_value, total_length)
    values, inside = padded.values, padded.inside
    more = 0 if total_length is None else total_length - values.shape[0]
    if more < 0:
        raise ValueError("Expected total_length to be at least the padded length of the packed input")
    values = _where(inside, values, torch.full_like(values, padding_value))
    if more:
        values = torch.cat([values, values.new_full((more, *values.shape[1:]), padding_value)])
    return (values.transpose(0, 1) if batch_first else values), padded.lengths


REPLACED: dict[Callable[..., Any], Callable[..., Any]] = {
    rnn.pack_padded_sequence: _pack_padded,
    rnn.pad_packed_sequence: _pad_packed,
}


def recurrent(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A function in place of ``torch._VF``'s ``kind``: "lstm", "gru", "rnn_tanh" or "rnn_relu".

    Called with a padded tensor it is ``original``; with what stands for packed sequences it is

    ``(data, sizes, hx, weights, bias, layers, dropout, train, bidirectional) -> (data, *last states)``.
    """
    cell = _CELLS[kind]

    def run(*args: Any) -> Any:
        if not isinstance(args[0], _Padded):
            return original(*args)
        data, _, hx, weights, biased, layers, dropout, train, bidirectional = args
        initial = hx if kind == "lstm" else (hx,)
        directions = 2 if bidirectional else 1
        each = len(weights) // (layers * directions)
        values, last = data.values, []
        for layer in range(layers):
            if layer and dropout and train:
                values = F.dropout(values, dropout)
            found = []
            for direction in range(directions):
                row = layer * directions + direction
                own = weights[row * each : (row + 1) * each]
                state = tuple(h[row] for h in initial)
                outputs, state = _one_direction(cell, values, data.inside, state, own, biased, bool(direction))
                found.append(outputs)
                last.append(state)
            values = torch.cat(found, -1) if directions == 2 else found[0]
        states = tuple(torch.stack([state[i] for state in last]) for i in range(len(initial)))
        return (_Padded(values, data.inside, data.lengths), *states)

    return run


def _one_direction(
    cell: Callable[..., tuple[Tensor, ...]],
    values: Tensor,
    inside: Tensor,
    state: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    biased: bool,
    backward: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``[T, B, D]`` to ``[T, B, H]``, 0 behind the end, and the state after each example's last step."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if biased else (None, None)
    projection = rest[2 if biased else 0] if len(rest) > (2 if biased else 0) else None
    inputs, outputs = F.linear(values, w_ih, b_ih), []
    steps = range(values.shape[0])
    for t in reversed(steps) if backward else steps:
        new = cell(inputs[t], state, w_hh, b_hh)
        if projection is not None:
            new = (F.linear(new[0], projection), *new[1:])
        here = inside[t].unsqueeze(-1)
        state = tuple(torch.where(here, n, old) for n, old in zip(new, state, strict=True))
        outputs.append(torch.where(here, state[0], torch.zeros_like(state[0])))
    return torch.stack(outputs[::-1] if backward else outputs), state


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


def _where(inside: Tensor, values: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(inside.reshape(*inside.shape, *[1] * (values.ndim - 2)), values, otherwise)
