"""The passes over the joint graph, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from dpcompile._torch.aot import copy_graph
from dpcompile._torch.tensors import real_tensors
from dpcompile.capture.joint import check_outputs, name_joint
from dpcompile.capture.roles import Roles
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Label
from dpcompile.graph.matrix_exp import fold_matrix_exp
from dpcompile.graph.normalise import (
    copy_expanded_bases,
    save_what_is_overwritten,
    slices_for_splits,
    split_convolution_bias,
)
from dpcompile.kernels.fused_rates import FusedRates, measure_fused_rates
from dpcompile.kernels.rates import Rates, rates_for
from dpcompile.lowering.backward import Cut
from dpcompile.options import TWO_PASS, Options
from dpcompile.planning.modes import MODES, without_keeping
from dpcompile.planning.parts import InParts, allowed_parts
from dpcompile.planning.plan import Plan, make_plan
from dpcompile.planning.region_memory import RegionMemory, region_memory
from dpcompile.planning.replay import is_fused, replay
from dpcompile.planning.search import Limit
from dpcompile.planning.shared_uses import Use, uses_of
from dpcompile.planning.step_cost import plain_seconds
from dpcompile.proof.certificate import Certificate, certify
from dpcompile.proof.prove import Proof, prove
from dpcompile.proof.replication import agree_on_rates, check_replication
from dpcompile.proof.scaling import check_scaling
from dpcompile.proof.sites import find_gradients
from dpcompile.proof.unowned import erase_cotangents
from dpcompile.rewriting.rewrite import ClipOptions, rewrite

__all__ = ["Transformed", "privatize"]


@dataclass(frozen=True, slots=True)
class Transformed:
    """What the passes made of one captured graph.

    Attributes:
        graph: a copy of the rewritten joint graph.
        plan: the rule of every gradient site.
        certificate: the proof.
        output_labels: of the forward outputs, in the order of the captured graph.
        sum_slots: parameter name -> position of its clipped sum in the graph's outputs.
        norm_slot: the position of the norms.
        unowned: positions of outputs that depend on no example, with the user's line.
        cut: of a region: what stands where in its backward.
        memory: of a region, where there is a budget.
        uses: of parameters that other regions use too, what is handed out.
        mask: the name of the placeholder of the padding mask.
    """

    graph: fx.GraphModule
    plan: Plan
    certificate: Certificate
    output_labels: tuple[Label, ...]
    sum_slots: Mapping[str, int]
    norm_slot: int
    unowned: Mapping[int, str | None]
    cut: Cut | None = None
    memory: RegionMemory | None = None
    uses: Mapping[str, Use] = field(default_factory=dict)
    mask: str = ""


def privatize(
    module: fx.GraphModule, roles: Roles, options: Options, parts: int | None = None, copied: int = 0
) -> Transformed:
    """Normalise, name, prove, find, plan, rewrite: ``module`` returns clipped sums and norms afterwards.

    Contract: ``module`` is a decomposed joint graph of AOTAutograd, rewritten in place; ``roles`` are those of its
    inputs before :func:`dpcompile.capture.inputs.extend`.

    Args:
        module: see there.
        roles: see there.
        options: see there.
        parts: of how many equal parts of the batch this graph sees one; None: the whole batch, and the plan may ask for
            parts.
        copied: bytes of parameters and inputs that the compiler copies, and keeps for the backward.

    Raises:
        InParts: the plan asks for parts.
        DPCompileError: the model is refused.
    """
    split_convolution_bias(module.graph)
    fold_matrix_exp(module.graph)
    if roles.ranks is not None:
        slices_for_splits(module.graph)
    joint = name_joint(module, roles)
    check_outputs(module, roles)
    proof = prove(joint)
    unowned = erase_cotangents(joint, proof)
    if unowned:
        proof = prove(joint)
    repeats = roles.lowering is None and MODES[options.norm].second_backward
    check_scaling(joint, proof, mean=options.loss_reduction == "mean", twice=repeats)
    gradients = find_gradients(joint, proof)
    check_replication(joint, proof, roles.ranks)
    certificate = certify(joint, proof, gradients)
    device = joint.mask.meta["val"].device
    agree_on_rates(device, roles.ranks)
    rates = rates_for(device)
    twice = roles.lowering is not None and roles.lowering.kind == TWO_PASS
    plan = make_plan(
        gradients,
        batch=joint.batch,
        mode=without_keeping(options.norm) if twice else options.norm,
        rates=rates,
        hints=roles.hints,
        clipping=options.clipping if isinstance(options.clipping, str) else "a function of the user",
        plain_seconds=plain_seconds(joint.graph, roles.hints, rates),
        reuse=options.memory_budget is None and device.type == "cpu",
        fused=_fused_on(device),
        limit=None if roles.lowering else _limit(options.memory_budget, joint, proof, roles, rates, parts, copied),
        untouched=certificate.zero,
        shared=roles.shared,
    )
    if parts is None and plan.parts > 1:
        raise InParts(plan.parts)
    asked = roles.lowering is not None and options.memory_budget is not None
    memory = region_memory(joint, proof, plan, roles.hints) if asked else None
    scale = (parts or 1) if options.loss_reduction == "mean" else None
    clip = ClipOptions(options.clipping, float(options.max_grad_norm), scale)
    rewrite(joint, plan, clip, proof, roles.lowering)
    copy_expanded_bases(module.graph)
    save_what_is_overwritten(module.graph)
    module.recompile()
    labels = tuple(proof.leaving(n) for n in joint.outputs)
    readable = fx.GraphModule(module, copy_graph(module.graph))
    return Transformed(
        readable,
        plan,
        certificate,
        labels,
        joint.sum_slots,
        joint.norm_slot,
        unowned,
        _cut(joint, plan),
        memory,
        uses_of(plan),
        joint.mask.name,
    )


def _cut(joint: JointGraph, plan: Plan) -> Cut | None:
    if joint.weights is None:
        return None
    chosen = plan.rules()
    sums = tuple(joint.sum_slots[name] if name in chosen else None for name in joint.parameters)
    values: Sequence[object] = joint.graph.output_node().args[0]  # type: ignore[assignment]
    return Cut(joint.norm_slot, sums, joint.weights.name, len(values))


def _limit(
    budget: float | int | None,
    joint: JointGraph,
    proof: Proof,
    roles: Roles,
    rates: Rates,
    parts: int | None,
    copied: int,
) -> Limit | None:
    """The budget in bytes, and what it is compared with."""
    if budget is None:
        return None
    part = replay(joint, proof, roles.hints)
    part = replace(part, standing=part.standing + copied)
    plain = part.plain_peak(parts or 1)
    calls = sum(n.op == "call_function" and not is_fused(n) for n in joint.graph.nodes)
    overhead = 2 * calls * rates.call + 3 * part.gradients / rates.traffic
    allowed = allowed_parts(joint, proof) if parts is None else [parts]
    return Limit(part, budget * plain if isinstance(budget, float) else float(budget), allowed, overhead, parts or 1)


def _fused_on(device: torch.device) -> FusedRates | None:
    """What was measured of the fused operators; on a CPU the graph's own products share what they have in common."""
    if device.type != "cuda":
        return None
    with real_tensors():
        return measure_fused_rates(device)
