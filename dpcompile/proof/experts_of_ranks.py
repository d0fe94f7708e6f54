"""Whether what lies on other ranks is used as the norms of expert parallelism take it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.joint import JointGraph, OfExperts
from dpcompile.graph.locate import where
from dpcompile.graph.sent_products import is_sent
from dpcompile.graph.sizes import is_one
from dpcompile.proof.sites import ParameterGradient

__all__ = ["check_experts", "refuse_other_experts"]

_FORM = "experts of ranks"


def refuse_other_experts(graph: fx.Graph, experts: OfExperts | None) -> None:
    """Rows are sent to ranks that hold this model's experts, and to no others.

    Raises:
        UnsupportedGraphError: naming the operation.
    """
    for node in graph.nodes:
        if node.op == "call_function" and is_sent(node.target):
            group = node.args[-1]
            if experts is None or group != experts.name:
                raise UnsupportedGraphError(
                    "rows are sent to experts on ranks of which it is not known that each has a batch of its own",
                    where=where(node),
                    remedy="mesh = init_device_mesh(device, (ranks // n, n), mesh_dim_names=('edp', 'ep')); "
                    "cut_experts(experts, mesh['ep']); fully_shard(experts, mesh=mesh['edp']), also where edp is 1; "
                    "fully_shard(model, mesh=<all ranks>), without ignored_params; then dp_compile",
                )


def check_experts(
    joint: JointGraph, gradients: Sequence[ParameterGradient], experts: OfExperts | None, shared: frozenset[str]
) -> None:
    """All gradient of experts that were cut comes of sent rows, and none of any other parameter's does.

    Contract: :func:`refuse_other_experts` passed the graph.

    **Guarantee.** If this returns, then the gradient of a cut parameter is the sum, over the examples of all ranks, of
    outer products of the rows that were sent to it, up to a rearrangement; and no other parameter's gradient has a part
    of another rank's examples. So an example's norm over all experts is taken from its own rows, where it lies.

    Args:
        joint: the graph.
        gradients: of its parameters, with their sites.
        experts: which of its inputs are experts; None: none are.
        shared: names of the parameters that other regions use too.

    Raises:
        UnsupportedGraphError: see there.
    """
    if any(n.op == "call_function" and is_sent(n.target) for n in joint.graph.nodes) and is_one(joint.batch):
        raise UnsupportedGraphError(
            "a batch of one example, whose gradient of experts would be made of other ranks' examples too",
            remedy="take a physical batch of two and more examples (or users) on every rank",
        )
    for gradient in gradients:
        sent = [s for s in gradient.sites if s.form == _FORM]
        is_cut = experts is not None and gradient.name in experts.cut
        if (len(sent) != len(gradient.sites)) if is_cut else sent:
            other = next((s for s in gradient.sites if is_cut != (s.form == _FORM)), gradient.sites[0])
            raise UnsupportedGraphError(
                f"parameter '{gradient.name}' lies on this rank as one of its experts, and is used otherwise"
                if is_cut
                else f"parameter '{gradient.name}' lies on all ranks, and rows of other ranks are sent to it",
                where=where(other.operation),
                remedy="multiply with the matrices that cut_experts cut by products_of_experts alone, and send rows to "
                "no others",
            )
        if is_cut and gradient.name in shared:
            raise UnsupportedGraphError(
                f"the experts '{gradient.name}' are used in several places of the model",
                remedy="give each layer experts of its own, or call them once",
            )
