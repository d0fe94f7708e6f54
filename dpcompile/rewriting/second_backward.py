"""A second backward on reweighted cotangents, in the same graph: the published two-pass algorithms.

(Li et al. 2022, arXiv:2110.05679, section 4; Lee and Kifer 2021, arXiv:2009.03106.) It is there to be compared with:
one backward does the same in less time.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from dpcompile.clipping.weights import narrowed
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.insert import insert, last_of
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Examples, Shared
from dpcompile.graph.locate import where
from dpcompile.graph.slices import accumulation_dtype, scaled
from dpcompile.proof.prove import Proof

__all__ = ["repeat_backward"]


def repeat_backward(
    joint: JointGraph, proof: Proof, weights: fx.Node, wanted: Iterable[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Compute ``wanted`` once more, from cotangents that are scaled per example.

    Args:
        joint: the graph.
        proof: of it.
        weights: ``[B]``.
        wanted: values of the backward.

    Returns:
        Value -> its copy, for those of ``wanted`` that depend on a cotangent of the examples.

    Raises:
        UnsupportedGraphError: a cotangent that no example has a part of its own in, as that of a loss that is summed up
            inside the model.
    """
    axes: dict[fx.Node, Examples] = {}
    for tangent, output in joint.tangent_of.items():
        label = proof.of(tangent)
        if isinstance(label, Examples):
            axes[tangent] = label
        elif not (isinstance(label, Shared) and label.zero):
            raise UnsupportedGraphError(
                f"a second backward cannot reweight the cotangent of an output that is {label}",
                where=where(output),
                remedy="return one value per example, or use one backward: norm='book_keeping', 'bk_mixed_ghost'",
            )
    needed = _between(joint.graph, set(axes), set(wanted))
    copies: dict[fx.Node, fx.Node] = {}
    point = last_of(joint.graph, [weights, *joint.graph.nodes])
    if point.op == "output":
        point = point.prev
    for tangent, axis in axes.items():
        copies[tangent] = point = insert(
            joint.graph,
            point,
            lambda value, w, axis=axis: scaled(value, axis, narrowed(w, accumulation_dtype(value.dtype))).to(
                value.dtype
            ),
            [tangent, weights],
        )
        point = last_of(joint.graph, [n for n in joint.graph.nodes if n.op != "output"])
    for node in needed:
        with joint.graph.inserting_after(point):
            point = joint.graph.node_copy(node, lambda n: copies.get(n, n))
        point.meta = {k: v for k, v in node.meta.items() if k in ("val", "tensor_meta", "stack_trace")}
        point.meta["partitioner_tag"] = "must_be_in_backward"
        copies[node] = point
    return {n: copies[n] for n in wanted if n in copies}


def _between(graph: fx.Graph, sources: set[fx.Node], targets: set[fx.Node]) -> list[fx.Node]:
    """The operations from ``sources`` to ``targets``, in graph order."""
    below: set[fx.Node] = set(sources)
    order = [n for n in graph.nodes if n.op == "call_function"]
    for node in order:
        if any(n in below for n in node.all_input_nodes):
            below.add(node)
    above: set[fx.Node] = set()
    for node in reversed(order):
        if node in targets or any(u in above for u in node.users):
            above.add(node)
    return [n for n in order if n in below and n in above]
