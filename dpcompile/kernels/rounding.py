"""How far inner products may be off: which products torch's settings allow, and the bound that follows."""

from __future__ import annotations

import torch

__all__ = ["FMA", "TENSOR_CORE", "gram_unit", "products_on"]

FMA = "ieee"
TENSOR_CORE = "tensor core"
_LOST = {FMA: 0.0, "tf32": 2.0**-9, "bf16": 2.0**-7, TENSOR_CORE: 0.0, "tf32x3": 3 * 2.0**-20}
_STEP = {TENSOR_CORE: 16, "tf32x3": 8 / 3}  # terms that a tensor core adds to its sum at once


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
    Sums that round to nearest are off by ``sqrt(width) eps / 2`` but for improbable alignments of the rounding (Higham
    and Mary 2019, doi:10.1137/18M1226312, theorem 2.4). Tensor cores cut off: the running sum then loses up to ``eps``
    in every step, always in one direction, so that the steps count and not their square root.

    Args:
        width: terms of the inner product.
        dtype: of the sums.
        products: "ieee", "tf32" and "bf16" as :func:`products_on` gives them; :data:`TENSOR_CORE` for narrow operands
            whose products are exact; "tf32x3" for float32 operands in three TF32 products.
    """
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        products = FMA
    unit = eps * max(1.0, width**0.5 / 2) + _LOST[products]
    if products != FMA:
        unit += eps * (2 + width**0.5 / 2 + width / _STEP.get(products, 8))
    return unit * 1.001  # the lengths |a| and |b| are rounded themselves
