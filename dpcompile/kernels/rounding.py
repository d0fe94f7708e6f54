"""How far sums of products may be off, whatever the values are, and when a norm can be relied on.

**Guarantee.** Every bound here holds for all values and for every order of additions (Higham 2002, "Accuracy and
Stability of Numerical Algorithms", section 3.1: ``n`` roundings of ``u`` each are off by ``n u / (1 - n u)`` at most).
None is the likely size of an error: a layer can be crafted whose roundings all go one way.

``S`` is the *size* of an example's gradient: the sum over positions of ``|row_t| |col_t|``, which its norm would be if
no two positions cancelled. What rounding moves is a multiple of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CLOSE",
    "FLOOR",
    "FMA",
    "TENSOR_CORE",
    "TINY",
    "WIDE",
    "gamma",
    "gram_unit",
    "linear_slack",
    "products_on",
    "unit_of",
    "with_floor",
]

FMA = "ieee"
TENSOR_CORE = "tensor core"
WIDE = 2.0**-53  # of float64
TINY = 2.0**-126  # products below it may vanish in float32
CLOSE = 9e-4  # a squared norm that is off by no more, relative to itself, is good enough: the bound is then added
_LOST = {FMA: 0.0, "tf32": 2.0**-9, "bf16": 2.0**-7, TENSOR_CORE: 0.0, "tf32x3": 3 * 2.0**-20}
_STEP = {TENSOR_CORE: 16, "tf32x3": 8 / 3}  # terms that a tensor core adds to its sum at once
FLOOR = 2.0**-48  # of the squared size: the square of the unit of the float32 sums that gradients are added up in


def unit_of(dtype: torch.dtype) -> float:
    """What rounding to nearest moves a number by, relative to it."""
    return torch.finfo(dtype).eps / 2


def gamma(roundings: Any, unit: float) -> Any:
    """How far a sum of products may be off, relative to the sum of their absolute values.

    Args:
        roundings: that the term with most of them goes through, a number or a symbol: n, in a sum of n terms in any
            order.
        unit: of one.
    """
    return roundings * unit / (1 - roundings * unit)


def with_floor(squared: Tensor, sizes: Tensor) -> Tensor:
    """Squared norms that are not below what rounding leaves of terms that cancel in a float32 sum.

    One unit of the size is added. It is 2e-5 of a norm that is 1e-5 of the size, and less of all others.

    Args:
        squared: ``[B]``, float64.
        sizes: ``[B]``, the squared sizes ``S**2``.
    """
    return squared + FLOOR * sizes


def linear_slack(squared: Tensor, unit: float, sizes: Tensor) -> Tensor:
    """What squared norms may be off, of gradients that are off by ``unit`` of their size."""
    moved = unit * sizes.sqrt()
    return moved * (2 * squared.sqrt() + moved)


def products_on(device: torch.device) -> str:
    """What torch may make of float32 matrix products on ``device`` now: "ieee", "tf32" or "bf16"."""
    if device.type == "cuda":
        setting = torch.backends.cuda.matmul.fp32_precision
    elif torch.backends.cpu.get_cpu_capability() == "AVX2":
        return FMA  # whatever is allowed, these processors have nothing narrower
    else:
        setting = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return setting if setting in ("tf32", "bf16") else FMA


def gram_unit(width: int, dtype: torch.dtype, products: str) -> float:
    """``u`` such that an inner product of ``width`` terms is off by at most ``u |a| |b|``.

    **Guarantee.** Three errors are added. Operands that lose bits before they are multiplied (both of them by less than
    2**-10 for TF32 that is cut off, 2**-8 for bfloat16) move the result by at most twice that, whatever the values.
    Sums that round to nearest are off by :func:`gamma`. Tensor cores cut off: the running sum then loses up to ``eps``
    in every step.

    Args:
        width: terms of the inner product.
        dtype: of the sums.
        products: "ieee", "tf32" and "bf16" as :func:`products_on` gives them; :data:`TENSOR_CORE` for narrow operands
            whose products are exact; "tf32x3" for float32 operands in three TF32 products.
    """
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        products = FMA
    unit = gamma(width + 2, eps / 2) + _LOST[products]
    if products != FMA:
        unit += eps * (2 + width / _STEP.get(products, 8))
    return unit * 1.001  # the lengths |a| and |b| are rounded themselves
