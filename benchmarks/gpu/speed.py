"""Time, memory and the largest batch on the device, against compiled non-private training and Opacus."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.engines import BASELINE, make_engine
from benchmarks.experiments import max_batch, precision
from benchmarks.problem import build
from benchmarks.worker import describe

__all__ = ["largest", "times", "waits"]

Steps = dict[str, Callable[[], Mapping[str, Any]]]


def times(models: Mapping[str, str], precisions: Sequence[str], options: Mapping[str, Any], repeats: int) -> Steps:
    """Every model in every precision: ours and, where it is there, Opacus' ghost clipping, beside the plain step.

    Args:
        models: what to call it -> its name.
        precisions: of :data:`benchmarks.experiments.precision.TOLERANCE`.
        options: of engines.
        repeats: turns at least.
    """
    engines = ["ours", *(["opacus_ghost"] if importlib.util.find_spec("opacus") else [])]

    def one(model: str, name: str, engine: str) -> Callable[[], Mapping[str, Any]]:
        def take() -> Mapping[str, Any]:
            torch.compiler.reset()
            before = torch.get_float32_matmul_precision()
            try:
                given = {"model": model, "batch": None, **options}
                found = precision.pair(engine=engine, precision=name, repeats=repeats, **given)
            except Exception as error:
                if engine == "ours":
                    raise
                return {"error": describe(error)}  # of a peer: nothing of ours is wrong
            finally:
                torch.set_float32_matmul_precision(before)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            if "error" in found:
                return {"error": found["error"], **({"right": False} if engine == "ours" else {})}
            return {
                "ms": 1e3 * found["times"]["minimum"],
                "plain ms": 1e3 * found["baseline"]["minimum"],
                "ratio": found["ratio"],
                "MB": found["memory"]["allocated"] / 1e6,
                "error of the sums": found["answer_error"],
                "right": True,
            }

        return take

    return {f"{t}, {n}, {e}": one(m, n, e) for t, m in models.items() for n in precisions for e in engines}


def largest(models: Mapping[str, str], options: Mapping[str, Any], limit_gb: float, tries: int) -> Steps:
    """The largest batch of the plain step, and of ours with a memory budget and without."""

    def one(model: str, engine: str) -> Callable[[], Mapping[str, Any]]:
        def take() -> Mapping[str, Any]:
            given = {"model": model, "batch": None, **options}
            found = max_batch.largest(engine=engine, limit_gb=limit_gb, tries=tries, **given)
            return {"batch": found["batch"], "probes": len(found["probes"])}

        return take

    return {f"{t}, {e}": one(m, e) for t, m in models.items() for e in (BASELINE, "ours", "ours_budget")}


def waits(model: str, options: Mapping[str, Any]) -> Steps:
    """How often one private step waits for the device, as torch sees it; a GPU alone can tell."""

    def take() -> Mapping[str, Any]:
        if not torch.cuda.is_available():
            return {"waits": "only a GPU can tell"}
        torch.compiler.reset()
        engine = make_engine("ours", build(model, device="cuda"), model=model, **options)
        for _ in range(2):
            engine.step()
            engine.update()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                engine.step()
                engine.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {"waits": sum("synchroniz" in str(w.message) for w in seen)}

    return {model: take}
