"""float32 against TF32 (CUDA) and bfloat16 autocast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.bench import Bench
from benchmarks.engines import BASELINE, make_engine
from benchmarks.engines.base import Engine
from benchmarks.experiments.common import chosen, grid, ratio
from benchmarks.measure import interleaved, peak_allocated, spread
from benchmarks.oracle import find_truth, how_wrong
from benchmarks.problem import build

TITLE = "float32, TF32, bfloat16"
TOLERANCE = {"float32": 1e-3, "tf32": 2e-2, "bfloat16": 5e-2}
_MODELS = ("vit", "gpt")


def run(bench: Bench) -> dict[str, Any]:
    """Every precision that the device has, in a process of its own per engine and model."""
    names = ["float32", *(["tf32"] if bench.settings.device == "cuda" else []), "bfloat16"]
    models = ("gpt:width=128,context=64",) if bench.settings.quick else _MODELS
    wanted = [(f"{m}, {n}", m, n, e) for m in models for n in names for e in chosen(bench, ("compiled", "ours"))]
    found: dict[str, Any] = {}
    for point, model, name, engine in tqdm(wanted, desc="precision", unit="cell", disable=bench.shop.inline):
        arguments = {"engine": engine, "precision": name, "repeats": bench.settings.repeats}
        arguments |= bench.settings.options(model)
        found.setdefault(point, {})[engine] = bench.shop.run("benchmarks.experiments.precision:pair", arguments)
    return found


def pair(*, engine: str, precision: str, repeats: int, **options: Any) -> dict[str, Any]:
    """Like :func:`benchmarks.jobs.pair`; the answer is compared with the float32 oracle, within :data:`TOLERANCE`."""
    problem = build(options["model"], batch=options["batch"], device=options["device"])
    truth = find_truth(problem)
    problem = replace(problem, max_grad_norm=truth.max_grad_norm)
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    engines = [_in(precision, make_engine(e, problem.again(), **options)) for e in (engine, BASELINE)]
    for made in engines:
        made.step()
    error = how_wrong(engines[0].gradients(), truth, private=engines[0].private)
    if not error <= TOLERANCE[precision]:
        return {"error": f"wrong answer ({error:.1e})"}
    for made in engines:
        made.step()
    mine, base = interleaved([e.step for e in engines], repeats=repeats)
    engines[0].zero()
    found = {"times": spread(mine), "baseline": spread(base), "ratio": min(base) / min(mine), "answer_error": error}
    return found | {"memory": {"allocated": peak_allocated(engines[0].step, options["device"])}}


def _in(precision: str, engine: Engine) -> Engine:
    """The engine with its forward under autocast."""
    if precision == "bfloat16":
        plain = engine.calls
        device = engine.problem.inputs.device.type

        def calls(*tensors: Any) -> Any:
            with torch.autocast(device, torch.bfloat16):
                return plain(*tensors)

        engine.calls = calls
    return engine


def section(data: dict[str, Any]) -> str:
    """Time ratio within each precision."""

    def show(cell: dict[str, Any]) -> str:
        return f"{ratio(cell)}, {cell['memory']['allocated'] / 1e6:.0f} MB, error {cell['answer_error']:.0e}"

    text = "Ratio to the compiled non-private step in the same precision; bfloat16 by autocast. The error is the "
    return text + "answer's, against float32, one backward per example.\n\n" + grid(data, "model", show)
