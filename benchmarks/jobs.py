"""What worker processes do for the main table: each function runs in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.engines import BASELINE, ENGINES, make_engine
from benchmarks.engines.base import Engine
from benchmarks.measure import interleaved, peak_allocated, peak_resident, seconds_of, spread
from benchmarks.oracle import Truth, find_truth, how_wrong
from benchmarks.problem import Problem, build

__all__ = ["compile_time", "memory", "oracle", "pair", "ready", "sections"]


def oracle(*, model: str, batch: int | None, device: str, truth: str) -> dict[str, Any]:
    """Find the right answer and store it in the file ``truth``."""
    problem = build(model, batch=batch, device=device)
    found = find_truth(problem)
    found.save(truth)
    parameters = list(problem.model.parameters())
    return {
        "title": problem.case.title,
        "batch": problem.batch,
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "max_grad_norm": found.max_grad_norm,
        "tolerance": found.tolerance,
        "clipped": (found.norms > found.max_grad_norm).float().mean().item(),
    }


def ready(name: str, problem: Problem, truth: Truth, options: dict[str, Any]) -> tuple[Engine, float]:
    """An engine after its first step, and how wrong that was."""
    engine = make_engine(name, problem, **options)
    engine.step()
    return engine, how_wrong(engine.gradients(), truth, private=engine.private)


def pair(*, engine: str, repeats: int, truth: str, update: bool = False, **options: Any) -> dict[str, Any]:
    """The engine's answer, then its time and the non-private compiled step's, by turns.

    Args:
        engine: by name.
        repeats: turns at least.
        truth: the file with the right answer.
        update: time noise and optimizer with the gradient step, on both sides.
        **options: of the model and the engine.

    Returns:
        ``answer_error``, and unless it is too large ``times`` and ``baseline`` (seconds), ``ratio`` (of the minima),
        ``ratio_median``, and ``sections``.
    """
    right = Truth.load(truth)
    problem = build(
        options["model"], batch=options["batch"], max_grad_norm=right.max_grad_norm, device=options["device"]
    )
    other = problem.again()
    mine, error = ready(engine, problem, right, options)
    result: dict[str, Any] = {"answer_error": error}
    if not error <= right.tolerance:
        return {**result, "error": f"wrong answer ({error:.1e})"}
    if engine == BASELINE:
        times = interleaved([_timed(mine, update)], repeats=repeats)
        base = times[0]
    else:
        baseline, base_error = ready(BASELINE, other, right, options)
        if not base_error <= right.tolerance:
            return {**result, "error": f"the baseline's answer is wrong ({base_error:.1e})"}
        steps = [_timed(made, update) for made in (mine, baseline)]
        for step in steps:
            step()
        times = interleaved(steps, repeats=repeats)
        base = times[1]
    result |= {"times": spread(times[0]), "baseline": spread(base)}
    result["ratio"] = result["baseline"]["minimum"] / result["times"]["minimum"]
    result["ratio_median"] = result["baseline"]["median"] / result["times"]["median"]
    try:
        result["sections"] = sections(mine, repeats)
    except Exception as failure:  # a peer's optimizer must not cost the figures that are there
        result["sections_error"] = f"{type(failure).__name__}: {failure}"
    return result


def _timed(engine: Engine, update: bool) -> Callable[[], None]:
    """What is timed: the gradient step, or all of a training step."""

    def whole() -> None:
        engine.step()
        engine.update()

    return whole if update else engine.step


def sections(engine: Engine, repeats: int) -> dict[str, float]:
    """Minimum seconds of forward, backward, clip, and noise with optimizer step where the engine has it."""
    names = ("zero", "forward", "backward", "clip", "update")
    times: dict[str, list[float]] = {n: [] for n in names}
    has_update = True
    for _ in range(repeats):
        loss: list[Any] = []
        run: dict[str, Callable[[], Any]] = {
            "zero": engine.zero,
            "forward": lambda loss=loss: loss.append(engine.forward()),
            "backward": lambda loss=loss: engine.backward(loss.pop()),
            "clip": engine.clip,
            "update": engine.update,
        }
        for name in names[: 5 if has_update else 4]:
            try:
                times[name].append(seconds_of(run[name]))
            except NotImplementedError:
                has_update = False
    return {n: min(t) for n, t in times.items() if t}


def memory(*, engine: str, truth: str, **options: Any) -> dict[str, Any]:
    """Peak memory of one engine's gradient step, above the level before it, in bytes."""
    bound = Truth.load(truth).max_grad_norm
    problem = build(options["model"], batch=options["batch"], max_grad_norm=bound, device=options["device"])
    made = make_engine(engine, problem, **options)
    for _ in range(2):
        made.step()
    made.release()
    resident = peak_resident(made.step)
    made.release()
    peak = getattr(made, "peak", None)
    return {
        "allocated": peak() if peak else peak_allocated(made.step, options["device"]),
        "resident": resident,
        "parameters": sum(p.numel() * p.element_size() for p in problem.model.parameters()),
    }


def compile_time(*, engine: str, **options: Any) -> dict[str, Any]:
    """Seconds of the first step in a process whose caches are empty, after something small was compiled."""
    if not ENGINES[engine].compiles:
        return {"error": "does not compile"}
    small = make_engine(BASELINE, build("tiny", device=options["device"]), **{**options, "model": "tiny"})
    small.step()
    torch.compiler.reset()
    problem = build(options["model"], batch=options["batch"], device=options["device"])
    made = make_engine(engine, problem, **options)
    return {"seconds": seconds_of(made.step)}
