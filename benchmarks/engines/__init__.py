"""All engines by name."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from benchmarks.engines.base import Engine
from benchmarks.problem import Problem
from dpcompile.planning.modes import NORM_MODES

__all__ = ["BASELINE", "ENGINES", "Spec", "budget_for", "make_engine"]

BASELINE = "compiled"
TRANSFORMERS = ("vit", "gpt", "lora")  # how names of transformers begin


@dataclass(frozen=True, slots=True)
class Spec:
    """An engine that can be asked for.

    Attributes:
        title: what tables call it.
        place: "module:class", below ``benchmarks.engines``; imported when used, since a library may be missing.
        options: of the class.
        compiles: whether it takes ``backend`` and ``dynamic``, and has a compile time.
    """

    title: str
    place: str
    options: dict[str, Any] = field(default_factory=dict)
    compiles: bool = False


ENGINES: dict[str, Spec] = {
    "eager": Spec("non-private, eager", "plain:Eager"),
    BASELINE: Spec("non-private, compiled", "plain:Compiled", compiles=True),
    "ours": Spec("dpcompile", "ours:Ours", compiles=True),
    "ours_budget": Spec("dpcompile, memory budget", "ours:Ours", {"memory_budget": "of the model"}, compiles=True),
    "ours_blocks": Spec("dpcompile, regions of blocks", "ours:Ours", {"regions": "blocks"}, compiles=True),
    **{
        f"ours_{mode.replace(' ', '_')}": Spec(f"dpcompile, norm={mode!r}", "ours:Ours", {"norm": mode}, compiles=True)
        for mode in NORM_MODES
        if mode != "auto"
    },
    "opacus_hooks": Spec("Opacus hooks", "opacus:PerSample", {"mode": "hooks"}),
    "opacus_ew": Spec("Opacus ew", "opacus:PerSample", {"mode": "ew"}),
    "opacus_functorch": Spec("Opacus functorch", "opacus:PerSample", {"mode": "functorch"}),
    "opacus_ghost": Spec("Opacus ghost", "opacus:Ghost"),
    "vmap": Spec("compiled vmap(grad)", "functional:VmapGrad", compiles=True),
    "fastdp": Spec("FastDP BK-MixOpt", "fastdp:FastDP"),
    "jax_privacy": Spec("JAX-Privacy", "jax_privacy:JaxPrivacy"),
}


def budget_for(model: str) -> float:
    """The memory budget of the goals: 1.1 for transformers, 1.25 for the others."""
    return 1.1 if model.startswith(TRANSFORMERS) else 1.25


def make_engine(name: str, problem: Problem, model: str, **options: Any) -> Engine:
    """An engine of the table for a problem.

    Args:
        name: of :data:`ENGINES`.
        problem: what to do.
        model: the name of its model.
        options: ``backend`` and ``dynamic`` for engines that compile, ``path`` for FastDP; the rest is ignored by
            those that have no use for it.

    Raises:
        ImportError: the library is not there.
        ValueError: there is no such engine.
    """
    if name not in ENGINES:
        raise ValueError(f"there is no engine {name!r}; there are {', '.join(ENGINES)}")
    spec = ENGINES[name]
    wanted = dict(spec.options)
    if wanted.get("memory_budget") == "of the model":
        wanted["memory_budget"] = budget_for(model)
    if spec.compiles:
        wanted |= {k: v for k, v in options.items() if k in ("backend", "dynamic")}
    if name == "fastdp":
        wanted["path"] = options.get("path")
    module, _, kind = spec.place.partition(":")
    return getattr(importlib.import_module(f"benchmarks.engines.{module}"), kind)(problem, **wanted)
