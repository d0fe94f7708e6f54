"""Normal and uniform numbers out of counter blocks, drawn and added to tensors.

This file defines the values. :func:`add_gaussian_` takes them, where it can, from `native`: a C++ or Triton kernel with
the same counters, the same 53-bit uniforms and the same formulas in float64, whose logarithm and cosine may differ in
the last bits. Which of them draws is no part of the counter, so taking one or the other never repeats noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dpcompile.errors import PrivacyError
from dpcompile.kernels import gaussian as native
from dpcompile.kernels.on_gpu import captured
from dpcompile.noise import chacha, philox
from dpcompile.noise.counter import MASK, STEPS, Span, Stream, check_range, check_seed, counter_tag, refuse_twice

__all__ = ["add_gaussian_", "batches_of", "gaussian", "gaussians", "uniform", "uniform_at", "uniforms"]
_SCRATCH_CPU, _SCRATCH = 2**17, 2**22  # values per pass; scratch is about 16 times half that many int64 lanes
_NORMAL = (Stream.GRADIENT, Stream.VOTES, Stream.TREE, Stream.BUFFERED)
_NOISE = (*_NORMAL, Stream.DISCRETE, Stream.DECISIONS)


def gaussian(
    seed: int,
    *,
    step: int,
    parameter: int,
    numel: int,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    secure: bool = False,
    stream: Stream = Stream.GRADIENT,
) -> Tensor:
    """Standard normal values ``[numel]``: elements ``[start, start + numel)`` of one parameter's noise at one step.

    Args:
        seed: in [0, 2**64); with ``secure`` in [0, 2**256). See :func:`fresh_seed`.
        step: logical step, in [0, 2**32).
        parameter: index of the parameter in the model, in [0, 2**24).
        numel: how many elements.
        start: index of the first one in the whole, unsharded parameter, row-major.
        dtype: torch.float32 or torch.float64. The arithmetic is float64; float32 is its rounding.
        device: where the values are wanted. They are drawn there without waiting for the device (on the CPU for
            devices without float64).
        secure: ChaCha20 instead of Philox.
        stream: what for: ``Stream.GRADIENT``, or another stream of noise.

    Raises:
        PrivacyError: an argument out of range, or a stream of uniform numbers.

    **Guarantee.** Two calls with the same seed and the same generator share a counter block only where stream, step,
    parameter and element agree, and no call shares one with :func:`uniform`. Elements drawn separately equal the same
    elements drawn together, bit for bit, on one kind of device; between kinds, logarithm and cosine may differ in the
    last bit of float64.

    =============================================  ================================================
    edge case                                      outcome
    =============================================  ================================================
    ``numel`` 0                                    an empty tensor
    ``start`` or the end inside a counter block    the block is drawn, the rest of it dropped
    step, parameter, element, seed out of range    PrivacyError: never wrapped to a counter in use
    a dtype narrower than float32                  PrivacyError: its rounding would show in the sum
    largest magnitude                              sqrt(2 ln 2**53) = 8.57: uniforms have 53 bits
    low bits of floating-point noise               not defended (Mironov 2012); the sums it is added
                                                   to are themselves rounded
    =============================================  ================================================
    """
    if stream not in _NORMAL:
        raise PrivacyError(
            f"normal numbers cannot come from stream {stream!r}",
            remedy="take Stream.GRADIENT, or another stream of noise",
        )
    span = Span(parameter, numel, start)
    return gaussians(seed, step=step, spans=[span], dtype=dtype, device=device, secure=secure, stream=stream)[0]


def gaussians(
    seed: int,
    *,
    step: int,
    spans: Sequence[Span],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    secure: bool = False,
    stream: Stream = Stream.GRADIENT,
) -> list[Tensor]:
    """The same as :func:`gaussian`, one tensor per span; many small spans cost little more than their sum."""
    _check_dtype(dtype)
    outs = [torch.empty(span.numel, dtype=dtype, device=device) for span in spans]
    for i, offset, values in _pieces(seed, step, spans, torch.device(device), secure, stream):
        outs[i][offset : offset + values.numel()].copy_(values)
    return outs


def add_gaussian_(
    tensors: Sequence[Tensor],
    *,
    parameters: Sequence[int],
    std: float,
    seed: int,
    step: int,
    secure: bool = False,
    divisor: float = 1.0,
    starts: Sequence[int] | None = None,
    stream: Stream = Stream.GRADIENT,
) -> None:
    """Add ``std`` times :func:`gaussian` to parameters, in place, without ever holding all of the noise.

    Contiguous tensors are done in one pass over memory, on a GPU in one launch (`native`), unless ``secure``.

    Args:
        tensors: float32 or float64, all on one device and of one dtype; element ``i`` in row-major order gets element
            ``i`` of the noise, whatever the strides.
        parameters: their indices; two may be equal if the elements are different ones.
        std: standard deviation of what is added.
        seed: see :func:`gaussian`.
        step: see :func:`gaussian`.
        secure: see :func:`gaussian`.
        divisor: what the sums are divided by.
        starts: the index, in its whole parameter, of each tensor's first element, for parts of sharded parameters; 0
            by default.
        stream: see :func:`gaussian`.

    Raises:
        PrivacyError: an argument out of range, or elements of a parameter named twice.

    **Guarantee.** Every element of every tensor gets exactly one value, and no value is used for two elements.
    """
    starts = [0] * len(tensors) if starts is None else starts
    spans = _apart(tuple(parameters), tuple(t.numel() for t in tensors), tuple(starts))
    if not tensors:
        return
    dtype, device = tensors[0].dtype, tensors[0].device
    _check_dtype(dtype)
    check_seed(seed, secure=secure)
    check_range("logical step", step, STEPS)
    dense = [i for i, t in enumerate(tensors) if t.is_contiguous()]
    rest = [i for i, t in enumerate(tensors) if not t.is_contiguous()]
    if not secure and native.takes(tensors[i] for i in dense):
        tags = [counter_tag(stream, parameters[i]) for i in dense]
        begin = [starts[i] for i in dense]
        quick = [tensors[i] for i in dense]
        native.mean_(quick, tags=tags, starts=begin, std=std, divisor=divisor, seed=seed, step=step)
        dense = []
    for i, offset, values in _pieces(seed, step, [spans[i] for i in dense], device, secure, stream):
        flat = tensors[dense[i]].view(-1)
        flat[offset : offset + values.numel()].add_(values.to(dtype), alpha=std)
    for i in rest:
        drawn = {"dtype": dtype, "device": device, "secure": secure, "stream": stream}
        (values,) = gaussians(seed, step=step, spans=[spans[i]], **drawn)
        tensors[i].add_(values.view(tensors[i].shape), alpha=std)
    if divisor != 1:
        for i in (*dense, *rest):
            tensors[i].div_(divisor)


@lru_cache(maxsize=64)
def _apart(parameters: tuple[int, ...], sizes: tuple[int, ...], starts: tuple[int, ...]) -> tuple[Span, ...]:
    """Spans, no two of which share an element: looked at once for each list of numbers."""
    spans = tuple(Span(*numbers) for numbers in zip(parameters, sizes, starts, strict=True))
    refuse_twice(spans)
    return spans


def uniform(
    seed: int,
    *,
    step: int,
    stream: Stream,
    numel: int,
    start: int = 0,
    device: torch.device | str = "cpu",
    secure: bool = False,
) -> Tensor:
    """Uniform float64 values ``[numel]`` in [0, 1), multiples of 2**-53: elements ``[start, start + numel)``.

    Args:
        seed: as in :func:`gaussian`.
        step: logical step, in [0, 2**32).
        stream: what for; those of :func:`gaussian` and of discrete noise are kept for these.
        numel: how many elements.
        start: index of the first one.
        device: where.
        secure: ChaCha20 instead of Philox.

    Raises:
        PrivacyError: an argument out of range, or a stream of normal numbers.

    **Guarantee.** Two calls with the same seed and generator share a counter block only where stream, step and element
    agree, and no call shares one with :func:`gaussian`.
    """
    _check_uniform(stream)
    parts = list(_pieces(seed, step, [Span(0, numel, start)], torch.device(device), secure, stream, _unit))
    return torch.cat([v for _, _, v in parts]) if parts else torch.empty(0, dtype=torch.float64, device=device)


def uniforms(seed: int, *, steps: Sequence[int], stream: Stream, numel: int, secure: bool = False) -> Tensor:
    """The first ``numel`` elements of :func:`uniform` at each of n steps, drawn together: float64 ``[n, numel]``."""
    _check_uniform(stream)
    check_seed(seed, secure=secure)
    for step in steps:
        check_range("logical step", step, STEPS)
    generate, key, per_block = _generator(seed, secure)
    blocks = -(-numel // per_block)
    block = torch.arange(blocks, dtype=torch.int64).repeat(len(steps))
    step_n = torch.tensor(steps, dtype=torch.int64).repeat_interleave(blocks)
    tag = torch.full((1,), counter_tag(stream, 0), dtype=torch.int64)
    values = _unit(fractions(generate([block & MASK, block >> 32, step_n, tag], key)))
    return values.view(len(steps), blocks * per_block)[:, :numel]


def uniform_at(seed: int, *, step: int, stream: Stream, places: Tensor, secure: bool = False) -> Tensor:
    """The elements of :func:`uniform` at these places, int64 ``[n]``, in [0, 2**63): float64 ``[n]``."""
    _check_uniform(stream)
    check_seed(seed, secure=secure)
    check_range("logical step", step, STEPS)
    generate, key, per_block = _generator(seed, secure)
    block = places // per_block
    word = lambda value: torch.full((1,), value, dtype=torch.int64)  # noqa: E731
    counter = [block & MASK, block >> 32, word(step), word(counter_tag(stream, 0))]
    values = _unit(fractions(generate(counter, key))).view(-1, per_block)
    return values.gather(1, (places % per_block)[:, None])[:, 0]


def _check_uniform(stream: Stream) -> None:
    if not isinstance(stream, Stream) or stream in _NOISE:
        raise PrivacyError(
            f"uniform numbers cannot come from stream {stream!r}",
            remedy="take another stream, such as Stream.SAMPLING; those of noise are kept for it",
        )


def _generator(seed: int, secure: bool) -> tuple[Callable[..., list[Tensor]], tuple[int, ...], int]:
    """Block function, key, and how many values of 64 bits a block has."""
    if secure:
        return chacha.chacha20, chacha.derive_key(seed), chacha.WORDS // 2
    return philox.philox4x32, (seed & MASK, seed >> 32), philox.WORDS // 2


def _pieces(
    seed: int,
    step: int,
    spans: Sequence[Span],
    device: torch.device,
    secure: bool,
    stream: Stream = Stream.GRADIENT,
    convert: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``(index of the span, offset in it, float64 values)``; spans are drawn together as scratch allows.

    **Guarantee.** Nothing is drawn into a CUDA graph: each of its replays would have the same numbers.
    """
    if device.type == "cuda" and captured():
        raise PrivacyError(
            "random numbers were asked for while a CUDA graph is captured: its replays would all draw the same ones",
            remedy="leave optimizer.step() out of torch.cuda.graph, or call it without; forward and backward may be in",
        )
    check_seed(seed, secure=secure)
    check_range("logical step", step, STEPS)
    convert = convert or box_muller
    generate, key, per_block = _generator(seed, secure)
    work = torch.device("cpu") if device.type == "mps" else device  # no float64 there
    for batch in batches_of(spans, _SCRATCH_CPU if work.type == "cpu" else _SCRATCH):
        blocks, tags = [], []
        for i, first, last in batch:
            low, high = first // per_block, -(-last // per_block)
            tag = counter_tag(stream, spans[i].parameter)
            blocks.append(torch.arange(low, high, dtype=torch.int64, device=work))
            tags.append(torch.full((high - low if len(batch) > 1 else 1,), tag, dtype=torch.int64, device=work))
        block_n, tag_n = torch.cat(blocks), torch.cat(tags)
        step_1 = torch.full((1,), step, dtype=torch.int64, device=work)
        values = convert(fractions(generate([block_n & MASK, block_n >> 32, step_1, tag_n], key)))
        at = 0
        for (i, first, last), lanes in zip(batch, blocks, strict=True):
            begin = at + first % per_block
            yield i, first - spans[i].start, values[begin : begin + last - first].to(device)
            at += lanes.numel() * per_block


def batches_of(spans: Sequence[Span], limit: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut spans into ``(index, first element, last element + 1)`` and group them, ``limit`` elements a group."""
    batch, room = [], limit
    for i, span in enumerate(spans):
        first, end = span.start, span.start + span.numel
        while first < end:
            last = min(end, first + room)
            batch.append((i, first, last))
            room -= last - first
            first = last
            if not room:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


def fractions(words: Sequence[Tensor]) -> Tensor:
    """53 of every 64 bits, as int64 ``[blocks, values per block]`` in [0, 2**53)."""
    return torch.stack([(high << 21) | (low >> 11) for high, low in zip(words[::2], words[1::2], strict=True)], dim=-1)


def _unit(fractions: Tensor) -> Tensor:
    return (fractions.to(torch.float64) * 2.0**-53).view(-1)


def box_muller(fractions: Tensor) -> Tensor:
    """Pairs of integers in [0, 2**53) to pairs of independent standard normals, via uniforms in (0, 1]."""
    uniforms = (fractions + 1).to(torch.float64) * 2.0**-53
    radius = torch.sqrt(-2.0 * torch.log(uniforms[:, 0::2]))
    angle = uniforms[:, 1::2] * (2.0 * math.pi)
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1).view(-1)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise PrivacyError(
            f"noise in {dtype}: it is drawn in float32 or float64 only", remedy="draw float32, add, then cast the sum"
        )
