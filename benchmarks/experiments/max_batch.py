"""The largest physical batch that fits."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from benchmarks.bench import Bench
from benchmarks.engines import ENGINES, make_engine
from benchmarks.experiments.common import asked, chosen, title
from benchmarks.markdown import markdown
from benchmarks.measure import peak_allocated
from benchmarks.paper_models import PAPER, VISION
from benchmarks.problem import build

TITLE = "Largest physical batch"
_MODELS = ("gpt:context=256", "cnn")


def run(bench: Bench) -> dict[str, Any]:
    """For every engine, one process that looks for it; ``--models`` may name models of the papers instead."""
    models = asked(bench, [*PAPER, *VISION], _MODELS[:1] if bench.settings.quick else _MODELS)
    usual = ("compiled", "ours") if bench.settings.quick else [e for e in ENGINES if e not in ("eager", "jax_privacy")]
    wanted = [(m, e) for m in models for e in chosen(bench, usual)]
    found: dict[str, Any] = {}
    for model, engine in tqdm(wanted, desc="largest batch", unit="cell", disable=bench.shop.inline):
        arguments = {"engine": engine, "limit_gb": bench.settings.limit_gb} | bench.settings.options(model)
        found.setdefault(model, {})[engine] = bench.shop.run("benchmarks.experiments.max_batch:largest", arguments)
    return {"limit_gb": bench.settings.limit_gb, "device": bench.settings.device, "models": found}


def largest(*, engine: str, limit_gb: float, tries: int = 8, **options: Any) -> dict[str, Any]:
    """Look for the largest batch whose step stays below the limit (CPU), or runs at all (CUDA).

    Doubling until it does not fit, then halving the interval until it is 5% wide or ``tries`` are used up.

    Returns:
        ``batch``, and ``probes``: ``[batch, bytes]`` of every try, bytes None where it ran out of memory.
    """
    probes: list[list[int | None]] = []

    def fits(batch: int) -> bool:
        used = _bytes_needed(engine, batch, options)
        probes.append([batch, used])
        return used is not None and (options["device"] == "cuda" or used <= limit_gb * 1e9)

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
        if high > 2**20:
            break
    while high - low > max(1, 0.05 * low) and len(probes) < tries + 12:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return {"batch": low, "probes": probes}


def _bytes_needed(engine: str, batch: int, options: dict[str, Any]) -> int | None:
    """Weights and the peak of a step; None if the device's memory was not enough."""
    torch.compiler.reset()
    try:
        problem = build(options["model"], batch=batch, device=options["device"])
        made = make_engine(engine, problem, **{**options, "dynamic": False})
        made.step()
        made.zero()
        weights = sum(p.numel() * p.element_size() for p in problem.model.parameters())
        return weights + peak_allocated(made.step, options["device"])
    except torch.OutOfMemoryError:
        return None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def section(data: dict[str, Any]) -> str:
    """A row per engine."""
    limit = "until the device's memory is full" if data["device"] == "cuda" else f"within {data['limit_gb']:g} GB"
    models = data["models"]
    engines = list(next(iter(models.values())))
    rows = [
        [title(e), *(str(found[e]["error"] if "error" in found[e] else found[e]["batch"]) for found in models.values())]
        for e in engines
    ]
    text = f"Weights and peak of a step {limit}; found by bisection, to 5%.\n\n"
    return text + markdown(["engine", *(f"`{m}`" for m in models)], rows)
