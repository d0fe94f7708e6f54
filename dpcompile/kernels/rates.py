"""What the machine does in a second: measured once per machine and kept on disk (``python -m dpcompile.rates``).

The choice of rules needs ratios only; the predicted times that a plan prints need the rates themselves.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from dpcompile._torch.tensors import real_tensors
from dpcompile.kernels.measured import Stopwatch, place_of, read, write
from dpcompile.kernels.paces import least, paces
from dpcompile.progress import working

__all__ = ["Rates", "VARIABLE", "adopt", "rates_for", "rates_from", "remeasure", "settled"]

VARIABLE = "DPCOMPILE_RATES"
_FULL = 0.25  # part of the tiles: with fewer channels than a quarter of them torch's convolution is taken
_QUICKER = 1.1  # how much quicker a library must be to be taken instead of torch's own
_ENOUGH = 5  # processes that measure while the machine is busy
_FORMAT = 2
_NEEDED = {
    "large",
    "each",
    "narrow",
    "each, widened",
    "convolution",
    "grouped",
    "moved",
    "written",
    "written, fresh",
    "call",
}


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of one device.

    Attributes:
        large: FLOP/s of a large matrix product.
        batched: FLOP/s of many products of one example each, by the library that is quicker.
        summed: FLOP/s of a product over all examples, by the library that is quicker.
        convolution: FLOP/s of a convolution.
        narrow: FLOP/s of a large matrix product in bfloat16.
        narrow_batched: FLOP/s of many products of one example each, of bfloat16 numbers into float32, at the quickest.
        widened: the same of numbers that are made float32 first.
        wide: the same in float64, of float32 numbers.
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
    widened: float
    wide: float
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

    @property
    def narrow_products(self) -> bool:
        """Whether products of narrow numbers are quicker than those of numbers that are widened first."""
        return self.narrow_batched > self.widened

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
        widened=1.8e11,
        wide=9e10,
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
        widened=3e13,
        wide=1.5e13,
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
    """The rates of a device: from disk, else measured (a second or two) and written there.

    Each is from the least time of runs that agree (:class:`dpcompile.kernels.measured.Stopwatch`). On a machine that is
    too busy for that, what was found is kept, and bettered by the next processes, :data:`_ENOUGH` in all.

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
    return rates_from(_measured(kind, Path(setting) if setting else place_of("rates")))


def rates_from(paces: Mapping[str, float]) -> Rates:
    """The rates that follow from :func:`dpcompile.kernels.paces.paces`.

    Another library than torch's own is taken where it is quicker for both kinds of products.
    """
    large, batched = 1 / paces["large"], 1 / paces["each"]
    summed = 1 / paces.get("large, exact", paces["large"])
    if "large, own" in paces:
        own, each = 1 / paces["large, own"], 1 / paces["each, own"]
        if own > _QUICKER * large and each > _QUICKER * batched:
            batched, summed = each, own
    widened = 1 / paces["each, widened"]
    narrow_batched = 1 / paces.get("each, narrow", paces["each, widened"])
    if narrow_batched <= _QUICKER * widened:
        narrow_batched = widened
    fresh = max(paces["written, fresh"] - paces["written"], 1e-3 * paces["written"])
    return Rates(
        large=large, batched=batched, summed=summed, narrow=1 / paces["narrow"],
        narrow_batched=narrow_batched, widened=widened, wide=1 / paces.get("each, wide", 2 / batched),
        convolution=1 / paces["convolution"],
        grouped=1 / paces["grouped"], filters=1 / paces.get("filters", paces["grouped"]), traffic=1 / paces["moved"],
        fresh=1 / fresh, call=paces["call"],
    )  # fmt: skip


def remeasure(device: torch.device) -> None:
    """Forget what is kept of this device and setting, so that it is measured when next asked for."""
    setting = os.environ.get(VARIABLE, "")
    if setting != "typical":
        write(Path(setting) if setting else place_of("rates"), _name(device.type), None)
    _rates.cache_clear()
    _ADOPTED.pop(device.type, None)


def settled(device: torch.device) -> bool:
    """Whether the figures that are kept of this device and setting are final."""
    setting = os.environ.get(VARIABLE, "")
    place = Path(setting) if setting else place_of("rates")
    return setting == "typical" or _kept(place, _name(device.type))[0] >= _ENOUGH


def _measured(kind: str, place: Path) -> dict[str, float]:
    """Paces from disk, if they are final; else measured, and kept with what was measured before.

    They are final once the quickest runs of everything agreed, or after :data:`_ENOUGH` processes tried.
    """
    name = _name(kind)
    tries, kept = _kept(place, name)
    if tries >= _ENOUGH:
        return kept
    stopwatch = Stopwatch()
    with working("measuring how fast this machine is, for plans"), real_tensors():
        found = paces(torch.device(kind), stopwatch)
    found = least(found, kept)
    write(place, name, {"format": _FORMAT, "tries": tries + 1 if stopwatch.busy else _ENOUGH, "paces": found})
    return found


def _kept(place: Path, name: str) -> tuple[int, dict[str, float]]:
    """How often it was measured, and what was found; 0 where the file says nothing, or is of another version."""
    entry = read(place).get(name)
    if not isinstance(entry, dict) or entry.get("format") != _FORMAT:
        return 0, {}
    found, tries = entry.get("paces"), entry.get("tries")
    if not isinstance(found, dict) or not set(found) >= _NEEDED or not _positive(found.values()):
        return 0, {}
    return (tries, found) if isinstance(tries, int) and tries > 0 else (0, {})


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


def _positive(values: Iterable[object]) -> bool:
    return all(isinstance(v, int | float) and v > 0 for v in values)
