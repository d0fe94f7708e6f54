"""What both kernels need to know of their operands: index width, product precision, tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpcompile.kernels.rounding import FMA, TENSOR_CORE, products_on

__all__ = ["WARPS", "adding", "index_type", "power", "precision", "rounding_of", "widened"]

WARPS = 4


def index_type(*operands: Tensor) -> tl.dtype:
    """int64 where an offset into an operand, or into a tile that reaches beyond its edge, exceeds 2**31 - 1."""
    for operand in operands:
        last = sum((size + 256) * stride for size, stride in zip(operand.shape, operand.stride(), strict=True))
        if last >= 2**31:
            return tl.int64
    return tl.int32


def widened(*operands: Tensor) -> bool:
    """Whether tiles are made float32 before they are multiplied.

    Two dtypes have no common product; and Triton's interpreter would multiply the bits of bfloat16 as integers.
    """
    return len({o.dtype for o in operands}) > 1 or triton.knobs.runtime.interpret  # type: ignore[attr-defined]


def precision(operand: Tensor) -> str:
    """How float32 tiles are multiplied: as IEEE says, or where torch may use TF32, in three TF32 products.

    One would need a bound larger than many norms.
    """
    return FMA if products_on(operand.device) == FMA or torch.version.hip is not None else "tf32x3"


def adding(tile: int, warps: int) -> float:
    """What the square of an element, or the product of two, and the sum over a tile may be off, relative to them."""
    return torch.finfo(torch.float32).eps / 2 * (tile * tile / (32 * warps) + 20)


def rounding_of(operand: Tensor, products: str) -> str:
    """What :func:`dpcompile.kernels.rounding.gram_unit` is to assume for products of this operand."""
    return products if operand.dtype == torch.float32 else TENSOR_CORE


def power(size: int, most: int) -> int:
    """The side of a tile: the next power of two of ``size``, at least 16 (a tensor core's), at most ``most``."""
    return min(most, max(16, 1 << (size - 1).bit_length()))
