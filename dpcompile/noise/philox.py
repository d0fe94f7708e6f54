"""Philox4x32-10: a keyed bijection of 128-bit counters, as torch integer arithmetic.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), sections 3.2 and 4.
Fast and statistically sound, not cryptographic: for an adversary who may attack the generator use `chacha`.

Words are 32-bit values held in int64 lanes. No product leaves [0, 2**63), so the result does not lean on what a signed
overflow does on some device or in some compiler. A few counters on the CPU are encrypted by NumPy, in unsigned lanes
that hold a whole product: the same numbers, in half as many operations, each of which starts sooner than torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dpcompile._torch.tensors import is_fake

__all__ = ["WORDS", "philox4x32"]

WORDS = 4
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_FEW = 1 << 12  # counters: of more torch is no slower, and has threads


def philox4x32(counter: Sequence[Tensor], key: Sequence[int] | Sequence[Tensor]) -> list[Tensor]:
    """Encrypt each counter under ``key``.

    Args:
        counter: four int64 tensors of values in [0, 2**32), shapes broadcastable to ``[n]``; low word first.
        key: two integers in [0, 2**32).

    Returns:
        Four int64 tensors ``[n]`` of values in [0, 2**32).

    **Guarantee.** For one key, different counters give different outputs: every round is a bijection of the 128 bits.
    """
    if all(isinstance(k, int) for k in key) and all(_is_few(c) for c in counter):
        return _few(counter, key)  # type: ignore[arg-type]
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def _is_few(words: Tensor) -> bool:
    plain = type(words) is Tensor and words.device.type == "cpu" and not is_fake(words)
    return plain and words.numel() <= _FEW and not torch.compiler.is_compiling()


def _few(counter: Sequence[Tensor], key: Sequence[int]) -> list[Tensor]:
    """The same by NumPy."""
    c0, c1, c2, c3 = (words.detach().numpy().astype(np.uint64) for words in counter)
    m0, m1, mask, half = (np.uint64(n) for n in (*_MULTIPLIERS, _MASK, 32))
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ np.uint64(k0), p1 & mask, (p0 >> half) ^ c3 ^ np.uint64(k1), p0 & mask
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [torch.from_numpy(words.astype(np.int64)) for words in np.broadcast_arrays(c0, c1, c2, c3)]


def _multiply(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product of an odd 32-bit ``m`` and 32-bit lanes ``x``."""
    odd = x & 1
    half = torch.add((x >> 1) * m, odd, alpha=m >> 1)  # floor(m * x / 2) < 2**63; the bit lost is ``odd``, as m is odd
    return half >> 31, ((half & 0x7FFFFFFF) << 1) | odd
