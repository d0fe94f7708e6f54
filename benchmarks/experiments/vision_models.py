"""ViT tiny to huge and BiT-ResNet 50x1 to 152x4: run where they fit, and sized without content where not."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from benchmarks.bench import Bench
from benchmarks.cases import find_case
from benchmarks.experiments.common import asked, cells, chosen, grid, ratio
from benchmarks.markdown import markdown
from benchmarks.paper_models import VISION
from benchmarks.problem import WithLoss
from dpcompile import dp_compile

TITLE = "ViT and BiT-ResNet, by size"
_BATCHES = (1, 2, 4, 8, 16, 32)
_SIZED = (1, 4)  # two batches tell what an example adds
_GPU, _BOARDS = "a100", {"32 GB": 32e9, "40 GB": 40e9}  # what a V100 and the paper's A100 hold
# See benchmarks.experiments.opacus_models.
PAPERS = (
    "Beside these: Beltran et al. 2024 (arXiv:2406.17298), on V100 with 32 GB and A100 with 40 GB (by the README of "
    "its code), find that plain DP-SGD in Opacus reaches between 1/8 and 1/2.6 of SGD's throughput, and that ghost "
    "clipping about halves this cost (its abstract). Its figures by model: not checked."
)
_SIZES = (
    "Foretold, for images of 224 pixels in float32, by the planner and the data sheet of an {gpu}: nothing of it was "
    "measured, and it says what a step is made of rather than how long it takes. The ratio is non-private over private "
    "time with {batch} images; peaks (non-private, private) are of weights and a step with as many; largest batches "
    "have gradients and Adam's moments beside it, on a line through two batches.\n\n"
)
_RUN = (
    "\nMeasured on this machine, of what fits in {limit:g} GB: images a second, ratio to the non-private compiled step "
    "(milliseconds of the engine's), peak of a step, and the first, cold step.\n\n"
)


def run(bench: Bench) -> dict[str, Any]:
    """Every model sized; then those that fit, over physical batches that do.

    ``--models`` takes some of them (``vit_tiny``, ``bit_50x1``), or points (``vit_tiny:batch=4,image=64``), which are
    run as they are; ``--limit-gb`` is what may be used. ``max_batch`` looks for the largest batch of any of them.
    """
    settings = bench.settings
    names = asked(bench, VISION, list(VISION)[:1] if settings.quick else VISION)
    sized: dict[str, Any] = {}
    for name in tqdm(names, desc="sized without content", unit="model", disable=bench.shop.inline):
        sized[name] = bench.shop.run("benchmarks.experiments.vision_models:sizes", {"name": name})
    points = [p for name in names if "error" not in sized[name] for p in _points(name, sized[name], settings.limit_gb)]
    engines = chosen(bench, ("compiled", "ours", "ours_budget", "opacus_hooks", "opacus_ghost"))
    ran = cells(bench, points, engines, ("time", "memory", "compile"), "ViT and BiT-ResNet")
    return {"gpu": _GPU, "limit_gb": settings.limit_gb, "sized": sized, "ran": ran}


def _points(name: str, found: dict[str, Any], limit_gb: float) -> list[str]:
    """The batches that fit: beside the foretold peak, the oracle holds two more sets of weights in float64."""
    if ":" in name:
        return [name]
    room = limit_gb * 1e9 - 4 * found["bytes"]
    return [f"{name}:batch={b}" for b in _BATCHES if _peak(found, b) <= room]


def _peak(found: dict[str, Any], batch: int, kind: str = "peak") -> float:
    """Bytes of a step with so many examples: from two sizes, on a line."""
    (a, few), (b, more) = ((n, found[str(n)][kind]) for n in _SIZED)
    return few + (batch - a) * (more - few) / (b - a)


def sizes(*, name: str) -> dict[str, Any]:
    """Parameters, and what the planner expects of a step on a GPU by its data sheet, for two batches.

    Nothing is computed: weights and images are on the meta device. Peaks are of float32 weights, their gradients and
    what a step holds, without the optimizer's state.
    """
    family, _, rest = name.partition(":")
    fixed = ",".join(pair for pair in rest.split(",") if pair and not pair.startswith("batch="))
    found: dict[str, Any] = {}
    for batch in _SIZED:
        with torch.device("meta"):
            case = find_case(f"{family}:batch={batch}" + (f",{fixed}" if fixed else ""))
            model, given = WithLoss(case.make(), case.loss), case.data(batch)
        private: Any = dp_compile(model, memory_budget=2**62)
        expected = private.trace(*given, rates=_GPU).prediction
        found |= {"title": case.title, "parameters": sum(p.numel() for p in model.parameters())}
        found["bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
        found[str(batch)] = {
            "plain": expected.plain_seconds, "private": expected.seconds,
            "plain_peak": expected.plain_peak, "peak": expected.peak,
        }  # fmt: skip
    return found


def _row(name: str, found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return [f"`{name}`", found["error"], *[""] * (2 + len(_BOARDS))]
    last = found[str(_SIZED[-1])]
    row = [f"`{name}`", f"{found['parameters'] / 1e6:.1f}M", f"{last['plain'] / last['private']:.2f}"]
    row.append(f"{last['plain_peak'] / 1e9:.2f}, {last['peak'] / 1e9:.2f}")
    for room in _BOARDS.values():
        fits = [int(_largest(found, room, kind)) for kind in ("plain_peak", "peak")]
        row.append(", ".join(map(str, fits)))
    return row


def _largest(found: dict[str, Any], room: float, kind: str) -> float:
    each = _peak(found, 2, kind) - _peak(found, 1, kind)
    state = 3 * found["bytes"]  # gradients, and two moments of Adam's
    return max((room - state - _peak(found, 0, kind)) // max(each, 1.0), 0)


def section(data: dict[str, Any]) -> str:
    """What is foretold, and what was measured."""
    batch = _SIZED[-1]
    text = _SIZES.format(gpu=data["gpu"].upper(), batch=batch)
    head = ["model", "parameters", "ratio", f"GB with {batch} images", *(f"largest in {name}" for name in _BOARDS)]
    text += markdown(head, [_row(name, found) for name, found in data["sized"].items()])
    if data["ran"]:

        def show(cell: dict[str, Any]) -> str:
            allocated, compiled = cell.get("memory", {}).get("allocated"), cell.get("compile", {}).get("seconds")
            parts = [f"{cell['batch'] / cell['times']['minimum']:.1f}/s", ratio(cell)]
            parts += [f"{allocated / 1e6:.0f} MB"] if allocated else []
            return ", ".join(parts + ([f"{compiled:.0f} s"] if compiled else []))

        text += _RUN.format(limit=data["limit_gb"]) + grid(data["ran"], "model", show)
    return f"{text}\n{PAPERS}\n"
