"""Whether the operators are faster than torch's matrix products on this machine: measured once, kept on disk."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpcompile.kernels.norms import direct_norm, ghost_norm

__all__ = ["FusedRates", "Measured", "measure_fused_rates", "seconds", "unfused_direct", "unfused_ghost"]

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
    results. To be called outside of tracing: it runs on real tensors. The file is named after the device, the version
    of torch and whether TF32 is allowed, in ``$XDG_CACHE_HOME/dpcompile`` or ``~/.cache/dpcompile``; without a place
    to write it, every process measures anew.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    path = _path(f"{name}-{torch.__version__}-{'tf32' if tf32 else 'ieee'}")
    known = _read(path)
    if known is not None:
        return known
    measured = []
    with torch.no_grad():
        for dtype_name, dtype in _DTYPES.items():
            for sizes in _SHAPES:
                rows, cols = (torch.randn(sizes[0], 1, sizes[1], n, device=device, dtype=dtype) for n in sizes[2:])
                for rule, fused, unfused in (
                    ("direct", direct_norm, unfused_direct),
                    ("ghost", ghost_norm, unfused_ghost),
                ):
                    times = [seconds(lambda f=f: f(rows, cols), device) for f in (fused, unfused)]  # type: ignore[misc]  # noqa: B023
                    measured.append(Measured(rule, dtype_name, sizes, *times))
    rates = FusedRates(name, str(torch.__version__), tuple(measured))
    _write(path, rates)
    return rates


def unfused_direct(rows: Tensor, cols: Tensor) -> Tensor:
    """The product, stored, and one pass over it."""
    product = torch.matmul(rows.float().mT, cols.float())
    return torch.linalg.vector_norm(product, dim=(1, 2, 3)).square()


def unfused_ghost(rows: Tensor, cols: Tensor) -> Tensor:
    """Both Gram matrices, stored, and one pass over them; without a bound for rounding."""
    r, c = (torch.matmul(x, x.mT).flatten(1) for x in (rows.float(), cols.float()))
    return torch.linalg.vecdot(r, c)


def seconds(call: Callable[[], object], device: torch.device, runs: int = 5) -> float:
    """The least time of ``runs`` calls, after one to warm up."""
    times = []
    for _ in range(runs + 1):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _path(name: str) -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "dpcompile" / f"norms-{re.sub(r'[^A-Za-z0-9.+-]+', '_', name)}.json"


def _read(path: pathlib.Path) -> FusedRates | None:
    try:
        kept = json.loads(path.read_text())
        if kept["format"] != _FORMAT:
            return None
        measured = [
            Measured(str(r), str(n), (int(b), int(t), int(p), int(d)), float(fused), float(unfused))
            for r, n, (b, t, p, d), fused, unfused in kept["measured"]
        ]
        return FusedRates(str(kept["device"]), str(kept["torch"]), tuple(measured))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: pathlib.Path, rates: FusedRates) -> None:
    """Whole or not at all: other processes may write the same."""
    rows = [[m.rule, m.dtype, list(m.sizes), m.fused, m.unfused] for m in rates.measured]
    text = json.dumps({"format": _FORMAT, "device": rates.device, "torch": rates.torch, "measured": rows})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        return
