"""The C++ kernels of `kernels/cpp/recurrent.cpp`: all steps of a recurrent layer, some examples beside each other."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dpcompile.kernels.build import kernel
from dpcompile.kernels.recurrent_steps import GATES, KEPT, STATES, Direction, back_through, run_through

__all__ = ["backward_by_kernel", "forward_by_kernel"]

_KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")  # as the kernel numbers them
_CLOSE = 2e-6  # of numbers around 1, after a few steps


def forward_by_kernel(layer: Direction, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """:func:`dpcompile.kernels.recurrent_steps.run_through` of contiguous operands, or None where it cannot.

    **Guarantee.** An example's numbers are made of its own, and come out to the bit the same whatever examples it
    stands among.
    """
    library = _for(inputs)
    return library and _forward(library, layer, inputs, state)


def backward_by_kernel(
    layer: Direction, cotangent: Tensor, of_last: Tensor, previous: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor] | None:
    """:func:`dpcompile.kernels.recurrent_steps.back_through`, in the same way."""
    library = _for(cotangent)
    return library and _backward(library, layer, cotangent, of_last, previous, saved)


def _for(values: Tensor) -> ctypes.CDLL | None:
    fits = values.dtype == torch.float32 and values.device.type == "cpu" and values.numel()
    return _library() if fits else None


def _forward(library: ctypes.CDLL, layer: Direction, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    outputs, last = inputs.new_empty(*inputs.shape[:2], layer.hidden), torch.empty_like(state)
    saved = inputs.new_empty(*inputs.shape[:2], KEPT[layer.kind] * layer.hidden)
    mask = None if layer.inside is None else layer.inside.contiguous()
    given = [_address(x) for x in (inputs, state, layer.weight, layer.bias, mask)]
    written = [_address(x) for x in (outputs, last, saved)]
    library.dp_recurrence(*given, _sizes(layer, outputs), *written, _threads())
    return outputs, last, saved


def _backward(
    library: ctypes.CDLL, layer: Direction, cotangent: Tensor, of_last: Tensor, previous: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor]:
    of_inputs = cotangent.new_empty(*cotangent.shape[:2], layer.weight.shape[0])
    of_state = torch.empty_like(of_last)
    mask = None if layer.inside is None else layer.inside.contiguous()
    given = [_address(x) for x in (cotangent, of_last, previous, saved, layer.weight, mask)]
    written = [_address(x) for x in (of_inputs, of_state)]
    library.dp_recurrence_backward(*given, _sizes(layer, cotangent), *written, _threads())
    return of_inputs, of_state


def _address(value: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if value is None else value.data_ptr())


def _sizes(layer: Direction, outputs: Tensor) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * 5)(_KINDS.index(layer.kind), *outputs.shape, int(layer.reverse))


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())


@kernel("recurrent", contract=True)
def _library(library: ctypes.CDLL) -> bool:
    """Whether both give what torch's operations do in float64, of all kinds, with ends and without, both ways."""
    return all(_as_by_steps(library, kind, reverse) for kind in _KINDS for reverse in (False, True))


def _as_by_steps(library: ctypes.CDLL, kind: str, reverse: bool) -> bool:
    steps, batch, hidden = 3, 13, 5
    gates = GATES[kind] * hidden
    mask = torch.arange(steps).unsqueeze(1) < torch.arange(batch) % (steps + 1) if reverse else None
    layer = Direction(kind, _wave(gates, hidden), _wave(gates), mask, reverse)
    wide = layer.to(torch.float64)
    inputs, state = _wave(steps, batch, gates), _wave(STATES[kind], batch, hidden)
    found = _forward(library, layer, inputs, state)
    if not _all_close(found, run_through(wide, inputs.double(), state.double())):
        return False
    cotangent, previous, saved = _wave(steps, batch, hidden), _wave(steps, batch, hidden) - 0.5, found[2]
    back = _backward(library, layer, cotangent, state, previous, saved)
    given = (cotangent.double(), state.double(), previous.double(), saved.double())
    return _all_close(back, back_through(wide, *given))


def _wave(*shape: int) -> Tensor:
    numbers = torch.arange(float(torch.Size(shape).numel()), dtype=torch.float64)
    return (numbers * 0.7).sin().reshape(shape).float()


def _all_close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(torch.allclose(f.double(), w, rtol=_CLOSE, atol=_CLOSE) for f, w in zip(found, wanted, strict=True))
