"""Memory of a model in regions: what each of its lowerings holds, and which one a budget asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy

from dpcompile.graph.joint import JointGraph
from dpcompile.graph.sizes import short
from dpcompile.planning.plan import Plan
from dpcompile.planning.replay import bytes_of, replay, storage_of
from dpcompile.proof.prove import Proof

__all__ = ["Peaks", "RegionMemory", "describe", "peaks_of", "region_memory"]


@dataclass(frozen=True, slots=True)
class RegionMemory:
    """Bytes of one region.

    Attributes:
        inputs: of the examples, that it is given: what a checkpoint keeps.
        saved: what waits for its backward.
        held: what the deferred lowering keeps from its backward until the weights are known.
        gradients: of its parameters.
        plain: at the peak of its forward and backward, without privacy.
        first: the same with norms, and ``held`` arising.
        twice: the same with norms, and nothing held.
    """

    inputs: float
    saved: float
    held: float
    gradients: float
    plain: float
    first: float
    twice: float


@dataclass(frozen=True, slots=True)
class Peaks:
    """Bytes at the peak of the step: without privacy, deferred, and in two passes."""

    plain: float
    deferred: float
    twice: float


def region_memory(joint: JointGraph, proof: Proof, plan: Plan, hints: Mapping[sympy.Symbol, int]) -> RegionMemory:
    """Of the region with this graph, before it is rewritten."""
    played = replay(joint, proof, hints)
    holdings = [c.holding for c in plan.choices]
    light = [replace(h, operands={}, kept=0.0, scratch=h.kept + h.scratch) for h in holdings]
    nodes = {n.name: n for n in joint.graph.nodes}
    owners = {storage_of(nodes[o]) for h in holdings for o in h.operands}
    return RegionMemory(
        sum(bytes_of(n, hints) for n in joint.example_axes if n is not joint.mask),
        played.saved + played.derived,
        sum(bytes_of(n, hints) for n in owners if n not in joint.parameters.values()) + sum(h.kept for h in holdings),
        played.gradients,
        played.plain_peak() - played.standing,
        played.peak(holdings) - played.standing,
        played.peak(light) - played.standing,
    )


def describe(peaks: Peaks, allowed: float, *, two_pass: bool, obstacle: str = "") -> str:
    """What was chosen, for the printed plan; ``obstacle`` is why there cannot be two passes."""
    chosen, other = (peaks.twice, peaks.deferred) if two_pass else (peaks.deferred, peaks.twice)
    names = ("two passes", "one backward") if two_pass else ("one backward", "two passes")
    over = "" if chosen <= allowed else ", over the budget"
    against = f"; no two passes: {obstacle}" if obstacle and over else ""
    return (
        f"lowering: {names[0]}; peak {short(chosen)}B{over}, {names[1]} {short(other)}B, without privacy "
        f"{short(peaks.plain)}B; the budget is {short(allowed)}B{against}"
    )


def peaks_of(regions: Sequence[tuple[RegionMemory, bool, bool]], standing: float) -> Peaks:
    """Of the whole step.

    Args:
        regions: in the order of the forward: their memory, whether their forward runs again in the backward, and
            whether they are clipped at once.
        standing: bytes of parameters and inputs of the model.

    Gradients are counted whole, also where FSDP reduces them to shards.
    """
    waiting = [r.inputs if recompute else r.saved for r, recompute, _ in regions]
    plain = deferred = twice = sum(waiting)
    behind_plain = behind = gradients = 0.0
    for i in range(len(regions) - 1, -1, -1):
        region, _, at_once = regions[i]
        before = sum(waiting[:i])
        plain = max(plain, before + region.plain + behind_plain)
        deferred = max(deferred, before + region.first + behind)
        twice = max(twice, sum(waiting) - waiting[i] + region.twice + gradients)
        behind_plain += region.gradients
        behind += region.gradients if at_once else region.held
        gradients += region.gradients
    # At the end sums take the place of what was held for them, region by region.
    held = behind
    for region, _, at_once in regions[::-1]:
        if not at_once:
            deferred = max(deferred, held + region.gradients)
            held += region.gradients - region.held
    return Peaks(
        standing + max(plain, gradients), standing + max(deferred, gradients), standing + max(twice, gradients)
    )
