"""Whether tensors still hold what they held: one number for the content of each.

Torch's version counters do not tell: a write through ``.data`` or a NumPy view, by C++ code, or by an operation like
``torch._amp_foreach_non_finite_check_and_unscale_`` (what ``GradScaler`` unscales with) changes none.

Source: the hash NH of Black, Halevi, Krawczyk, Krovetz, Rogaway, "UMAC" (CRYPTO 1999), with fixed keys: against
mistakes, not against somebody who looks for collisions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from dpcompile._torch.tensors import is_fake
from dpcompile.kernels.build import kernel
from dpcompile.kernels.handed import handed

__all__ = ["Content", "different", "fingerprints"]

Content: TypeAlias = "Tensor | int"

_CHUNK = 1 << 20  # words of 32 bits that are worked on at once; keys repeat after as many
_STRIDE, _START, _WORD = 0x9E3779B1, 0x85EBCA6B, 0xFFFFFFFF


def fingerprints(tensors: Sequence[Tensor]) -> list[Content]:
    """For each tensor a number of its bits and their places: int64 ``[]`` on its device, of one on the CPU an int.

    **Guarantee.** Equal for equal bits in equal layouts. A changed, scaled, negated or swapped element changes it, but
    for about one change in 2**32 that happens to leave it. Nothing waits for the device.

    With ``w`` the 32-bit words of a chunk ``c`` of a tensor, and keys ``k_i = START + i * STRIDE`` modulo 2**32: the
    sum over chunks of ``(2c + 1) * sum_i ((w_2i + k_2i) mod 2**32) * ((w_2i+1 + k_2i+1) mod 2**32)``, modulo 2**64.
    """
    found: list[Content] = [0] * len(tensors)
    groups: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tensor.device, []).append(i)
    for device, members in groups.items():
        given = [tensors[i] for i in members]
        library = _library() if device.type == "cpu" else None
        if library is None:
            own = _by_torch([_flat(t.detach()) for t in given], device)
        else:  # the operator is for graphs alone: its dispatch takes longer than small tensors do
            flat = [t if t.is_contiguous() and not t.is_complex() else _flat(t.detach()) for t in given]
            own = contents(flat) if any(map(is_fake, flat)) else _contents(library, flat)
        for i, value in zip(members, own.tolist() if _is_at_hand(own) else own.unbind(), strict=True):
            found[i] = value
    return found


def different(before: Sequence[Content], now: Sequence[Content]) -> list[int]:
    """At which positions two lists of fingerprints differ; waits for their devices."""
    groups: dict[torch.device, list[int]] = {}
    found: list[int] = []
    for i, (earlier, value) in enumerate(zip(before, now, strict=True)):
        if isinstance(value, int):
            if earlier != value:
                found.append(i)
        else:
            groups.setdefault(value.device, []).append(i)
    for members in groups.values():
        differ = _stack([before[i] for i in members]) != _stack([now[i] for i in members])
        if not bool(differ.any()):
            continue
        found += [i for i, d in zip(members, differ.tolist(), strict=True) if d]
    return sorted(found)


def _stack(values: Sequence[Content]) -> Tensor:
    return torch.stack([value for value in values if isinstance(value, Tensor)])


def _is_at_hand(numbers: Tensor) -> bool:
    return numbers.device.type == "cpu" and not is_fake(numbers)


def _flat(tensor: Tensor) -> Tensor:
    """All elements in one dimension, as they lie in memory where they fill it."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order)
    return ordered.view(-1) if ordered.is_contiguous() else tensor.reshape(-1)


@torch.library.custom_op("dpcompile::contents", mutates_args=())
def contents(flat: Sequence[Tensor]) -> Tensor:
    """The numbers of :func:`fingerprints` by the compiled kernel, for contiguous tensors: int64 ``[len(flat)]``."""
    library = _library()
    assert library is not None
    return _contents(library, flat)


def _contents(library: ctypes.CDLL, flat: Sequence[Tensor]) -> Tensor:
    n = len(flat)
    memory = (ctypes.c_void_p * n)(*(t.data_ptr() for t in flat))
    sizes = (ctypes.c_int64 * n)(*(t.numel() * t.element_size() for t in flat))
    found = torch.empty(n, dtype=torch.int64)
    threads = ctypes.c_int(torch.get_num_threads())
    library.dp_content(ctypes.c_int64(n), memory, sizes, ctypes.c_void_p(found.data_ptr()), threads)
    return found


@contents.register_fake
def _(flat: Sequence[Tensor]) -> Tensor:
    """Shapes only."""
    return torch.empty(len(flat), dtype=torch.int64)


def _by_torch(flat: Sequence[Tensor], device: torch.device) -> Tensor:
    """The same numbers in torch operations: small tensors together, large ones in chunks."""
    pieces = [
        (i, chunk, piece)
        for i, tensor in enumerate(flat)
        for chunk, piece in enumerate(_words(tensor).split(_CHUNK))
        if len(piece)
    ]
    found = torch.zeros(len(flat), dtype=torch.int64, device=device)
    keys = _keys(device)
    while pieces:
        taken, size = 0, 0
        while taken < len(pieces) and (not taken or size + len(pieces[taken][2]) <= _CHUNK):
            size += len(pieces[taken][2])
            taken += 1
        batch, pieces = pieces[:taken], pieces[taken:]
        lengths = [len(piece) for _, _, piece in batch]
        words = torch.cat([piece for _, _, piece in batch]).to(torch.int64)
        mixed = (words + torch.cat([keys[:n] for n in lengths])) & _WORD
        sums = (mixed[0::2] * mixed[1::2]).cumsum(0)
        ends = torch.tensor(lengths).cumsum(0).div_(2, rounding_mode="floor") - 1
        sums = sums[handed(ends, device)].diff(prepend=sums.new_zeros(1))
        odd = torch.tensor([2 * chunk + 1 for _, chunk, _ in batch])
        found.index_add_(0, handed(torch.tensor([i for i, _, _ in batch]), device), sums * handed(odd, device))
    return found


def _words(flat: Tensor) -> Tensor:
    """int32, an even number of them: the bits, and zeros behind."""
    size = flat.numel() * flat.element_size()
    if flat.storage_offset() * flat.element_size() % 4:
        flat = flat.clone()
    if size % 8:
        flat = torch.nn.functional.pad(flat.view(torch.uint8), (0, -size % 8))
    return flat.view(torch.int32)


@lru_cache(maxsize=8)
def _keys(device: torch.device) -> Tensor:
    return (torch.arange(_CHUNK, device=device) * _STRIDE + _START) & _WORD


@kernel("content")
def _library(library: ctypes.CDLL) -> bool:
    """Whether it gives what torch operations give, which do the same where there is no kernel."""
    flat = [torch.arange(n, dtype=torch.float32) - 3 for n in (0, 1, 7, 1001)]
    return torch.equal(_contents(library, flat), _by_torch(flat, torch.device("cpu")))
