"""How long a unit of each kind of work takes on this machine: one run for every rate of a plan.

Kinds: products of large matrices by torch ("large"), in full precision where less is allowed ("large, exact"), by
oneDNN ("large, own"), and of bfloat16 ("narrow"); products of one example each, in full precision, likewise ("each",
"each, own", "each, narrow"), of bfloat16 made float32 first ("each, widened"), and in float64 ("each, wide"); a
convolution, one that makes every example's filter gradients, and our kernel for these ("convolution", "grouped",
"filters"); a pointwise kernel, a write to memory that is mapped and to memory that is not ("moved", "written",
"written, fresh"); the start of a kernel ("call").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from dpcompile.kernels.filter_op import filter_gradients, grouped_convolution
from dpcompile.kernels.measured import Stopwatch
from dpcompile.kernels.narrow import has_narrow, narrow_products
from dpcompile.kernels.onednn import has_onednn, multiply_
from dpcompile.kernels.precision import full_precision
from dpcompile.kernels.rounding import FMA, products_on

__all__ = ["least", "paces"]

Run = tuple[str, Callable[[], object], float]


def paces(device: torch.device, stopwatch: Stopwatch) -> dict[str, float]:
    """Seconds per FLOP, per byte or per call, of every kind of work that the device does."""
    found = {}
    for runs in (_products(device), _convolutions(device), _traffic(device)):  # each has memory of its own
        for name, run, work in runs:
            found[name] = stopwatch.seconds(run, device) / work
    return found


def least(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """The least of every kind: what else a machine does makes a run longer, never shorter."""
    return {name: min(p[name] for p in (one, other) if name in p) for name in {**one, **other}}


def _exactly(run: Callable[..., object], *args: Tensor, **kwargs: Tensor) -> None:
    with full_precision():
        run(*args, **kwargs)


def _draw(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, generator=torch.Generator(device).manual_seed(0))


def _products(device: torch.device) -> Iterator[Run]:
    size = 1024 if device.type == "cpu" else 4096
    a, b = _draw(device, size, size), _draw(device, size, size)
    sizes = (64, 512, 1024) if device.type == "cuda" else (16, 192, 384)
    rows, cols = _draw(device, *sizes), _draw(device, *sizes)
    each = torch.empty(sizes[0], sizes[2], sizes[2], device=device)
    large, flops = 2.0 * size**3, 2.0 * rows.numel() * sizes[2]
    yield "large", lambda: torch.mm(a, b), large
    if products_on(device) != FMA:
        yield "large, exact", lambda: _exactly(torch.mm, a, b), large
    yield "each", lambda: _exactly(torch.bmm, rows.mT, cols, out=each), flops
    if device.type == "cpu" and has_onednn():
        product = torch.empty_like(a)
        yield "large, own", lambda: multiply_(a, b, product), large
        yield "each, own", lambda: multiply_(rows.mT, cols, each), flops
    narrow = [x.bfloat16() for x in (a, b, rows, cols)]
    yield "narrow", lambda: torch.mm(narrow[0], narrow[1]), large
    yield "each, widened", lambda: _exactly(torch.bmm, narrow[2].float().mT, narrow[3].float(), out=each), flops
    if device.type != "cpu":
        yield "each, wide", lambda: torch.bmm(rows.double().mT, cols.double()), flops
        yield "each, narrow", lambda: torch.bmm(narrow[2].mT, narrow[3], out_dtype=torch.float32, out=each), flops
    elif has_narrow(torch.bfloat16):
        yield "each, narrow", lambda: narrow_products(narrow[2], narrow[3], each), flops


def _convolutions(device: torch.device) -> Iterator[Run]:
    images = _draw(device, 32, 1, 64, 16, 16).to(memory_format=torch.channels_last_3d)
    filters, options = [64, 64, 3, 3], ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    flops = 2.0 * images.numel() * 64 * 9
    whole = images.transpose(0, 1)  # one example of 32 images
    yield "convolution", lambda: grouped_convolution(whole, whole, filters, *options), flops
    if device.type == "cpu":
        for name, own in (("grouped", False), ("filters", True)):
            yield name, partial(filter_gradients, images, images, filters, *options, own, True), flops
    else:
        yield "grouped", lambda: grouped_convolution(images, images, filters, *options), flops


def _traffic(device: torch.device) -> Iterator[Run]:
    source = _draw(device, 2**25 if device.type == "cpu" else 2**28)
    target, few = torch.empty_like(source), _draw(device, 8)
    size = 4.0 * source.numel()
    yield "moved", lambda: torch.mul(source, 2.0, out=target), 2 * size
    yield "written", lambda: target.fill_(1.0), size
    yield "written, fresh", lambda: torch.empty_like(source).fill_(1.0), size
    yield "call", lambda: few.add_(1.0), 1.0
