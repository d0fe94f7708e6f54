"""Nodes that compute clipped sums, in place of the gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile.clipping.weights import narrowed
from dpcompile.graph.insert import behind, insert
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Examples
from dpcompile.graph.sizes import Size
from dpcompile.graph.slices import scaled
from dpcompile.kernels.by_index import clipped_sums_by_index, has_sums_by_index
from dpcompile.kernels.exact_convolution import filters_gradient
from dpcompile.kernels.kept import FEW, has_operations, weighted_sums
from dpcompile.kernels.products import product
from dpcompile.norms.convolutions import channels_first
from dpcompile.norms.factors import Factored, factored
from dpcompile.norms.per_example import run_operation, run_tail, tail_inputs
from dpcompile.planning.choices import Choice
from dpcompile.planning.plan import Plan
from dpcompile.proof.prove import Proof
from dpcompile.proof.sites import Site
from dpcompile.rewriting.norm_nodes import Norm, sum_dtype, widened
from dpcompile.rewriting.second_backward import repeat_backward

__all__ = ["clipped_sums", "repeated"]


_SMALL = 2**15  # numbers of a gradient: more of them are summed one after the other, as each frees what was kept


def repeated(
    joint: JointGraph, plan: Plan, proof: Proof, members: Sequence[Norm], weights: fx.Node
) -> dict[fx.Node, fx.Node]:
    """What a second backward makes of the sites' operands, where the plan asks for one."""
    if not plan.second_backward:
        return {}
    redone = (m.choice.gradient for m in members if m.kept is None and m.choice.rule != "whole")
    operands = {n for g in redone for s in g.sites for n in s.operation.all_input_nodes}
    return repeat_backward(joint, proof, weights, operands)


def clipped_sums(
    joint: JointGraph, norms: Sequence[Norm], weights: Sequence[fx.Node], second: Mapping[fx.Node, fx.Node]
) -> Iterator[tuple[Norm, fx.Node]]:
    """Each norm's clipped sum, for its row of weights; those of what is kept and small come out of one operation.

    **Guarantee.** The sum is ``sum_i w_i g_i`` of the gradients that the norm was taken of, in float32 or wider; an
    example of weight 0 leaves no trace in it, whatever its values are.

    Args:
        joint: the graph.
        norms: of its parameters.
        weights: ``[B]``, float64, for each of them.
        second: what a second backward made, see :func:`repeated`.
    """
    together: dict[torch.dtype, list[tuple[Norm, fx.Node]]] = {}
    rows = _narrowed(joint, norms, weights)
    for norm, row in zip(norms, rows, strict=True):
        value = None if norm.kept is None else norm.kept.meta["val"]
        if value is None or not has_operations(value.device) or value.dtype != row.meta["val"].dtype:
            yield norm, _clipped_sum(joint, norm, row, second)
        elif value.ndim == 2 or _is_small(value):
            together.setdefault(value.dtype, []).append((norm, row))
        else:
            yield from _weighted_sums(joint, [(norm, row)])
    for members in together.values():
        if len(members) > FEW or any(_is_small(n.kept.meta["val"]) for n, _ in members if n.kept is not None):
            yield from _weighted_sums(joint, members)
        else:
            yield from ((norm, _clipped_sum(joint, norm, row, second)) for norm, row in members)


def _is_small(each: Tensor) -> bool:
    """Of matrices, as Inductor's own loops are as good for vectors."""
    sizes = each.shape[1:]
    return len(sizes) > 1 and all(isinstance(n, int) for n in sizes) and prod(sizes) <= _SMALL


def _narrowed(joint: JointGraph, norms: Sequence[Norm], weights: Sequence[fx.Node]) -> list[fx.Node]:
    """The weights in the dtype of each norm's sum; one node for all that are the same."""
    known: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    keys = [(row, sum_dtype(norm.choice.gradient)) for norm, row in zip(norms, weights, strict=True)]
    for row, dtype in keys:
        if (row, dtype) not in known:
            point = behind(joint.graph, [row])
            known[row, dtype] = insert(joint.graph, point, lambda w, dtype=dtype: narrowed(w, dtype), [row])
    return [known[key] for key in keys]


def _weighted_sums(joint: JointGraph, members: Sequence[tuple[Norm, fx.Node]]) -> Iterator[tuple[Norm, fx.Node]]:
    rows = list(dict.fromkeys(row for _, row in members))
    indices = [rows.index(row) for _, row in members]

    def sums(*values: Tensor) -> list[Tensor]:
        weights = torch.stack(values[: len(rows)]) if len(rows) > 1 else values[0].unsqueeze(0)
        return weighted_sums(weights, indices, values[len(rows) :])

    nodes = [*rows, *(n for m, _ in members if (n := m.kept) is not None)]
    values = insert(joint.graph, behind(joint.graph, nodes), sums, nodes)
    return zip((m for m, _ in members), values, strict=True)


def _clipped_sum(joint: JointGraph, norm: Norm, weights: fx.Node, second: Mapping[fx.Node, fx.Node]) -> fx.Node:
    gradient = norm.choice.gradient
    wanted = sum_dtype(gradient)
    if norm.choice.rule == "whole":
        nodes = [weights, gradient.gradient]
        return insert(joint.graph, behind(joint.graph, nodes), lambda w, g: _weighted_whole(w, g).to(wanted), nodes)
    if norm.kept is not None:
        nodes = [weights, norm.kept]

        def weighted(w: Tensor, each: Tensor) -> Tensor:
            return scaled(each, Examples(0), w).sum(0).to(wanted)

        return insert(joint.graph, behind(joint.graph, nodes), weighted, nodes)
    return _redone_sum(joint, norm.choice, weights, wanted, second)


def _weighted_whole(weights: Tensor, gradient: Tensor) -> Tensor:
    return torch.where(weights == 0, torch.zeros_like(weights), weights * gradient)


def _redone_sum(
    joint: JointGraph,
    choice: Choice,
    weights: fx.Node,
    wanted: torch.dtype,
    second: Mapping[fx.Node, fx.Node],
) -> fx.Node:
    """The original sites and tail, on operands scaled per example, by us or by a second backward."""
    gradient, dtype = choice.gradient, sum_dtype(choice.gradient)
    found = [
        None if second else _by_index(s, joint.batch, joint.mask.meta["val"].device, dtype) for s in gradient.sites
    ]
    sites = list(zip(gradient.sites, found, strict=True))
    needed = dict.fromkeys(n for s, f in sites for n in (s.operation.all_input_nodes if f is None else f.operands))
    operands = [*needed, *(n for n in tail_inputs(gradient) if n not in needed)]

    def redo(w: Tensor, *values: Any) -> Tensor:
        narrow = dict(zip(operands, values, strict=True))
        wide = {n: widened(v, dtype) for n, v in narrow.items()}
        sums = {}
        for site, form in sites:
            if form is not None:
                index, cols = form.build(*(wide[n] for n in form.operands), w.shape[0])
                sums[site.value] = clipped_sums_by_index(w, index, cols.squeeze(1), int(form.sizes[2]))
                continue
            reweighted = any(n in second for n in site.operation.all_input_nodes)
            own = (w != 0).to(w.dtype) if reweighted else w
            patches = factored(site, joint.batch) if choice.patched else None
            sums[site.value] = _weighted_site(site, narrow if site.widens else wide, own, dtype, patches)
        return run_tail(gradient, sums, wide, dtype).to(wanted)

    nodes = [weights, *(second.get(n, n) for n in operands)]
    return insert(joint.graph, behind(joint.graph, nodes), redo, nodes)


def _by_index(site: Site, batch: Size, device: torch.device, dtype: torch.dtype) -> Factored | None:
    """The site as a table that is looked up, where one pass over its cotangents makes its clipped sum."""
    form = factored(site, batch)
    if form is None or form.one_hot != "rows" or not has_sums_by_index(device, dtype):
        return None
    return form if form.bare is None else form.bare


def _weighted_site(
    site: Site, known: Mapping[fx.Node, Any], weights: Tensor, dtype: torch.dtype, patches: Factored | None
) -> Tensor:
    """The site with one operand scaled by the weights, and every example of weight 0 erased from the others.

    A convolution is made as the product of ``patches``, if these are given.
    """
    first = site.linear_operands[0]
    present = (weights != 0).to(weights.dtype)
    values = dict(known)
    for name, axis in site.axes.items():
        node = site.operands[name]
        if name == first:
            values[node] = scaled(known[node], axis, weights)
        elif name in site.linear_operands:
            values[node] = scaled(known[node], axis, present)
    if site.form == "product":
        return product(values[site.operands["self"]], values[site.operands["mat2"]])
    if patches is not None:
        assert patches.last is not None
        rows, cols = patches.last(*(values[n] for n in patches.operands), weights.shape[0])
        total = product(rows.flatten(0, 2).mT, cols.flatten(0, 2))
        return channels_first(total, site.value.meta["val"].shape)
    if site.form == "filters" and site.value is not site.operation and site.value.args[1] == 1:
        cotangent, source = values[site.operands["grad_output"]], values[site.operands["input"]]
        arguments: Any = site.operation.args
        return filters_gradient(cotangent, source, site.value.meta["val"].shape, *arguments[4:10])
    result = run_operation(site.operation, values, dtype)
    return result if site.value is site.operation else result[site.value.args[1]]  # type: ignore[index]
