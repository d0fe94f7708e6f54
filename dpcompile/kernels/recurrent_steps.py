"""Recurrent layers step by step, by torch's operations: what :mod:`dpcompile.kernels.recurrent` computes.

Shape letters: T steps, B examples, H hidden units; G is H times the gates of a kind, S times what it keeps of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["GATES", "KEPT", "STATES", "Direction", "back_through", "run_through"]

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
STATES = {"lstm": 2, "gru": 1, "rnn_tanh": 1, "rnn_relu": 1}
KEPT = {"lstm": 5, "gru": 4, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass(frozen=True, slots=True)
class Direction:
    """One layer in one direction.

    Attributes:
        kind: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        weight: ``[G, H]``, of the hidden state.
        bias: ``[G]`` or None.
        inside: bool ``[T, B]`` or None; where it is False an example's state stays as it is, and its output is 0.
        reverse: from the last step to the first.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    inside: Tensor | None
    reverse: bool

    @property
    def hidden(self) -> int:
        """H."""
        return self.weight.shape[1]

    def to(self, dtype: torch.dtype) -> Direction:
        """With contiguous weights of this dtype."""
        bias = None if self.bias is None else self.bias.to(dtype).contiguous()
        return replace(self, weight=self.weight.to(dtype).contiguous(), bias=bias)


def run_through(layer: Direction, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`dpcompile.kernels.recurrent.recurrence`, all operands of one dtype."""
    steps, batch, _ = inputs.shape
    outputs = inputs.new_empty(steps, batch, layer.hidden)
    saved = inputs.new_empty(steps, batch, KEPT[layer.kind] * layer.hidden)
    for t in _order(steps, layer.reverse):
        products = torch.nn.functional.linear(state[0], layer.weight, layer.bias)
        new, kept = _step(layer.kind, inputs[t], products, state)
        if layer.inside is None:
            state, saved[t], outputs[t] = new, kept, new[0]
            continue
        here = layer.inside[t].unsqueeze(1)
        state, saved[t] = torch.where(here, new, state), torch.where(here, kept, 0)
        outputs[t] = torch.where(here, state[0], 0)
    return outputs, state.clone(), saved


def back_through(
    layer: Direction, cotangent: Tensor, of_last: Tensor, previous: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`dpcompile.kernels.recurrent.recurrence_backward`, all operands of one dtype."""
    steps, batch, _ = cotangent.shape
    of_inputs = cotangent.new_empty(steps, batch, layer.weight.shape[0])
    of_state = of_last
    for t in _order(steps, not layer.reverse):
        h, *c = of_state.unbind()
        slopes, of_products, before = _step_back(layer.kind, h + cotangent[t], c, previous[t], saved[t])
        before[0] = before[0] + of_products @ layer.weight
        new = torch.stack(before)
        if layer.inside is not None:
            here = layer.inside[t].unsqueeze(1)
            slopes, new = torch.where(here, slopes, 0), torch.where(here, new, of_state)
        of_inputs[t], of_state = slopes, new
    return of_inputs, of_state.clone()


def _order(steps: int, reverse: bool) -> Iterator[int]:
    return iter(reversed(range(steps)) if reverse else range(steps))


def _step(kind: str, x: Tensor, p: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state behind a step, and what is kept of it."""
    if kind == "lstm":
        i, f, g, o = (x + p).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * state[1] + i * g
        return torch.stack([o * c.tanh(), c]), torch.cat([i, f, g, o, state[1]], 1)
    if kind == "gru":
        (xr, xz, xm), (pr, pz, pm) = x.chunk(3, 1), p.chunk(3, 1)
        r, z = (xr + pr).sigmoid(), (xz + pz).sigmoid()
        m = (xm + r * pm).tanh()
        return (m + z * (state[0] - m)).unsqueeze(0), torch.cat([r, z, m, pm], 1)
    h = (x + p).tanh() if kind == "rnn_tanh" else (x + p).relu()
    return h.unsqueeze(0), h


def _step_back(
    kind: str, h: Tensor, c: list[Tensor], previous: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Cotangents of what the inputs give, of what the state gives, and of the state before, but for the product's."""
    if kind == "lstm":
        i, f, g, o, before = saved.chunk(5, 1)
        t = (f * before + i * g).tanh()
        d = c[0] + h * o * (1 - t * t)
        slopes = torch.cat([d * g * i * (1 - i), d * before * f * (1 - f), d * i * (1 - g * g), h * t * o * (1 - o)], 1)
        return slopes, slopes, [torch.zeros_like(h), d * f]
    if kind == "gru":
        r, z, m, q = saved.chunk(4, 1)
        d = h * (1 - z) * (1 - m * m)
        both = torch.cat([d * q * r * (1 - r), h * (previous - m) * z * (1 - z)], 1)
        return torch.cat([both, d], 1), torch.cat([both, d * r], 1), [h * z]
    slope = h * (1 - saved * saved) if kind == "rnn_tanh" else h * (saved > 0)
    return slope, slope, [torch.zeros_like(h)]
