"""Matrix products of privacy's own: in full precision, by the library that is quicker on this machine.

On CPUs torch multiplies float32 matrices by the library that it was built with, MKL most often, which uses half of what
some processors can do. oneDNN is in torch too: where it was measured to be quicker
(:attr:`dpcompile.kernels.rates.Rates.summed`), norms and clipped sums are made by it. ``python -m benchmarks.products``
prints both.

**Guarantee.** Whatever ``torch.set_float32_matmul_precision`` allows a model, products of ours are those of float32
numbers: a clipped sum in bfloat16 or TF32 is not the sum that norms were taken for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpcompile.kernels.onednn import multiply_
from dpcompile.kernels.operators import operator
from dpcompile.kernels.precision import full_precision
from dpcompile.kernels.rates import rates_for

__all__ = ["BLOCK", "blocked_product_", "own_product", "product", "product_", "quicker"]

BLOCK = 128  # terms that :func:`blocked_product_` adds up at a time
_SMALL = 1 << 15  # multiplications that torch is done with before oneDNN has looked its code up


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, for tracing: an operation of ours for float32, else torch's.

    Args:
        a: ``[.., M, K]``.
        b: ``[.., K, N]``, of the same leading dimensions and dtype.
    """
    return own_product(a, b) if a.dtype == torch.float32 else torch.matmul(a, b)


def quicker(value: Tensor) -> bool:
    """Whether products of such values are oneDNN's."""
    if value.device.type != "cpu" or value.dtype != torch.float32:
        return False
    return rates_for(value.device).own_products


def product_(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write ``a @ b`` to ``out``, contiguous: ``[M, K]`` and ``[K, N]``, or ``[B, M, K]`` and ``[B, K, N]``."""
    with full_precision():
        if a.numel() * b.shape[-1] > _SMALL and quicker(a):
            multiply_(a, b, out)
        else:
            torch.matmul(a, b, out=out)


def blocked_product_(a: Tensor, b: Tensor, out: Tensor, block: int = BLOCK) -> int:
    """:func:`product_` with the terms added up in blocks, and these sums then: rounding has less to add up.

    Args:
        a: see there.
        b: see there.
        out: see there.
        block: terms of one; up to twice as many are one block too.

    Returns:
        How many roundings a term goes through at most.
    """
    terms = a.shape[-1]
    if terms <= 2 * block:
        product_(a, b, out)
        return terms + 1
    part = torch.empty_like(out)
    for start in range(0, terms, block):
        own = slice(start, min(terms, start + block))
        product_(a[..., own], b[..., own, :], part if start else out)
        if start:
            out.add_(part)
    return block + -(-terms // block) + 1


@operator("product")
def own_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in full precision, contiguous."""
    result = a.new_empty(*a.shape[:-1], b.shape[-1])
    if a.ndim <= 3:
        product_(a, b, result)
    else:
        product_(a.flatten(0, -3), b.flatten(0, -3), result.flatten(0, -3))
    return result


@torch.library.register_fake("dpcompile::product")
def _(a: Tensor, b: Tensor) -> Tensor:
    """Shapes only."""
    return a.new_empty(*a.shape[:-1], b.shape[-1])
