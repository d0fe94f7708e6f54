"""The passes over the joint graph, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from dpcompile._torch import copy_graph
from dpcompile.axis import Label, Shared
from dpcompile.capture import Roles, check_outputs, name_joint
from dpcompile.certificate import Certificate, certify
from dpcompile.clipping import Clipping
from dpcompile.cost import rates_for
from dpcompile.joint import JointGraph
from dpcompile.lower import Cut
from dpcompile.matrix_exp import fold_matrix_exp
from dpcompile.memory import budget_in_bytes
from dpcompile.normalise import copy_expanded_bases, save_what_is_overwritten, split_convolution_bias
from dpcompile.plan import Plan, make_plan
from dpcompile.proof import prove
from dpcompile.rewrite import ClipOptions, rewrite
from dpcompile.sites import find_gradients
from dpcompile.unowned import erase_cotangents

__all__ = ["Options", "Transformed", "privatize"]


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked of :func:`dpcompile.dp_compile`; its docstring explains each."""

    max_grad_norm: float
    clipping: Clipping
    norm: str
    in_dims: Any
    loss_reduction: str
    backend: str
    dynamic: bool | None
    memory_budget: float | int | None
    check: bool
    regions: str | None = None


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
        cut: in the deferred lowering, where the backward is cut in two.
    """

    graph: fx.GraphModule
    plan: Plan
    certificate: Certificate
    output_labels: tuple[Label, ...]
    sum_slots: Mapping[str, int]
    norm_slot: int
    unowned: Mapping[int, str | None]
    cut: Cut | None = None


def privatize(module: fx.GraphModule, roles: Roles, options: Options) -> Transformed:
    """Normalise, name, prove, find, plan, rewrite: ``module`` returns clipped sums and norms afterwards.

    Contract: ``module`` is a decomposed joint graph of AOTAutograd, rewritten in place; ``roles`` are those of its
    inputs before :func:`dpcompile.capture.extend`.
    """
    split_convolution_bias(module.graph)
    fold_matrix_exp(module.graph)
    joint = name_joint(module, roles)
    check_outputs(module, roles)
    proof = prove(joint)
    unowned = erase_cotangents(joint, proof)
    if unowned:
        proof = prove(joint)
    gradients = find_gradients(joint, proof)
    certificate = certify(joint, proof, gradients)
    plan = make_plan(
        gradients,
        batch=joint.batch,
        mode=options.norm,
        rates=rates_for(joint.mask.meta["val"].device.type),
        hints=roles.hints,
        clipping=options.clipping if isinstance(options.clipping, str) else "a function of the user",
        budget=budget_in_bytes(options.memory_budget, joint, roles.hints),
        untouched=certificate.zero,
    )
    clip = ClipOptions(options.clipping, float(options.max_grad_norm), options.loss_reduction == "mean")
    rewrite(joint, plan, clip)
    copy_expanded_bases(module.graph)
    save_what_is_overwritten(module.graph)
    module.recompile()
    labels = tuple(proof.of(n) if n is not None else Shared() for n in joint.outputs)
    readable = fx.GraphModule(module, copy_graph(module.graph))
    return Transformed(
        readable, plan, certificate, labels, joint.sum_slots, joint.norm_slot, unowned, _cut(joint, plan)
    )


def _cut(joint: JointGraph, plan: Plan) -> Cut | None:
    if joint.weights is None:
        return None
    chosen = plan.rules()
    sums = tuple(joint.sum_slots[name] if name in chosen else None for name in joint.parameters)
    values: Sequence[object] = joint.graph.output_node().args[0]  # type: ignore[assignment]
    return Cut(joint.norm_slot, sums, joint.weights.name, len(values))
