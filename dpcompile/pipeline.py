"""The passes over a captured graph, from top to bottom: what becomes of a model is this list.

``DPCOMPILE_TRACE=folder`` writes down what each of them did (:mod:`dpcompile.graph.passes`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from dpcompile._torch.aot import copy_graph
from dpcompile.capture.joint import check_outputs, name_joint
from dpcompile.capture.roles import Roles
from dpcompile.clipping.groups import clip_groups
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Label, Own, as_ranks_own
from dpcompile.graph.matrix_exp import fold_matrix_exp
from dpcompile.graph.normalise import (
    copy_expanded_bases,
    expand_last,
    save_what_is_overwritten,
    slices_for_splits,
    split_convolution_bias,
    sums_of_outer_products,
)
from dpcompile.graph.passes import run_passes
from dpcompile.lowering.backward import Cut
from dpcompile.options import Options
from dpcompile.planning.elsewhere import Planned, moved
from dpcompile.planning.modes import MODES
from dpcompile.planning.parts import InParts
from dpcompile.planning.plan import Plan, make_plan
from dpcompile.planning.region_memory import RegionMemory, region_memory
from dpcompile.planning.shared_uses import Use, uses_of
from dpcompile.planning.situation import situation_of
from dpcompile.proof.between_ranks import refuse_moved_rows
from dpcompile.proof.certificate import Certificate, certify
from dpcompile.proof.experts_of_ranks import check_experts, refuse_other_experts
from dpcompile.proof.prove import Proof, prove
from dpcompile.proof.replication import check_replication, refuse_ranks_own
from dpcompile.proof.scaling import check_scaling
from dpcompile.proof.shared_outputs import labels_of_no_example
from dpcompile.proof.sites import ParameterGradient, find_gradients
from dpcompile.proof.unowned import erase_cotangents
from dpcompile.proof.unsort import unsort
from dpcompile.rewriting.rewrite import ClipOptions, rewrite

__all__ = ["LABEL", "PRIVATIZE", "Transformed", "label_outputs", "privatize"]


@dataclass(slots=True)
class Work:
    """One captured graph on its way, and what the passes behind it found out.

    Attributes:
        module: the decomposed joint graph; rewritten in place.
        roles: of its inputs before :func:`dpcompile.capture.inputs.extend`.
        options: of the model.
        parts: of how many equal parts of the batch this graph sees one; None: the whole batch, and the plan may ask for
            parts.
        copied: bytes of parameters and inputs that the compiler copies, and keeps for the backward.
    """

    module: fx.GraphModule
    roles: Roles
    options: Options
    parts: int | None = None
    copied: int = 0
    joint: JointGraph = field(init=False)
    proof: Proof = field(init=False)
    unowned: dict[int, str | None] = field(init=False)
    gradients: list[ParameterGradient] = field(init=False)
    certificate: Certificate = field(init=False)
    plan: Plan = field(init=False)
    memory: RegionMemory | None = field(init=False, default=None)
    ranks_own: Mapping[int, Own] = field(init=False)

    @property
    def mean(self) -> bool:
        """Whether the loss is a mean over the batch."""
        return self.options.loss_reduction == "mean"

    @property
    def output_labels(self) -> tuple[Label, ...]:
        """Of the forward outputs, in the order of the captured graph, as another graph must know them."""
        own = self.ranks_own
        return tuple(as_ranks_own(self.proof.leaving(n), own.get(i, ())) for i, n in enumerate(self.joint.outputs))

    @property
    def mean_of(self) -> int | None:
        """How many times this graph's examples the losses are that the mean is taken of; None of a sum."""
        return (self.parts or 1) * self.options.examples_per_user if self.mean else None


def normalise(work: Work) -> None:
    """Write every sum over examples as one operation that says so."""
    split_convolution_bias(work.module.graph)
    fold_matrix_exp(work.module.graph)
    expand_last(work.module.graph)
    sums_of_outer_products(work.module.graph)
    if work.roles.ranks is not None:
        slices_for_splits(work.module.graph)


def move_elsewhere(work: Work) -> None:
    """For a machine that need not be there: let every value lie on its GPU."""
    if work.options.machine is not None:
        moved(work.module.graph)


def unsort_rows(work: Work) -> None:
    """Write what is done to sorted rows on the rows in their own order."""
    refuse_moved_rows(work.module.graph)
    refuse_other_experts(work.module.graph, work.roles.experts)
    unsort(work.module.graph, work.roles.hints)


def name(work: Work) -> None:
    """Find out which input is which parameter, example or cotangent, and where each gradient is."""
    joint = name_joint(work.module, work.roles)
    assert joint is not None, "a graph in which something is trained has examples"
    work.joint = joint


def check_returned(work: Work) -> None:
    """Refuse outputs that the user does not get as the graph returns them."""
    check_outputs(work.module, work.roles)


def label(work: Work) -> None:
    """Prove that examples do not mix: a label for every value. Cotangents of no example are erased."""
    work.proof = prove(work.joint, work.options.examples_per_user)
    work.unowned = erase_cotangents(work.joint, work.proof)
    if work.unowned:
        work.proof = prove(work.joint, work.options.examples_per_user)


def check_growth(work: Work) -> None:
    """Refuse gradients that do not grow with the cotangents, where these are divided by B."""
    trained = bool(work.joint.parameters)
    repeats = trained and work.roles.lowering is None and MODES[work.options.norm].second_backward
    check_scaling(work.joint, work.proof, mean=work.mean, twice=repeats)


def find_sites(work: Work) -> None:
    """Find the operations that sum a parameter's gradient over examples: one on every path."""
    work.gradients = find_gradients(work.joint, work.proof)


def check_ranks(work: Work) -> None:
    """Refuse gradients of copied parameters that are not the same on all ranks of tensor parallelism."""
    work.ranks_own = check_replication(work.joint, work.proof, work.roles.ranks)


def check_sent(work: Work) -> None:
    """Refuse rows that go to other ranks' experts but where norms and sums take them to go."""
    check_experts(work.joint, work.gradients, work.roles.experts, work.roles.shared)


def write_certificate(work: Work) -> None:
    """Keep the proof in a form that is printed."""
    work.certificate = certify(work.joint, work.proof, work.gradients)


def choose_rules(work: Work) -> None:
    """Choose how the norm of each parameter's gradients is taken."""
    roles, options = work.roles, work.options
    untouched = work.certificate.zero
    situation = situation_of(
        work.joint, work.proof, roles, options, untouched=untouched, parts=work.parts, copied=work.copied
    )
    work.plan = make_plan(work.gradients, situation)
    if work.parts is None and work.plan.parts > 1:
        raise InParts(work.plan.parts)
    if options.machine is not None:
        raise Planned(work.plan)
    if roles.lowering is not None and options.memory_budget is not None:
        work.memory = region_memory(work.joint, work.proof, work.plan, roles.hints)


def insert_clipping(work: Work) -> None:
    """Put norms, weights and clipped sums in the place of the gradients."""
    options = work.options
    clip = ClipOptions(options.clipping, float(options.max_grad_norm), work.mean_of)
    rewrite(work.joint, work.plan, clip, work.proof, work.roles.lowering)


def repair(work: Work) -> None:
    """Copy what the compiler would write over while it is still needed."""
    copy_expanded_bases(work.module.graph)
    save_what_is_overwritten(work.module.graph)
    work.module.recompile()


_PROVE = (check_returned, label, check_growth)

PRIVATIZE = (
    normalise, move_elsewhere, unsort_rows, name, *_PROVE, find_sites, check_ranks, check_sent, write_certificate,
    choose_rules, insert_clipping, repair,
)  # fmt: skip
LABEL = (*_PROVE, check_ranks)


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
        groups: the clip groups whose bounds are an input, in order.
        present: those of all clip groups in which the graph has a gradient.
        group_slot: the position of the norms of ``groups``.
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
    groups: tuple[str, ...] = ()
    present: tuple[str, ...] = ()
    group_slot: int | None = None


def privatize(
    module: fx.GraphModule, roles: Roles, options: Options, parts: int | None = None, copied: int = 0
) -> Transformed:
    """Run :data:`PRIVATIZE`: ``module`` returns clipped sums and norms afterwards.

    Contract: ``module`` is a decomposed joint graph of AOTAutograd, rewritten in place; ``roles`` are those of its
    inputs before :func:`dpcompile.capture.inputs.extend`.

    Args:
        module: see there.
        roles: see there.
        options: see :class:`Work`, as for the rest.
        parts: see there.
        copied: see there.

    Raises:
        InParts: the plan asks for parts.
        Planned: the plan is for another machine.
        DPCompileError: the model is refused.
    """
    work = run_passes(PRIVATIZE, Work(module, roles, options, parts, copied))
    joint, plan = work.joint, work.plan
    return Transformed(
        fx.GraphModule(module, copy_graph(module.graph)),
        plan,
        work.certificate,
        work.output_labels,
        joint.sum_slots,
        joint.norm_slot,
        work.unowned,
        _cut(joint, plan),
        work.memory,
        uses_of(plan),
        joint.mask.name,
        joint.groups,
        tuple(clip_groups(plan.rules(), options.clipping)),
        joint.group_slot,
    )


def _cut(joint: JointGraph, plan: Plan) -> Cut | None:
    if joint.weights is None:
        return None
    chosen = plan.rules()
    sums = tuple(joint.sum_slots[name] if name in chosen else None for name in joint.parameters)
    values: Sequence[object] = joint.graph.output_node().args[0]  # type: ignore[assignment]
    return Cut(joint.norm_slot, sums, joint.weights.name, len(values))


def label_outputs(
    module: fx.GraphModule, roles: Roles, options: Options
) -> tuple[tuple[Label, ...], Mapping[int, str | None]]:
    """Run :data:`LABEL` on a graph in which nothing is trained: examples do not mix, forward and backward.

    Args:
        module: a decomposed joint graph, or a forward alone where nothing needs a gradient.
        roles: of its inputs.
        options: of the model.

    Returns:
        The labels of the captured graph's outputs; positions of outputs that depend on no example, with the user's
        line.

    **Guarantee.** Outputs lie as labelled, and the gradient of every input with an example axis lies like the input if
    the cotangents of the outputs lie like the outputs.
    """
    refuse_moved_rows(module.graph)
    refuse_other_experts(module.graph, roles.experts)
    unsort(module.graph, roles.hints)
    joint = name_joint(module, roles, trained=False)
    if joint is None:
        refuse_ranks_own(module.graph, roles.ranks)
        return labels_of_no_example(module, roles), {}
    work = Work(module, roles, options)
    work.joint = joint
    run_passes(LABEL, work)
    module.recompile()
    return work.output_labels, work.unowned
