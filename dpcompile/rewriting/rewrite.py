"""Norm nodes, one clip node per group, and clipped sums in place of the gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from dpcompile.clipping.groups import Clipping, group_of
from dpcompile.clipping.weights import clip_group, own_norms
from dpcompile.graph.insert import JOB, behind, insert, last_of
from dpcompile.graph.joint import JointGraph
from dpcompile.options import Lowering
from dpcompile.planning.plan import Plan
from dpcompile.planning.shared_uses import factor_operands
from dpcompile.proof.functions import proven
from dpcompile.proof.prove import Proof
from dpcompile.rewriting.norm_nodes import Norm, find_norms
from dpcompile.rewriting.sum_nodes import clipped_sums, repeated

__all__ = ["ClipOptions", "rewrite"]


@dataclass(frozen=True, slots=True)
class ClipOptions:
    """What the clip node does.

    Attributes:
        clipping: see :func:`dpcompile.clipping.weights.clip_weights`.
        max_grad_norm: C of the whole gradient; several groups have their own, which the graph is given.
        mean_of: see :func:`dpcompile.clipping.weights.clip_group`, of the graph's examples.
    """

    clipping: Clipping
    max_grad_norm: float
    mean_of: int | None


def rewrite(
    joint: JointGraph, plan: Plan, options: ClipOptions, proof: Proof, lowering: Lowering | None = None
) -> None:
    """Replace every gradient by the clipped sum, and put the norms into the graph's norm slot.

    Contract: ``joint`` has been proved, and ``plan`` has a choice for every gradient that is not identically zero. The
    graph is complete in itself afterwards: run on inputs and cotangents it returns outputs, clipped sums and norms.

    **Guarantee.** The returned gradient of every parameter of the plan is ``sum_i w_i g_i`` with ``w_i`` from
    :func:`dpcompile.clipping.weights.clip_weights` for the norm over all parameters of its group, in float32 or wider;
    no other gradient of a parameter is returned.
    """
    with _marked(joint.graph, "norm"):
        norms = find_norms(joint, plan)
    if lowering is not None:
        _rewrite_region(joint, norms, options, lowering)
        return
    groups: dict[str, list[Norm]] = {}
    for norm in norms:
        groups.setdefault(group_of(options.clipping, norm.choice.gradient.name), []).append(norm)
    outputs = list(joint.graph.output_node().args[0])  # type: ignore[arg-type]
    for slot in joint.gradient_slots.values():  # whatever follows, no unclipped gradient is returned
        outputs[slot] = None
    if norms:
        clipping = proven(options.clipping, norms[0].squared.meta["val"], options.max_grad_norm)
        options = replace(options, clipping=clipping)
    totals: dict[str, fx.Node] = {}
    for group, members in groups.items():
        with _marked(joint.graph, "clip"):
            totals[group], weights = _clip(joint, members, options, group)
        with _marked(joint.graph, "sum"):
            second = repeated(joint, plan, proof, members, weights)
            for norm, value in clipped_sums(joint, members, [weights] * len(members), second):
                outputs[joint.sum_slots[norm.choice.gradient.name]] = value
    with _marked(joint.graph, "norm"):
        outputs[joint.norm_slot] = _reported(joint, list(totals.values()), options)
        if joint.group_slot is not None:
            outputs[joint.group_slot] = _of_groups(joint, totals, options)
    joint.graph.output_node().args = (type(joint.graph.output_node().args[0])(outputs),)  # type: ignore[call-arg]
    _prune(joint.graph)
    joint.module.recompile()


@contextmanager
def _marked(graph: fx.Graph, job: str) -> Iterator[None]:
    """Nodes that are written meanwhile say what they are for: :data:`dpcompile.graph.insert.JOB` in their ``meta``."""
    before = set(graph.nodes)
    yield
    for node in graph.nodes:
        if node not in before:
            node.meta[JOB] = job


def _rewrite_region(joint: JointGraph, norms: Sequence[Norm], options: ClipOptions, lowering: Lowering) -> None:
    """Squared norms ``[parameters, B]`` leave the graph.

    Its input ``joint.weights`` holds the weights in the same shape, or, where the region is clipped at once, the bound
    C of every parameter's group; the weights then arise within the graph.
    """
    given = joint.weights
    assert given is not None
    outputs = list(joint.graph.output_node().args[0])  # type: ignore[arg-type]
    for slot in joint.gradient_slots.values():
        outputs[slot] = None
    rows = {name: i for i, name in enumerate(joint.parameters)}
    known = {n.choice.gradient.name: n.squared for n in norms if not n.choice.shared}

    def stack(given: Tensor, *squared: Tensor) -> Tensor:
        by_name = dict(zip(known, squared, strict=True))
        zero = torch.zeros_like(given[0])
        return torch.stack([by_name[name].to(given.dtype) if name in by_name else zero for name in rows])

    nodes = [given, *known.values()]
    with _marked(joint.graph, "norm"):
        outputs[joint.norm_slot] = insert(joint.graph, behind(joint.graph, nodes), stack, nodes)
    names = [n.choice.gradient.name for n in norms]
    with _marked(joint.graph, "clip"):
        if lowering.groups:
            assert len(known) == len(names), "a parameter that other regions use too is clipped at once"
            weights = _weights_at_once(joint, norms, options, given, lowering.groups, [rows[n] for n in names])
        else:
            point = behind(joint.graph, [given])
            weights = [insert(joint.graph, point, lambda w, i=rows[name]: w[i], [given]) for name in names]
    with _marked(joint.graph, "sum"):
        for norm, value in clipped_sums(joint, norms, weights, {}):
            total = _handed_out(joint, norm, value) if norm.choice.shared else value
            outputs[joint.sum_slots[norm.choice.gradient.name]] = total
    joint.graph.output_node().args = (type(joint.graph.output_node().args[0])(outputs),)  # type: ignore[call-arg]
    _prune(joint.graph)
    joint.module.recompile()


def _weights_at_once(
    joint: JointGraph,
    norms: Sequence[Norm],
    options: ClipOptions,
    bounds: fx.Node,
    group_of_row: Sequence[int],
    rows: Sequence[int],
) -> list[fx.Node]:
    """``[B]`` for every norm, from the norms of its own group and the bound in the rows of that."""
    by_group: dict[int, fx.Node] = {}
    groups = [group_of_row[row] for row in rows]
    for group in dict.fromkeys(groups):
        members = [n.squared for n, g in zip(norms, groups, strict=True) if g == group]

        def clip(mask: Tensor, bounds: Tensor, *squared: Tensor, row: int = rows[groups.index(group)]) -> Tensor:
            found = clip_group(squared, mask, clipping=options.clipping, bound=bounds[row], mean_of=options.mean_of)
            return found[1]

        nodes = [joint.mask, bounds, *members]
        by_group[group] = insert(joint.graph, behind(joint.graph, nodes), clip, nodes)
    return [by_group[g] for g in groups]


def _handed_out(joint: JointGraph, norm: Norm, total: fx.Node) -> fx.Node:
    """A node that holds the clipped sum, and what the norm over several regions is taken of."""
    gradient, nodes = norm.choice.gradient, factor_operands(norm.choice)
    if norm.choice.rule == "whole":
        nodes = [
            insert(joint.graph, behind(joint.graph, [gradient.gradient]), lambda g: g.unsqueeze(0), [gradient.gradient])
        ]
    elif norm.kept is not None:
        nodes = [norm.kept]
    with joint.graph.inserting_after(last_of(joint.graph, [total, *nodes])):
        node = joint.graph.call_function(torch.ops.dpcompile.hand_out.default, (total, nodes))
    node.meta = {"val": total.meta["val"].clone(), "partitioner_tag": "must_be_in_backward"}
    return node


def _clip(joint: JointGraph, members: Sequence[Norm], options: ClipOptions, group: str) -> tuple[fx.Node, fx.Node]:
    """The group's squared norm and its weights, both ``[B]``."""
    given = joint.bounds
    row = joint.groups.index(group) if given is not None else 0

    def clip(mask: Tensor, bounds: Tensor | None, *squared: Tensor) -> tuple[Tensor, Tensor]:
        bound = float(options.max_grad_norm) if bounds is None else bounds[row]
        return clip_group(squared, mask, clipping=options.clipping, bound=bound, mean_of=options.mean_of)

    squared = [n.squared for n in members]
    if given is None:
        nodes = [joint.mask, *squared]
        return insert(joint.graph, behind(joint.graph, nodes), lambda mask, *squared: clip(mask, None, *squared), nodes)
    nodes = [joint.mask, given, *squared]
    return insert(joint.graph, behind(joint.graph, nodes), clip, nodes)


def _of_groups(joint: JointGraph, totals: Mapping[str, fx.Node], options: ClipOptions) -> fx.Node:
    """``[groups, B]``, float64: the norms of the examples' own gradients, group by group; 0 without a gradient."""

    def stack(mask: Tensor, *squared: Tensor) -> Tensor:
        found = {g: own_norms([total], mask, options.mean_of) for g, total in zip(totals, squared, strict=True)}
        rows = [found[g] if g in found else torch.zeros_like(mask) for g in joint.groups]
        return torch.stack(rows).double()

    nodes = [joint.mask, *totals.values()]
    return insert(joint.graph, behind(joint.graph, nodes), stack, nodes)


def _reported(joint: JointGraph, totals: Sequence[fx.Node], options: ClipOptions) -> fx.Node:
    def report(mask: Tensor, *squared: Tensor) -> Tensor:
        return own_norms(squared, mask, options.mean_of)

    nodes = [joint.mask, *totals]
    return insert(joint.graph, behind(joint.graph, nodes), report, nodes)


def _prune(graph: fx.Graph) -> None:
    """Drop what only the unclipped gradients needed; a convolution's backward then makes its input gradient alone."""
    for node in reversed(graph.find_nodes(op="call_function", target=torch.ops._c10d_functional.wait_tensor.default)):
        if not node.users:  # to torch it has an effect
            graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.convolution_backward.default):
        used = {u.args[1] for u in node.users}
        mask = [bool(wanted and i in used) for i, wanted in enumerate(node.args[-1])]  # type: ignore[arg-type]
        node.args = (*node.args[:-1], mask)
        node.meta["val"] = tuple(v if m else None for v, m in zip(node.meta["val"], mask, strict=True))
