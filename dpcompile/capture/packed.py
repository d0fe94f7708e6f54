"""Packed sequences inside a private model: padded tensors and lengths, so that every example keeps a row of its own.

``pack_padded_sequence`` interleaves the steps of all examples, in an order and a number that their lengths decide.
While a private model is captured, these functions stand in for torch's (:mod:`dpcompile.capture.tracing`): a
packed sequence then carries the padded tensor, and recurrent layers hold their state where a sequence has ended.
Outputs, last states and gradients are those of torch, with three differences: lengths need not be sorted, one may be 0,
and ``pad_packed_sequence`` pads to the length of the padded input, not to that of the batch's longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import rnn

from dpcompile.errors import UnsupportedGraphError

__all__ = ["REPLACED", "Padded", "refuse_returned"]

_pad_packed_sequence = rnn.pad_packed_sequence


def refuse_returned(values: Iterable[Any]) -> None:
    """Raise UnsupportedGraphError if one of the leaves that a model returned stands for a packed sequence's data."""
    if any(isinstance(value, Padded) for value in values):
        raise UnsupportedGraphError(
            "the model returns a packed sequence, whose rows hold the steps of several examples",
            remedy="return pad_packed_sequence(..) of it, and mask the loss by the lengths",
        )


class Padded:
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
    padded: Any = Padded(values, inside, lengths)
    sizes: Any = _Sizes(values.shape[1])
    return rnn.PackedSequence(padded, sizes, None, None)


def _pad_packed(
    sequence: Any, batch_first: bool = False, padding_value: float = 0.0, total_length: int | None = None
) -> tuple[Tensor, Tensor]:
    padded = sequence.data
    if not isinstance(padded, Padded):
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


def _where(inside: Tensor, values: Tensor, otherwise: Tensor) -> Tensor:
    """``values`` where ``inside``, ``[T, B]``, and ``otherwise`` elsewhere: ``[T, B, ..]``."""
    return torch.where(inside.reshape(*inside.shape, *[1] * (values.ndim - 2)), values, otherwise)
