"""The ChaCha20 block function, as torch integer arithmetic, and the key a seed stands for.

Source: RFC 8439, sections 2.1 to 2.3. The four words of block counter and nonce are taken as one 128-bit counter, the
same one that `philox` takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["WORDS", "chacha20", "derive_key"]

WORDS = 16
_MASK = 0xFFFFFFFF
_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"
_DOUBLE_ROUNDS = 10


def derive_key(seed: int) -> tuple[int, ...]:
    """The 256-bit key of ``seed`` as eight little-endian words: BLAKE2b of its 32 bytes, personalised.

    Args:
        seed: in [0, 2**256). The key holds no more entropy than the seed does.
    """
    digest = hashlib.blake2b(seed.to_bytes(32, "little"), digest_size=32, person=b"dpcompile noise").digest()
    return tuple(int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4))


def chacha20(counter: Sequence[Tensor], key: Sequence[int] | Sequence[Tensor]) -> list[Tensor]:
    """One ChaCha20 block per counter.

    Args:
        counter: four int64 tensors of values in [0, 2**32), shapes broadcastable to ``[n]``: words 12 to 15 of the
            state (in the RFC's use: block counter, then nonce).
        key: eight integers in [0, 2**32).

    Returns:
        Sixteen int64 tensors ``[n]`` of values in [0, 2**32): the serialised block, word by word.

    **Guarantee.** Each counter enters the state whole, so under one key different counters are different blocks of one
    keystream.
    """
    row_4n = torch.stack(torch.broadcast_tensors(*counter))
    device = row_4n.device
    initial = [_row(_CONSTANTS, device), _row(key[:4], device), _row(key[4:], device), row_4n]
    a, b, c, d = initial
    for _ in range(_DOUBLE_ROUNDS):
        a, b, c, d = _quarter_rounds(a, b, c, d)
        b, c, d = torch.roll(b, -1, 0), torch.roll(c, -2, 0), torch.roll(d, -3, 0)
        a, b, c, d = _quarter_rounds(a, b, c, d)
        b, c, d = torch.roll(b, 1, 0), torch.roll(c, 2, 0), torch.roll(d, 3, 0)
    return [word for row, first in zip((a, b, c, d), initial, strict=True) for word in ((row + first) & _MASK).unbind()]


def _row(words: Sequence[int] | Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.stack([torch.as_tensor(word, dtype=torch.int64, device=device).reshape(1) for word in words])


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four quarter rounds at once, one per entry of the first axis."""
    a = (a + b) & _MASK
    d = _rotate(d ^ a, 16)
    c = (c + d) & _MASK
    b = _rotate(b ^ c, 12)
    a = (a + b) & _MASK
    d = _rotate(d ^ a, 8)
    c = (c + d) & _MASK
    b = _rotate(b ^ c, 7)
    return a, b, c, d


def _rotate(x: Tensor, bits: int) -> Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK
