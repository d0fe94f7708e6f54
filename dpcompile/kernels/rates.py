"""What the machine does in a second: measured once per machine and kept on disk.

The choice of rules needs ratios only; the predicted times that a plan prints need the rates themselves.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from dpcompile._torch.tensors import real_tensors
from dpcompile.kernels.filter_op import filter_gradients, grouped_convolution
from dpcompile.kernels.measured import place_of, read, seconds, write
from dpcompile.kernels.narrow import narrow_products
from dpcompile.kernels.onednn import has_onednn, multiply_

__all__ = ["Rates", "VARIABLE", "adopt", "measure", "rates_for"]

VARIABLE = "DPCOMPILE_RATES"
_FULL = 0.25  # part of the tiles: with fewer channels than a quarter of them torch's convolution is taken
_QUICKER = 1.1  # how much quicker a library must be to be taken instead of torch's own


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of one device.

    Attributes:
        large: FLOP/s of a large matrix product.
        batched: FLOP/s of many products of one example each, by the library that is quicker.
        summed: FLOP/s of a product over all examples, by the library that is quicker.
        convolution: FLOP/s of a convolution.
        narrow: FLOP/s of a large matrix product in bfloat16.
        narrow_batched: FLOP/s of many products of one example each, of bfloat16 numbers into float32.
        grouped: FLOP/s of a convolution that makes every example's filter gradients.
        filters: FLOP/s of our kernel for these.
        traffic: bytes/s read or written by pointwise kernels.
        fresh: extra bytes/s for the first write to memory that the system has just given.
        call: seconds that starting a kernel takes.
    """

    large: float
    batched: float
    summed: float
    narrow: float
    narrow_batched: float
    convolution: float
    grouped: float
    filters: float
    traffic: float
    fresh: float
    call: float

    @property
    def own_products(self) -> bool:
        """Whether another library than torch's own was quicker."""
        return self.summed > self.large

    def own_filters(self, full: float) -> bool:
        """Whether our kernel makes filter gradients that fill its tiles so far."""
        return full >= _FULL and self.filters > _QUICKER * self.grouped


_TYPICAL = {
    "cpu": Rates(
        large=2e11,
        batched=1.8e11,
        summed=2e11,
        narrow=4e11,
        narrow_batched=3.6e11,
        convolution=2e11,
        grouped=1e11,
        filters=1.8e11,
        traffic=5e10,
        fresh=1e10,
        call=1e-5,
    ),
    "cuda": Rates(
        large=4e13,
        batched=3e13,
        summed=4e13,
        narrow=4e14,
        narrow_batched=3e14,
        convolution=3e13,
        grouped=3e13,
        filters=3e13,
        traffic=2e12,
        fresh=1e15,
        call=5e-6,
    ),
}


_ADOPTED: dict[str, Rates] = {}


def rates_for(device: torch.device) -> Rates:
    """The rates of a device: from disk, else measured (a second) and written there.

    With the environment variable ``DPCOMPILE_RATES=typical`` round figures for a machine of its kind are taken instead,
    so that plans do not depend on the machine; with a path, the rates are read from and written to that file.
    """
    return _ADOPTED.get(device.type) or _rates(device.type, os.environ.get(VARIABLE, ""))


def adopt(device: torch.device, rates: Rates) -> None:
    """Take these for the device from now on: those of another rank, where all have to compute alike."""
    _ADOPTED[device.type] = rates


@lru_cache(maxsize=8)
def _rates(kind: str, setting: str) -> Rates:
    if setting == "typical" or kind not in _TYPICAL:
        return _TYPICAL["cpu" if kind == "cpu" else "cuda"]
    place = Path(setting) if setting else place_of("rates")
    name = _name(kind)
    known = _known(place)
    if name in known:
        return known[name]
    with real_tensors():
        rates = measure(torch.device(kind))
    write(place, name, asdict(rates))
    return rates


def measure(device: torch.device) -> Rates:
    """Time matrix products, copies and first writes, each at its quickest."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    size = 1024 if device.type == "cpu" else 4096
    a, b = draw(size, size), draw(size, size)
    rows, cols = draw(16, 192, 384), draw(16, 192, 384)
    if device.type == "cuda":
        rows, cols = draw(64, 512, 1024), draw(64, 512, 1024)
    source = draw(2**25 if device.type == "cpu" else 2**28)
    target = torch.empty_like(source)
    products = torch.empty(rows.shape[0], rows.shape[2], cols.shape[2], device=device)
    large = 2 * size**3 / seconds(lambda: torch.mm(a, b), device)
    flops = 2 * rows.numel() * cols.shape[2]
    batched = flops / seconds(lambda: torch.bmm(rows.mT, cols, out=products), device)
    summed = large
    if device.type == "cpu" and has_onednn():
        product = torch.empty_like(a)
        own = 2 * size**3 / seconds(lambda: multiply_(a, b, product), device)
        each = flops / seconds(lambda: multiply_(rows.mT, cols, products), device)
        if own > _QUICKER * large and each > _QUICKER * batched:
            batched, summed = each, own
    narrow, narrow_batched = _narrow(a, b, rows, cols, products)
    images = draw(32, 1, 64, 16, 16).to(memory_format=torch.channels_last_3d)
    filters, options = [64, 64, 3, 3], ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    convolved = 2 * images.numel() * 64 * 9
    whole = images.transpose(0, 1)  # one example of 32 images
    convolution = convolved / seconds(lambda: grouped_convolution(whole, whole, filters, *options), device)
    if device.type == "cpu":
        torchs, ours = (
            partial(filter_gradients, images, images, filters, *options, own, True) for own in (False, True)
        )
        grouped, filtered = (convolved / seconds(function, device) for function in (torchs, ours))
    else:
        grouped = convolved / seconds(lambda: grouped_convolution(images, images, filters, *options), device)
        filtered = grouped
    filled = seconds(lambda: target.fill_(1.0), device)
    moved = 2 * source.numel() * 4 / seconds(lambda: torch.mul(source, 2.0, out=target), device)
    newly = seconds(lambda: torch.empty_like(source).fill_(1.0), device)
    few = draw(8)
    call = seconds(lambda: few.add_(1.0), device)
    fresh = source.numel() * 4 / max(newly - filled, 1e-3 * filled)
    return Rates(
        large=large, batched=batched, summed=summed, narrow=narrow, narrow_batched=narrow_batched,
        convolution=convolution, grouped=grouped, filters=filtered, traffic=moved, fresh=fresh, call=call,
    )  # fmt: skip


def _narrow(a: Tensor, b: Tensor, rows: Tensor, cols: Tensor, out: Tensor) -> tuple[float, float]:
    """FLOP/s of ``a @ b`` in bfloat16, and of ``rows^T cols`` of every example into ``out``, float32."""
    a, b, rows, cols = (x.bfloat16() for x in (a, b, rows, cols))

    def products() -> None:
        if a.device.type != "cpu":
            torch.bmm(rows.mT, cols, out_dtype=torch.float32, out=out)
        elif narrow_products(rows, cols, out) is None:
            torch.bmm(rows.float().mT, cols.float(), out=out)

    large = 2 * a.shape[0] ** 3 / seconds(lambda: torch.mm(a, b), a.device)
    return large, 2 * rows.numel() * cols.shape[2] / seconds(products, a.device)


def _name(kind: str) -> str:
    device = torch.cuda.get_device_name() if kind == "cuda" else f"{platform.machine()} {_processor()}"
    precision = torch.get_float32_matmul_precision()
    return f"{kind}: {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())


def _known(place: Path) -> dict[str, Rates]:
    """What the file says of rates; entries of another version say nothing."""
    wanted = {f.name for f in fields(Rates)}
    entries = read(place).items()
    return {n: Rates(**r) for n, r in entries if isinstance(r, dict) and set(r) == wanted and _positive(r.values())}


def _positive(values: Iterable[object]) -> bool:
    return all(isinstance(v, int | float) and v > 0 for v in values)
