"""Matrix products of privacy's own, by the library that is quicker on this machine.

On CPUs torch multiplies float32 matrices by the library that it was built with, MKL most often, which uses half of what
some processors can do. oneDNN is in torch too: where it was measured to be quicker
(:attr:`dpcompile.rates.Rates.summed`), norms and clipped sums are made by it. ``python -m benchmarks.products`` prints
both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpcompile.onednn import multiply_
from dpcompile.rates import rates_for

__all__ = ["own_product", "product", "quicker"]


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, for tracing: an operation of ours where oneDNN is quicker, else torch's.

    Args:
        a: ``[.., M, K]``.
        b: ``[.., K, N]``, of the same leading dimensions and dtype.
    """
    return own_product(a, b) if quicker(a) else torch.matmul(a, b)


def quicker(value: Tensor) -> bool:
    """Whether products of such values are ours."""
    if value.device.type != "cpu" or value.dtype != torch.float32:
        return False
    return rates_for(value.device).own_products


@torch.library.custom_op("dpcompile::product", mutates_args=())
def own_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` by oneDNN, contiguous."""
    result = a.new_empty(*a.shape[:-1], b.shape[-1])
    if a.ndim == 2:
        multiply_(a, b, result)
    else:
        multiply_(a.flatten(0, -3), b.flatten(0, -3), result.flatten(0, -3))
    return result


@own_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    """Shapes only."""
    return a.new_empty(*a.shape[:-1], b.shape[-1])
