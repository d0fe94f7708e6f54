"""The noise as one opaque operation, for compiled steps.

Inductor takes minutes and gigabytes over Philox written out in tensor operations, and constants of a graph end up in
compile caches on disk, where a seed must not be. So the operation is opaque, and seed and step are a tensor's values:
no step recompiles either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpcompile.noise import add_gaussian_, check_seed

__all__ = ["add_gaussian_op_", "seed_words"]

_WORD = 62  # bits of the seed per int64 entry; 5 entries hold 256


def seed_words(seed: int, step: int, *, secure: bool = False) -> Tensor:
    """Seed and logical step as :func:`add_gaussian_op_` takes them: int64 ``[6]`` on the CPU.

    Raises:
        PrivacyError: a seed out of range. (The step is checked where the noise is drawn.)
    """
    check_seed(seed, secure=secure)
    mask = 2**_WORD - 1
    return torch.tensor([step, *((seed >> shift) & mask for shift in range(0, 5 * _WORD, _WORD))], dtype=torch.int64)


@torch.library.custom_op("dpcompile::add_gaussian_", mutates_args=("tensors",))
def add_gaussian_op_(tensors: list[Tensor], parameters: list[int], std: float, words: Tensor, secure: bool) -> None:
    """:func:`dpcompile.noise.add_gaussian_` as an operation that graphs hold whole.

    Args:
        tensors: see there.
        parameters: see there.
        std: see there.
        words: what :func:`seed_words` returned.
        secure: see there.
    """
    step, *seed = words.tolist()
    whole = sum(word << (_WORD * i) for i, word in enumerate(seed))
    add_gaussian_(tensors, parameters=parameters, std=std, seed=whole, step=step, secure=secure)


@add_gaussian_op_.register_fake
def _(tensors: list[Tensor], parameters: list[int], std: float, words: Tensor, secure: bool) -> None:
    """Shapes only: there is no result."""
