"""What a plan depends on beside the sites themselves: what was asked for, and what the machine can do."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch

from dpcompile._torch.tensors import real_tensors
from dpcompile.capture.roles import Roles
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.sizes import Size, short
from dpcompile.kernels.data_sheets import machine_of, rates_of
from dpcompile.kernels.fused_rates import FusedRates, measure_fused_rates
from dpcompile.kernels.rates import Rates, rates_for
from dpcompile.kernels.rounding import products_on
from dpcompile.options import TWO_PASS, Options
from dpcompile.planning.modes import without_keeping
from dpcompile.planning.parts import allowed_parts
from dpcompile.planning.replay import is_fused, replay
from dpcompile.planning.search import Limit
from dpcompile.planning.step_cost import plain_seconds
from dpcompile.proof.prove import Proof
from dpcompile.proof.replication import agree_on_rates

__all__ = ["Situation", "situation_of"]


@dataclass(frozen=True, slots=True)
class Situation:
    """What the rules of a graph's parameters are chosen by.

    Attributes:
        batch: B, of one part.
        mode: one of :data:`dpcompile.planning.modes.MODES`; "auto" takes the fastest rules that fit the limit.
        rates: of the machine.
        hints: a value for every symbol.
        clipping: what to print.
        plain_seconds: what the step takes without privacy.
        reuse: whether kept gradients may stay mapped from step to step.
        fused: where the fused operators of :mod:`dpcompile.kernels` are faster; None: nowhere.
        limit: of memory.
        untouched: trainable parameters whose gradient is identically zero.
        shared: parameters that other regions use too (:mod:`dpcompile.planning.shared_uses`).
        machine: what to print of the machine, if it is not the one at hand.
    """

    batch: Size
    mode: str
    rates: Rates
    hints: Mapping[sympy.Symbol, int]
    clipping: str
    plain_seconds: float
    reuse: bool = False
    fused: FusedRates | None = None
    limit: Limit | None = None
    untouched: tuple[str, ...] = ()
    shared: Collection[str] = ()
    machine: str = ""


def situation_of(
    joint: JointGraph,
    proof: Proof,
    roles: Roles,
    options: Options,
    *,
    untouched: Sequence[str],
    parts: int | None,
    copied: int,
) -> Situation:
    """The situation of a captured graph.

    Args:
        joint: proved, not rewritten.
        proof: of it.
        roles: of its inputs.
        options: of the model.
        untouched: trainable parameters whose gradient is identically zero.
        parts: of how many equal parts of the batch the graph sees one; None: that is the plan's to say.
        copied: bytes of parameters and inputs that the compiler copies, and keeps for the backward.
    """
    device = joint.mask.meta["val"].device
    agree_on_rates(device, roles.ranks)
    rates, machine = _rates(device, options.machine)
    twice = roles.lowering is not None and roles.lowering.kind == TWO_PASS
    return Situation(
        batch=joint.batch,
        mode=without_keeping(options.norm) if twice else options.norm,
        rates=rates,
        hints=roles.hints,
        clipping=options.clipping if isinstance(options.clipping, str) else "a function of the user",
        plain_seconds=plain_seconds(joint.graph, roles.hints, rates),
        reuse=options.memory_budget is None and device.type == "cpu",
        fused=_fused_on(device) if options.machine is None else None,
        limit=None if roles.lowering else _limit(options, joint, proof, roles, rates, parts, copied),
        untouched=tuple(untouched),
        shared=roles.shared,
        machine=machine,
    )


def _rates(device: torch.device, named: str | None) -> tuple[Rates, str]:
    """The rates to plan with, and what to print of a machine that is named."""
    if named is None:
        return rates_for(device), ""
    machine, tf32 = machine_of(named), products_on(device) == "tf32"
    products = "TF32" if tf32 else "float32"
    return rates_of(machine, tf32=tf32), f"{machine.title}, {short(machine.memory)}B, float32 products as {products}"


def _limit(
    options: Options,
    joint: JointGraph,
    proof: Proof,
    roles: Roles,
    rates: Rates,
    parts: int | None,
    copied: int,
) -> Limit | None:
    """The budget in bytes, and what it is compared with; of another machine the memory is told without a budget too."""
    budget = options.memory_budget
    if budget is None and options.machine is None:
        return None
    part = replay(joint, proof, roles.hints)
    part = replace(part, standing=part.standing + copied)
    plain = part.plain_peak(parts or 1)
    calls = sum(n.op == "call_function" and not is_fused(n) for n in joint.graph.nodes)
    overhead = 2 * calls * rates.call + 3 * part.gradients / rates.traffic
    if budget is None:
        return Limit(part, math.inf, [parts or 1], overhead, parts or 1)
    allowed = allowed_parts(joint, proof) if parts is None else [parts]
    return Limit(part, budget * plain if isinstance(budget, float) else float(budget), allowed, overhead, parts or 1)


def _fused_on(device: torch.device) -> FusedRates | None:
    """What was measured of the fused operators; on a CPU the graph's own products share what they have in common."""
    if device.type != "cuda":
        return None
    with real_tensors():
        return measure_fused_rates(device)
