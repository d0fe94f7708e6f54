"""Machines that are not there: peak rates from their data sheets, as the rates of a plan.

Nothing here was measured. A rate is the published peak times :data:`PRODUCTS`, :data:`GROUPED` or :data:`TRAFFIC`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dpcompile.errors import DPCompileError
from dpcompile.kernels.rates import Rates

__all__ = ["GROUPED", "MACHINES", "PRODUCTS", "TRAFFIC", "Machine", "machine_of", "rates_of"]

PRODUCTS = 0.7  # part of the peak that products and convolutions of ordinary sizes reach
GROUPED = 0.2  # the same of convolutions with the examples among their groups
TRAFFIC = 0.85  # part of the bandwidth that pointwise kernels reach
_CALL = 5e-6  # seconds that a kernel takes at least
_FRESH = 1e15  # bytes/s: torch hands out memory that it has


@dataclass(frozen=True, slots=True)
class Machine:
    """One GPU: peaks without sparsity, in FLOP/s, bytes/s and bytes.

    Attributes:
        title: its maker's name of it.
        source: where the figures stand.
        float64: products on tensor cores.
        float32: without tensor cores: what products are that are not allowed TF32.
        tf32: on tensor cores.
        bfloat16: on tensor cores, added up in float32; float16 is the same.
        bandwidth: of its memory.
        memory: of it.
    """

    title: str
    source: str
    float64: float
    float32: float
    tf32: float
    bfloat16: float
    bandwidth: float
    memory: float


MACHINES: Mapping[str, Machine] = {
    # "NVIDIA A100 Tensor Core GPU", data sheet, June 2021, column A100 80GB SXM: FP64 Tensor Core 19.5, FP32 19.5,
    # TF32 156 (312 with sparsity), BFLOAT16 312 (624 with sparsity) TFLOPS; 2,039 GB/s; 80 GB.
    "a100": Machine(
        "A100 80GB SXM", "NVIDIA A100 Tensor Core GPU data sheet, 2021",
        19.5e12, 19.5e12, 156e12, 312e12, 2.039e12, 80e9,
    ),
    # "NVIDIA H100 Tensor Core GPU", data sheet, column H100 SXM: FP64 Tensor Core 67, FP32 67, TF32 989 and BFLOAT16
    # 1,979 TFLOPS with sparsity, half of it without; 3.35 TB/s; 80 GB.
    "h100": Machine(
        "H100 SXM", "NVIDIA H100 Tensor Core GPU data sheet, 2024", 67e12, 67e12, 494.5e12, 989.5e12, 3.35e12, 80e9
    ),
    # "NVIDIA H200 Tensor Core GPU", data sheet, column H200 SXM: as H100 SXM; 4.8 TB/s; 141 GB.
    "h200": Machine(
        "H200 SXM", "NVIDIA H200 Tensor Core GPU data sheet, 2024", 67e12, 67e12, 494.5e12, 989.5e12, 4.8e12, 141e9
    ),
}  # fmt: skip


def machine_of(name: str) -> Machine:
    """The machine of this name.

    Raises:
        DPCompileError: there is none.
    """
    if name not in MACHINES:
        raise DPCompileError(
            f"no rates are known of {name!r}",
            remedy=f"use one of {', '.join(map(repr, MACHINES))}; without a name the rates are those of this machine",
        )
    return MACHINES[name]


def rates_of(machine: Machine, *, tf32: bool) -> Rates:
    """What plans take the machine to do.

    Products that privacy adds are those of float32 numbers whatever the model is allowed
    (:mod:`dpcompile.kernels.products`), so ``tf32`` makes the model's own quicker, and no others. Of bfloat16 numbers
    they are at the speed of these where the result is one example's.

    Args:
        machine: the machine.
        tf32: whether the model's products of float32 numbers are allowed TF32
            (``torch.set_float32_matmul_precision("high")``). Its convolutions are, as torch has it by default.
    """
    exact, narrow = PRODUCTS * machine.float32, PRODUCTS * machine.bfloat16
    quick = PRODUCTS * machine.tf32
    return Rates(
        large=quick if tf32 else exact,
        batched=exact,
        summed=exact,
        narrow=narrow,
        narrow_batched=narrow,
        widened=exact,
        wide=PRODUCTS * machine.float64,
        convolution=quick if torch.backends.cudnn.conv.fp32_precision != "ieee" else exact,  # type: ignore[attr-defined]
        grouped=GROUPED * machine.float32,
        filters=GROUPED * machine.float32,
        traffic=TRAFFIC * machine.bandwidth,
        fresh=_FRESH,
        call=_CALL,
    )
