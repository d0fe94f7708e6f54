"""Whether the operators are faster than torch's matrix products on this machine: measured once, kept on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpcompile.kernels.measured import Stopwatch, place_of, read, write
from dpcompile.kernels.norms import direct_norm, ghost_norm

__all__ = ["FusedRates", "Measured", "measure_fused_rates", "unfused_direct", "unfused_ghost"]

_FORMAT = 1
_SHAPES = [(8, 64, 1024, 1024), (8, 256, 768, 768), (8, 256, 768, 3072), (4, 1024, 1024, 1024), (2, 2048, 512, 512)]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Measured:
    """One comparison: rule, dtype, sizes B, T, P, D (K is 1), seconds of the operator and of plain products."""

    rule: str
    dtype: str
    sizes: tuple[int, int, int, int]
    fused: float
    unfused: float


@dataclass(frozen=True, slots=True)
class FusedRates:
    """What was measured on one device."""

    device: str
    torch: str
    measured: tuple[Measured, ...]

    def faster(self, rule: str, t: float, p: float, d: float, dtype: torch.dtype) -> bool:
        """Whether the operator won at the measured sizes nearest to these; False for other dtypes."""
        name = str(dtype).removeprefix("torch.")
        known = [m for m in self.measured if m.rule == rule and m.dtype == name]
        if not known:
            return False

        def distance(m: Measured) -> float:
            pairs = zip((t, *sorted((p, d))), (m.sizes[1], *sorted(m.sizes[2:])), strict=True)
            return sum(math.log2(max(a, 1) / b) ** 2 for a, b in pairs)

        nearest = min(known, key=distance)
        return nearest.fused < nearest.unfused


def measure_fused_rates(device: torch.device | str) -> FusedRates:
    """Compare operators and plain products on ``device``; what was measured before is read from disk.

    The plain products are timed as a compiler would run them at best: two matrix products, and one pass over their
    results. To be called outside of tracing: it runs on real tensors. They are kept by device, version of torch and
    whether TF32 is allowed; without a place to write (:func:`dpcompile.kernels.measured.place_of`), every process
    measures anew.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    setting = f"{name}, torch {torch.__version__}, {'tf32' if tf32 else 'ieee'}"
    known = _known(setting)
    if known is not None:
        return known
    measured, stopwatch = [], Stopwatch()
    with torch.no_grad():
        for dtype_name, dtype in _DTYPES.items():
            for sizes in _SHAPES:
                rows, cols = (torch.randn(sizes[0], 1, sizes[1], n, device=device, dtype=dtype) for n in sizes[2:])
                for rule, fused, unfused in (
                    ("direct", direct_norm, unfused_direct),
                    ("ghost", ghost_norm, unfused_ghost),
                ):
                    times = [stopwatch.seconds(lambda f=f: f(rows, cols), device) for f in (fused, unfused)]  # type: ignore[misc]  # noqa: B023
                    measured.append(Measured(rule, dtype_name, sizes, *times))
    rates = FusedRates(name, str(torch.__version__), tuple(measured))
    _keep(setting, rates)
    return rates


def unfused_direct(rows: Tensor, cols: Tensor) -> Tensor:
    """The product, stored, and one pass over it."""
    product = torch.matmul(rows.float().mT, cols.float())
    return torch.linalg.vector_norm(product, dim=(1, 2, 3)).square()


def unfused_ghost(rows: Tensor, cols: Tensor) -> Tensor:
    """Both Gram matrices, stored, and one pass over them; without a bound for rounding."""
    r, c = (torch.matmul(x, x.mT).flatten(1) for x in (rows.float(), cols.float()))
    return torch.linalg.vecdot(r, c)


def _known(name: str) -> FusedRates | None:
    """What was measured before; None where nothing was, or in another version."""
    try:
        kept = read(place_of("norms"))[name]
        if kept["format"] != _FORMAT:
            return None
        measured = [
            Measured(str(r), str(n), (int(b), int(t), int(p), int(d)), float(fused), float(unfused))
            for r, n, (b, t, p, d), fused, unfused in kept["measured"]
        ]
        return FusedRates(str(kept["device"]), str(kept["torch"]), tuple(measured))
    except (ValueError, KeyError, TypeError):
        return None


def _keep(name: str, rates: FusedRates) -> None:
    rows = [[m.rule, m.dtype, list(m.sizes), m.fused, m.unfused] for m in rates.measured]
    entry = {"format": _FORMAT, "device": rates.device, "torch": rates.torch, "measured": rows}
    write(place_of("norms"), name, entry)
