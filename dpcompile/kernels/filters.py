"""The C++ kernel of `kernels/cpp/filters.cpp`: every example's gradient of a convolution's filters, norm and size.

oneDNN makes them as one convolution with the examples among the groups, for which every operand is copied, and whose
channels are padded example by example.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from dpcompile.kernels.build import kernel

__all__ = ["Geometry", "additions", "fullness", "gradients_", "has_kernel", "takes"]

_ROWS, _LANES = 8, 16  # of a tile, at most
_BLOCK = 128  # places that the kernel adds up from zero, its PLACES
_TASKS = 4  # for each thread, so that none waits long for the last


@dataclass(frozen=True, slots=True)
class Geometry:
    """Filters, and where they look: one number for each of up to three dimensions of space.

    Attributes:
        shape: of the filters, ``[filters, channels of a group, *kernel]``.
        stride: of the filters.
        padding: zeros on both sides of the image.
        dilation: of the filters.
        groups: of channels and filters.
    """

    shape: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


def fullness(geometry: Geometry) -> float:
    """The part of the kernel's work that is not on empty places of its tiles; 0 where it cannot be used."""
    if len(geometry.shape) > 5 or len(geometry.shape) < 3:
        return 0.0
    filters, channels = geometry.shape[0] // geometry.groups, geometry.shape[1]
    joined = geometry.groups == 1 and geometry.dilation[-1] == 1
    length = channels * geometry.shape[-1] if joined else channels
    return filters * length / (_ceil(filters, _ROWS) * _ceil(length, _LANES))


def _ceil(number: int, step: int) -> int:
    return _ceil_div(number, step) * step


def _ceil_div(number: int, step: int) -> int:
    return -(-number // step)


def additions(frames: int, places: Sequence[int]) -> int:
    """How many roundings a term of :func:`gradients_` goes through at most: in its own block, then all blocks.

    Args:
        frames: of an example.
        places: what the filter looks at, along each dimension of space.
    """
    lines = prod(places[:-1])
    block = max(1, _BLOCK // places[-1])
    return block * places[-1] + frames * _ceil_div(lines, block) + 1


def has_kernel() -> bool:
    """Whether there is a compiler, and what the kernel gave was right."""
    return _library() is not None


def takes(*tensors: Tensor) -> bool:
    """Whether :func:`gradients_` can work on these."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() for t in tensors) and has_kernel()


def gradients_(images: Tensor, cotangents: Tensor, geometry: Geometry, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Write every example's gradient of the filters to ``out``, if it is there.

    Contract: :func:`takes`.

    **Guarantee.** The norms are those of what is written, in float64; no term goes through more than
    :func:`additions`.

    Args:
        images: ``[B, F, channels, *spatial]``, any strides.
        cotangents: ``[B, F, filters, *places]``, the same.
        geometry: of the filters; for a transposed convolution, what it takes are the cotangents, and what it gives the
            images.
        out: ``[B, filters, *kernel, channels of a group]``, contiguous.

    Returns:
        Squared norms and squared sizes (:mod:`dpcompile.kernels.rounding`), both ``[B]``, float64.
    """
    library = _library()
    assert library is not None
    return _gradients(library, images, cotangents, geometry, out)


def _gradients(
    library: ctypes.CDLL, images: Tensor, cotangents: Tensor, geometry: Geometry, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not _fits(images, cotangents, geometry):
        raise ValueError(f"{geometry} on images {tuple(images.shape)} and cotangents {tuple(cotangents.shape)}")
    batch, threads = images.shape[0], torch.get_num_threads()
    sizes = _sizes(images, cotangents, geometry)
    filters = geometry.shape[0] // geometry.groups
    parts = min(-(-_TASKS * threads // batch), geometry.groups * -(-filters // _ROWS))
    parts = 1 if batch >= _TASKS * threads else max(parts, 1)
    workspace = library.dp_filter_workspace
    workspace.restype = ctypes.c_int64
    work = torch.zeros(threads, workspace(sizes))
    norms, lengths = (torch.empty(n, dtype=torch.float64) for n in (batch * parts, batch))
    memory = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (work, out, norms, lengths)]
    inputs = [ctypes.c_void_p(x.data_ptr()) for x in (images, cotangents)]
    library.dp_filter_gradients(*inputs, sizes, ctypes.c_int64(parts), *memory, ctypes.c_int(threads))
    return norms.view(batch, parts).sum(1), lengths


def _fits(images: Tensor, cotangents: Tensor, geometry: Geometry) -> bool:
    """Whether every filter looks at the image from every place: the kernel reads and writes without asking."""
    filters, channels, *kernel = geometry.shape
    lengths = images.shape[3:], cotangents.shape[3:], kernel, geometry.stride, geometry.padding, geometry.dilation
    if any(len(x) != len(kernel) for x in lengths) or images.shape[:2] != cotangents.shape[:2]:
        return False
    inside = all(
        (places - 1) * stride + dilation * (size - 1) < image + 2 * padding and min(stride, dilation, padding + 1) > 0
        for image, places, size, stride, padding, dilation in zip(*lengths, strict=True)
    )
    named = images.shape[2] == channels * geometry.groups and cotangents.shape[2] == filters
    return inside and named and filters % geometry.groups == 0


def _sizes(images: Tensor, cotangents: Tensor, geometry: Geometry) -> ctypes.Array[ctypes.c_int64]:
    """The kernel's `Sizes`: dimensions of space that are missing have length 1."""
    missing = 5 - len(geometry.shape)

    def space(numbers: Sequence[int], missed: int) -> list[int]:
        return [missed] * missing + list(numbers)

    def strides(value: Tensor) -> list[int]:
        return [*value.stride()[:3], *space(value.stride()[3:], 0)]

    numbers = [*images.shape[:3], geometry.shape[0], geometry.groups]
    for lengths in (images.shape[3:], cotangents.shape[3:], geometry.shape[2:], geometry.stride):
        numbers += space(lengths, 1)
    numbers += [*space(geometry.padding, 0), *space(geometry.dilation, 1), *strides(images), *strides(cotangents)]
    return (ctypes.c_int64 * len(numbers))(*numbers)


@kernel("filters", contract=True)
def _library(library: ctypes.CDLL) -> bool:
    """Whether gradients of small integers, which are exact, come out."""
    images = torch.arange(2 * 2 * 3 * 6 * 5).remainder(7).float().reshape(2, 2, 3, 6, 5)
    cotangents = torch.arange(2 * 2 * 9 * 3 * 4).remainder(5).float().reshape(2, 2, 9, 3, 4)
    geometry = Geometry([9, 3, 3, 2], [2, 1], [1, 0], [1, 1], 1)
    found = torch.full((2, 9, 3, 2, 3), torch.nan)
    norms, sizes = _gradients(library, images, cotangents, geometry, found)
    padded = torch.nn.functional.pad(images, [0, 0, 1, 1])
    seen = padded.unfold(3, 3, 2).unfold(4, 2, 1)  # [B, F, channels, *places, *kernel]
    wanted = torch.einsum("nfcpqhw,nfopq->nohwc", seen, cotangents)
    alone, _ = _gradients(library, images, cotangents, geometry, None)
    squared = wanted.square().flatten(1).sum(1).double()
    lengths = seen.double().square().sum((2, 5, 6)).sqrt() * cotangents.double().square().sum(2).sqrt()
    sized = torch.allclose(sizes, lengths.flatten(1).sum(1).square(), rtol=1e-12)
    return sized and torch.equal(found, wanted) and torch.equal(norms, squared) and torch.equal(alone, squared)
