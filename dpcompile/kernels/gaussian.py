"""Kernels that draw noise: `kernels/cpp/gaussian.cpp` on CPUs, `kernels/triton` on GPUs, on whole lists of tensors.

Both make the same operations of IEEE 754 in the same order. They are compiled at first use. Where there is no compiler,
or it fails, one warning says so and the same values, but for their last bits, come from torch operations (`noise`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from dpcompile._torch.tensors import is_fake
from dpcompile.kernels.build import kernel
from dpcompile.kernels.on_gpu import captured, proven, runs_triton

__all__ = ["adam_", "mean_", "rows_", "sgd_", "takes"]


class _Numbers(TypedDict):
    std: float
    divisor: float
    seed: int
    step: int


def takes(tensors: Iterable[Tensor]) -> bool:
    """Whether a kernel can work on these: real contiguous tensors of one kind, float32 or float64, on one device.

    False while a graph is traced or a CUDA graph captured, and where the kernel cannot be compiled.
    """
    if torch.compiler.is_compiling() or captured():
        return False
    tensors = list(tensors)
    if len({(t.dtype, t.device) for t in tensors}) != 1:
        return False
    dtype, device = tensors[0].dtype, tensors[0].device
    return (
        dtype in (torch.float32, torch.float64)
        and (device.type == "cpu" or runs_triton(device))
        and all(t.is_contiguous() and type(t.detach()) is Tensor for t in tensors)
        and not any(is_fake(t) for t in tensors)
        and (_draws_on(device) if runs_triton(device) else _library() is not None)
    )


def mean_(
    tensors: Sequence[Tensor],
    *,
    tags: Sequence[int],
    starts: Sequence[int],
    std: float,
    divisor: float,
    seed: int,
    step: int,
) -> None:
    """``x = (x + std * noise) / divisor`` in one pass over memory; no noise for ``std`` 0.

    Args:
        tensors: those that :func:`takes` said yes to; element ``i`` gets element ``i`` of the noise.
        tags: last words of the counters, one for each tensor.
        starts: the index, in its whole parameter, of each tensor's first element.
        std: of the noise.
        divisor: of the sums.
        seed: in [0, 2**64).
        step: in [0, 2**32).
    """
    numbers: _Numbers = {"std": std, "divisor": divisor, "seed": seed, "step": step}
    if runs_triton(tensors[0].device):
        _steps().step_("mean", tensors, tags=tags, starts=starts, **numbers)
    else:
        _call("dp_mean", *_spans(tensors, tensors, tags, starts), *_numbers(tensors[0], **numbers))
    torch.autograd.graph.increment_version(tensors)


def adam_(
    totals: Sequence[Tensor],
    weights: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    *,
    tags: Sequence[int],
    std: float,
    divisor: float,
    seed: int,
    step: int,
    rates: Sequence[float],
    drawn: Sequence[Tensor] | None = None,
) -> None:
    """:func:`mean_` of the totals, and Adam's update with the result, in the same pass.

    Args:
        totals: clipped sums, which become private means.
        weights: the parameters.
        means: exponential means of gradients.
        squares: exponential means of their squares.
        tags: see :func:`mean_`, as for what follows.
        std: see there.
        divisor: see there.
        seed: see there.
        step: see there.
        rates: factor on the weight, L2 penalty, beta1, beta2, step size, root of the second bias correction, epsilon.
        drawn: noise, of the totals' kind and sizes, in the place of what seed and step give.
    """
    everything = [*totals, *weights, *means, *squares]
    numbers: _Numbers = {"std": std, "divisor": divisor, "seed": seed, "step": step}
    if runs_triton(totals[0].device):
        decay, l2, beta1, beta2, step_size, root, eps = rates
        own = (decay, l2, 1 - beta1, beta2, 1 - beta2, step_size, 1 / root, eps)
        others, begin = [weights, means, squares], [0] * len(totals)
        _steps().step_("adam", totals, others, tags=tags, starts=begin, rates=own, drawn=drawn, **numbers)
    else:
        arguments = [*_spans(totals, everything, tags), *_numbers(totals[0], **numbers)]
        noise = None if drawn is None else (ctypes.c_void_p * len(drawn))(*(t.data_ptr() for t in drawn))
        _call("dp_adam", *arguments, (ctypes.c_double * len(rates))(*rates), noise)
    torch.autograd.graph.increment_version(everything)


def sgd_(
    totals: Sequence[Tensor],
    weights: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    tags: Sequence[int],
    std: float,
    divisor: float,
    seed: int,
    step: int,
    rates: Sequence[float],
    drawn: Sequence[Tensor] | None = None,
) -> None:
    """:func:`mean_` of the totals, and SGD's update with the result, in the same pass; on GPUs.

    Args:
        totals: clipped sums, which become private means.
        weights: the parameters.
        buffers: of momentum; none without it.
        tags: see :func:`mean_`, as for what follows.
        std: see there.
        divisor: see there.
        seed: see there.
        step: see there.
        rates: step size, L2 penalty; with momentum also momentum, one less dampening, whether the buffers are new and
            hold nothing yet, whether it is Nesterov's.
        drawn: see :func:`adam_`.
    """
    kind, others = ("momentum", [weights, buffers]) if buffers else ("sgd", [weights])
    numbers: _Numbers = {"std": std, "divisor": divisor, "seed": seed, "step": step}
    _steps().step_(kind, totals, others, tags=tags, starts=[0] * len(totals), rates=rates, drawn=drawn, **numbers)
    torch.autograd.graph.increment_version([*totals, *weights, *buffers])


def rows_(
    rings: Sequence[Tensor],
    *,
    tags: Sequence[int],
    starts: Sequence[int],
    factors: Sequence[float],
    seed: int,
    first: int,
    made: int,
    more: int,
) -> None:
    """The next rows of correlated noise, each in the place of the oldest (:class:`dpcompile.noise.rows.Rows`).

    Args:
        rings: ``[K, numel]``, those that :func:`takes` said yes to; row r of a block stands at r % K.
        tags: see :func:`mean_`, as for ``starts`` and ``seed``.
        starts: see there.
        factors: K + 1, of the number that is drawn and of the K rows before, which are taken off.
        seed: see there.
        first: the step of the block's row 0.
        made: rows that the block has.
        more: to make.
    """
    if runs_triton(rings[0].device):
        from dpcompile.kernels.triton import noise_rows

        place = {"seed": seed, "first": first, "made": made, "more": more}
        noise_rows.rows_(rings, tags=tags, starts=starts, factors=factors, **place)
    else:
        _call("dp_rows", *_rows(rings, tags, starts, factors, seed, first, made, more))
    torch.autograd.graph.increment_version(rings)


# Elements 0 to 8 of parameter 5 at step 7 under this seed, by torch operations (`dpcompile.noise.normal.gaussian`).
_SEED, _STEP, _TAG = 0x0123456789ABCDEF, 7, 5
_KNOWN = (
    -0.44924406374913595, -0.9271977258449254, -0.43267611148591595, -0.32836712666794193, -0.48817413897034206,
    -2.1442205514764496, 1.4318664897499944, -0.23527948117224504, 0.5338596703061171,
)  # fmt: skip


@kernel("gaussian", else_told="the same noise is drawn by torch operations")
def _library(library: ctypes.CDLL) -> bool:
    """Whether noise of twice the size, added to ones and halved, is what it should be, and a row with those before."""
    values = torch.ones(len(_KNOWN), dtype=torch.float64)
    arguments = [*_spans([values], [values], [_TAG]), *_numbers(values, 2.0, 2.0, _SEED, _STEP)]
    threads, known = ctypes.c_int(torch.get_num_threads()), torch.tensor(_KNOWN, dtype=torch.float64)
    library.dp_mean(*arguments, threads)
    ring = torch.tensor([[3.0], [5.0]], dtype=torch.float64).expand(2, len(_KNOWN)).contiguous()
    arguments = _rows([ring], [_TAG], [0], (2.0, 0.5, 0.25), _SEED, _STEP - 1, 1, 1)
    library.dp_rows(*arguments, threads)
    row = 2 * known - 0.5 * 3 - 0.25 * 5
    return all(torch.allclose(a, b, rtol=0, atol=1e-13) for a, b in ((values, known + 0.5), (ring[1], row)))


@proven("noise", else_told="the same noise is drawn by torch operations")
def _draws_on(device: torch.device) -> bool:
    """The same of the Triton kernels, of both dtypes; of noise that is drawn in an update too."""
    from dpcompile.kernels.triton import noise_rows

    known = torch.tensor(_KNOWN, dtype=torch.float64)
    place: Any = {"tags": [_TAG], "starts": [0]}
    for dtype, close in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        values = torch.ones(len(_KNOWN), dtype=dtype, device=device)
        total, weight = values.clone(), torch.zeros_like(values)
        numbers: Any = {"std": 2.0, "divisor": 2.0, "seed": _SEED, "step": _STEP}
        _steps().step_("mean", [values], **place, **numbers)
        _steps().step_("sgd", [total], [[weight]], rates=(1.0, 0.0), **place, **numbers)
        ring = torch.tensor([[3.0], [5.0]], dtype=dtype, device=device).repeat(1, len(_KNOWN))
        more: Any = {"first": _STEP - 1, "made": 1, "more": 1}
        noise_rows.rows_([ring], factors=(2.0, 0.5, 0.25), seed=_SEED, **place, **more)
        found = ((values, known + 0.5), (weight, -known - 0.5), (ring[1], 2 * known - 0.5 * 3 - 0.25 * 5))
        if not all(torch.allclose(a.cpu().double(), b, rtol=0, atol=close) for a, b in found):
            return False
    return True


def _steps() -> Any:
    from dpcompile.kernels.triton import steps

    return steps


def _call(name: str, *arguments: object) -> None:
    getattr(_library(), name)(*arguments, ctypes.c_int(torch.get_num_threads()))


def _spans(
    totals: Sequence[Tensor], tensors: Sequence[Tensor], tags: Sequence[int], starts: Sequence[int] | None = None
) -> list[object]:
    """Count, memory, starts (0 by default), sizes and counter tags, as the kernel takes them."""
    n = len(totals)
    begin = (ctypes.c_int64 * n)(*(starts or [0] * n))
    memory = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    sizes = (ctypes.c_int64 * n)(*(t.numel() for t in totals))
    return [ctypes.c_int64(n), memory, begin, sizes, (ctypes.c_int64 * n)(*tags)]


def _rows(
    rings: Sequence[Tensor], tags: Sequence[int], starts: Sequence[int], factors: Sequence[float], seed: int, *at: int
) -> list[object]:
    """What :func:`rows_` is given, as the kernel takes it."""
    count, memory, begin, _, words = _spans(rings, rings, tags, starts)
    sizes = (ctypes.c_int64 * len(rings))(*(ring.shape[1] for ring in rings))
    wide, _, _, key, _ = _numbers(rings[0], 0.0, 1.0, seed, 0)
    place = [ctypes.c_int64(x) for x in (*at, len(factors) - 1)]
    return [count, memory, begin, sizes, words, wide, key, *place, (ctypes.c_double * len(factors))(*factors)]


def _numbers(like: Tensor, std: float, divisor: float, seed: int, step: int) -> tuple[object, ...]:
    wide = ctypes.c_int(like.dtype == torch.float64)
    return wide, ctypes.c_double(std), ctypes.c_double(divisor), ctypes.c_uint64(seed), ctypes.c_int64(step)
