"""Norm nodes, one clip node per group, and clipped sums in place of the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile.axis import Examples
from dpcompile.clipping import Clipping, clip_group, group_bound, group_of, own_norms, prove_function
from dpcompile.cost import DIRECT_TILES
from dpcompile.errors import UnsupportedGraphError
from dpcompile.insert import insert, last_of
from dpcompile.joint import JointGraph
from dpcompile.kernels.lowering import fused_norm, fusible
from dpcompile.locate import where
from dpcompile.lowering import Lowering
from dpcompile.norms.factors import factored
from dpcompile.norms.ghost import Sides, direct, ghost, ghost_of_gram, merge, outer
from dpcompile.norms.instantiate import per_example_site, run_operation, run_tail, tail_inputs, through_tail
from dpcompile.norms.kept_op import FEW, norms_of_vectors, weighted_sums
from dpcompile.norms.product_op import product_with_norms, squared_norms
from dpcompile.norms.slices import accumulation_dtype, scaled
from dpcompile.plan import Choice, Plan
from dpcompile.proof import Proof
from dpcompile.second_backward import repeat_backward
from dpcompile.shared_uses import factor_operands
from dpcompile.sites import ParameterGradient, Site
from dpcompile.sizes import Size

__all__ = ["ClipOptions", "rewrite"]


@dataclass(frozen=True, slots=True)
class ClipOptions:
    """What the clip node does.

    Attributes:
        clipping: see :func:`dpcompile.clipping.clip_weights`.
        max_grad_norm: C of the whole gradient; with several groups each gets ``C / sqrt(groups)``.
        mean_of: see :func:`dpcompile.clipping.clip_group`, of the graph's examples.
    """

    clipping: Clipping
    max_grad_norm: float
    mean_of: int | None


@dataclass(frozen=True, slots=True)
class _Norm:
    choice: Choice
    squared: fx.Node  # [B], of the gradients as they stand in the graph; of rule "later" the mask, which nobody reads
    kept: fx.Node | None  # [B, *parameter shape]


def rewrite(
    joint: JointGraph, plan: Plan, options: ClipOptions, proof: Proof, lowering: Lowering | None = None
) -> None:
    """Replace every gradient by the clipped sum, and put the norms into the graph's norm slot.

    Contract: ``joint`` has been proved, and ``plan`` has a choice for every gradient that is not identically zero. The
    graph is complete in itself afterwards: run on inputs and cotangents it returns outputs, clipped sums and norms.

    **Guarantee.** The returned gradient of every parameter of the plan is ``sum_i w_i g_i`` with ``w_i`` from
    :func:`dpcompile.clipping.clip_weights` for the norm over all parameters of its group, in float32 or wider; no other
    gradient of a parameter is returned.
    """
    norms = _norms(joint, plan)
    if lowering is not None:
        _rewrite_region(joint, norms, options, lowering)
        return
    groups: dict[str, list[_Norm]] = {}
    for norm in norms:
        groups.setdefault(group_of(options.clipping, norm.choice.gradient.name), []).append(norm)
    outputs = list(joint.graph.output_node().args[0])  # type: ignore[arg-type]
    for slot in joint.gradient_slots.values():  # whatever follows, no unclipped gradient is returned
        outputs[slot] = None
    if norms:
        prove_function(options.clipping, norms[0].squared.meta["val"], options.max_grad_norm, joint.batch)
    bound = group_bound(options.max_grad_norm, len(groups))
    totals = []
    for members in groups.values():
        total, weights = _clip(joint, members, options, bound)
        totals.append(total)
        second = _repeated(joint, plan, proof, members, weights)
        for norm, value in _clipped_sums(joint, members, [weights] * len(members), second):
            outputs[joint.sum_slots[norm.choice.gradient.name]] = value
    outputs[joint.norm_slot] = _reported(joint, totals, options)
    joint.graph.output_node().args = (type(joint.graph.output_node().args[0])(outputs),)  # type: ignore[call-arg]
    _prune(joint.graph)
    joint.module.recompile()


def _rewrite_region(joint: JointGraph, norms: Sequence[_Norm], options: ClipOptions, lowering: Lowering) -> None:
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
    outputs[joint.norm_slot] = insert(joint.graph, _behind(joint, nodes), stack, nodes)
    names = [n.choice.gradient.name for n in norms]
    if lowering.groups:
        assert len(known) == len(names), "a parameter that other regions use too is clipped at once"
        weights = _weights_at_once(joint, norms, options, given, [lowering.groups[rows[n]] for n in names])
    else:
        weights = [
            insert(joint.graph, _behind(joint, [given]), lambda w, i=rows[name]: w[i], [given]) for name in names
        ]
    for norm, value in _clipped_sums(joint, norms, weights, {}):
        total = _handed_out(joint, norm, value) if norm.choice.shared else value
        outputs[joint.sum_slots[norm.choice.gradient.name]] = total
    joint.graph.output_node().args = (type(joint.graph.output_node().args[0])(outputs),)  # type: ignore[call-arg]
    _prune(joint.graph)
    joint.module.recompile()


def _weights_at_once(
    joint: JointGraph, norms: Sequence[_Norm], options: ClipOptions, bounds: fx.Node, groups: Sequence[int]
) -> list[fx.Node]:
    """``[B]`` for every norm, from the norms of its own group."""
    by_group: dict[int, fx.Node] = {}
    for group in dict.fromkeys(groups):
        members = [n.squared for n, g in zip(norms, groups, strict=True) if g == group]

        def clip(mask: Tensor, bounds: Tensor, *squared: Tensor) -> Tensor:
            found = clip_group(squared, mask, clipping=options.clipping, bound=bounds[0], mean_of=options.mean_of)
            return found[1]

        nodes = [joint.mask, bounds, *members]
        by_group[group] = insert(joint.graph, _behind(joint, nodes), clip, nodes)
    return [by_group[g] for g in groups]


def _handed_out(joint: JointGraph, norm: _Norm, total: fx.Node) -> fx.Node:
    """A node that holds the clipped sum, and what the norm over several regions is taken of."""
    gradient, nodes = norm.choice.gradient, factor_operands(norm.choice)
    if norm.choice.rule == "whole":
        nodes = [
            insert(joint.graph, _behind(joint, [gradient.gradient]), lambda g: g.unsqueeze(0), [gradient.gradient])
        ]
    elif norm.kept is not None:
        nodes = [norm.kept]
    with joint.graph.inserting_after(last_of(joint.graph, [total, *nodes])):
        node = joint.graph.call_function(torch.ops.dpcompile.hand_out.default, (total, nodes))
    node.meta = {"val": total.meta["val"].clone(), "partitioner_tag": "must_be_in_backward"}
    return node


# --- norms -----------------------------------------------------------------------------------------------------------


def _norms(joint: JointGraph, plan: Plan) -> list[_Norm]:
    """A norm for every gradient; those of kept vectors come out of one operation."""
    norms = [_norm(joint, choice) for choice in plan.choices]
    vectors: dict[torch.dtype, list[int]] = {}
    for i, norm in enumerate(norms):
        if norm.kept is not None and _is_vector(norm.kept.meta["val"]):
            vectors.setdefault(norm.kept.meta["val"].dtype, []).append(i)
    for places in vectors.values():
        if len(places) <= FEW:
            continue
        kept = [n for i in places if (n := norms[i].kept) is not None]
        squared = insert(joint.graph, _behind(joint, kept), lambda *each: norms_of_vectors(each).unbind(), kept)
        for i, node in zip(places, squared, strict=True):
            norms[i] = replace(norms[i], squared=node)
    return norms


def _is_vector(each: Tensor) -> bool:
    return each.ndim == 2 and each.device.type == "cpu"


def _norm(joint: JointGraph, choice: Choice) -> _Norm:
    gradient, rule = choice.gradient, choice.rule
    if rule == "whole":
        squared = insert(joint.graph, _behind(joint, [gradient.gradient]), _whole_norm, [gradient.gradient])
        return _Norm(choice, squared, None)
    if rule == "later":
        return _Norm(choice, joint.mask, None)
    if rule in ("outer", "ghost", "direct"):
        return _Norm(choice, _factored_norm(joint, choice), None)
    operands, compute = _instantiation(choice, joint.batch)

    def norm_and_gradients(mask: Tensor, *values: Any) -> tuple[Tensor, Tensor]:
        return compute(mask.shape[0], values)

    nodes = [joint.mask, *operands]
    try:
        squared, kept = insert(joint.graph, _behind(joint, nodes), norm_and_gradients, nodes)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UnsupportedGraphError(
            f"the gradient of parameter '{gradient.name}' cannot be computed per example: {str(error).splitlines()[0]}",
            where=where(gradient.sites[0].operation),
            remedy="simplify what stands between the parameter and the layer that uses it, or freeze the parameter",
        ) from error
    return _Norm(choice, squared, kept if rule == "keep" else None)


def _whole_norm(gradient: Tensor) -> Tensor:
    return gradient.to(accumulation_dtype(gradient.dtype)).square().sum().reshape(1)


def _factored_norm(joint: JointGraph, choice: Choice) -> fx.Node:
    assert choice.forms is not None
    forms, rule = choice.forms, choice.rule
    fused = choice.fused and fusible(rule, [f.one_hot for f in forms])
    dtype = None if fused else _dtype(choice.gradient)

    def compute(mask: Tensor, *values: Tensor) -> Tensor:
        if rule == "ghost" and len(forms) == 1 and forms[0].gram is not None:
            wide = (_widened(v, _dtype(choice.gradient)) for v in values)
            width = 2 * int(forms[0].sizes[3])  # products of pixels, and sums over the filter's offsets
            return ghost_of_gram(*forms[0].gram(*wide, mask.shape[0]), width)
        sides = _sides(choice, values, mask.shape[0], dtype)
        if fused:
            return fused_norm(rule, sides)
        if rule == "outer":
            return outer(sides[0])
        if rule == "direct":
            (merged,) = merge(sides)
            return direct(merged, DIRECT_TILES)
        return ghost(sides, choice.panels)

    nodes = [joint.mask, *(n for f in forms for n in f.operands)]
    return insert(joint.graph, _behind(joint, nodes), compute, nodes)


def _sides(choice: Choice, values: Sequence[Tensor], batch: int, dtype: torch.dtype | None) -> list[Sides]:
    """The forms' sides in ``dtype``, or in their own."""
    assert choice.forms is not None
    remaining = list(values)
    sides = []
    for form in choice.forms:
        own = [remaining.pop(0) for _ in form.operands]
        if dtype is not None:
            own = [_widened(v, dtype) for v in own]
        sides.append(Sides(*form.build(*own, batch), one_hot=form.one_hot))
    return sides


def _instantiation(
    choice: Choice, batch: Size
) -> tuple[list[fx.Node], Callable[[int, Sequence[Any]], tuple[Tensor, Tensor]]]:
    """Operands, and a function from B and their values to every example's squared norm and gradient."""
    gradient, forms, dtype = choice.gradient, choice.forms, _dtype(choice.gradient)
    if forms is not None and forms[0].aligned and all(f.one_hot is None and f.each is None for f in forms):

        def merged_product(batch: int, values: Sequence[Any]) -> tuple[Tensor, Tensor]:
            (merged,) = merge(_sides(choice, values, batch, dtype))
            if merged.rows.device.type == "cpu":
                product, squared = product_with_norms(merged.rows, merged.cols, choice.reuse)
            else:
                product = torch.matmul(merged.rows.mT, merged.cols)
                squared = squared_norms(product)
            return squared, product.reshape(batch, *gradient.gradient.meta["val"].shape)

        return [n for f in forms for n in f.operands], merged_product
    needed = dict.fromkeys(n for s in gradient.sites for n in s.operation.all_input_nodes)
    operands = [*needed, *(n for n in tail_inputs(gradient) if n not in needed)]
    own_forms = [factored(s, batch) for s in gradient.sites]

    def through_sites(batch: int, values: Sequence[Any]) -> tuple[Tensor, Tensor]:
        known = {n: _widened(v, dtype) for n, v in zip(operands, values, strict=True)}
        sites = []
        for site, form in zip(gradient.sites, own_forms, strict=True):
            if form is None or form.one_hot is not None:
                sites.append(per_example_site(site, known, batch, dtype))
            elif form.each is not None:
                sites.append(form.each(*(known[n] for n in form.operands), batch))
            else:
                rows, cols = form.build(*(known[n] for n in form.operands), batch)
                sites.append(torch.matmul(rows.mT, cols).reshape(batch, *site.value.meta["val"].shape))
        each = through_tail(gradient, sites, known, dtype)
        return squared_norms(each), each

    return operands, through_sites


# --- clip ------------------------------------------------------------------------------------------------------------


def _clip(joint: JointGraph, members: Sequence[_Norm], options: ClipOptions, bound: float) -> tuple[fx.Node, fx.Node]:
    """The group's squared norm and its weights, both ``[B]``."""

    def clip(mask: Tensor, *squared: Tensor) -> tuple[Tensor, Tensor]:
        return clip_group(squared, mask, clipping=options.clipping, bound=bound, mean_of=options.mean_of)

    nodes = [joint.mask, *(n.squared for n in members)]
    return insert(joint.graph, _behind(joint, nodes), clip, nodes)


def _reported(joint: JointGraph, totals: Sequence[fx.Node], options: ClipOptions) -> fx.Node:
    def report(mask: Tensor, *squared: Tensor) -> Tensor:
        return own_norms(squared, mask, options.mean_of)

    nodes = [joint.mask, *totals]
    return insert(joint.graph, _behind(joint, nodes), report, nodes)


# --- clipped sums ----------------------------------------------------------------------------------------------------


def _repeated(
    joint: JointGraph, plan: Plan, proof: Proof, members: Sequence[_Norm], weights: fx.Node
) -> dict[fx.Node, fx.Node]:
    """What a second backward makes of the sites' operands, where the plan asks for one."""
    if not plan.second_backward:
        return {}
    redone = (m.choice.gradient for m in members if m.kept is None and m.choice.rule != "whole")
    operands = {n for g in redone for s in g.sites for n in s.operation.all_input_nodes}
    return repeat_backward(joint, proof, weights, operands)


def _clipped_sums(
    joint: JointGraph, norms: Sequence[_Norm], weights: Sequence[fx.Node], second: Mapping[fx.Node, fx.Node]
) -> Iterator[tuple[_Norm, fx.Node]]:
    """Each norm's clipped sum, for its row of weights; those of kept vectors come out of one operation."""
    together: dict[torch.dtype, list[tuple[_Norm, fx.Node]]] = {}
    for norm, row in zip(norms, weights, strict=True):
        value = None if norm.kept is None else norm.kept.meta["val"]
        if value is None or value.device.type != "cpu" or value.dtype != row.meta["val"].dtype:
            yield norm, _clipped_sum(joint, norm, row, second)
        elif value.ndim == 2:
            together.setdefault(value.dtype, []).append((norm, row))
        else:
            yield from _weighted_sums(joint, [(norm, row)])
    for members in together.values():
        if len(members) > FEW:
            yield from _weighted_sums(joint, members)
        else:
            yield from ((norm, _clipped_sum(joint, norm, row, second)) for norm, row in members)


def _weighted_sums(joint: JointGraph, members: Sequence[tuple[_Norm, fx.Node]]) -> Iterator[tuple[_Norm, fx.Node]]:
    rows = list(dict.fromkeys(row for _, row in members))
    indices = [rows.index(row) for _, row in members]

    def sums(*values: Tensor) -> list[Tensor]:
        weights = torch.stack(values[: len(rows)]) if len(rows) > 1 else values[0].unsqueeze(0)
        return weighted_sums(weights, indices, values[len(rows) :])

    nodes = [*rows, *(n for m, _ in members if (n := m.kept) is not None)]
    values = insert(joint.graph, _behind(joint, nodes), sums, nodes)
    return zip((m for m, _ in members), values, strict=True)


def _clipped_sum(joint: JointGraph, norm: _Norm, weights: fx.Node, second: Mapping[fx.Node, fx.Node]) -> fx.Node:
    gradient = norm.choice.gradient
    wanted = _dtype(gradient)
    if norm.choice.rule == "whole":
        nodes = [weights, gradient.gradient]
        return insert(joint.graph, _behind(joint, nodes), lambda w, g: _weighted_whole(w, g).to(wanted), nodes)
    if norm.kept is not None:
        nodes = [weights, norm.kept]

        def weighted(w: Tensor, each: Tensor) -> Tensor:
            return scaled(each, Examples(0), w).sum(0).to(wanted)

        return insert(joint.graph, _behind(joint, nodes), weighted, nodes)
    return _redone_sum(joint, gradient, weights, wanted, second)


def _weighted_whole(weights: Tensor, gradient: Tensor) -> Tensor:
    return torch.where(weights == 0, torch.zeros_like(weights), weights * gradient)


def _redone_sum(
    joint: JointGraph,
    gradient: ParameterGradient,
    weights: fx.Node,
    wanted: torch.dtype,
    second: Mapping[fx.Node, fx.Node],
) -> fx.Node:
    """The original sites and tail, on operands scaled per example, by us or by a second backward."""
    needed = dict.fromkeys(n for s in gradient.sites for n in s.operation.all_input_nodes)
    operands = [*needed, *(n for n in tail_inputs(gradient) if n not in needed)]
    dtype = _dtype(gradient)

    def redo(w: Tensor, *values: Any) -> Tensor:
        known = {n: _widened(v, dtype) for n, v in zip(operands, values, strict=True)}
        sums = {}
        for site in gradient.sites:
            reweighted = any(n in second for n in site.operation.all_input_nodes)
            own = (w != 0).to(w.dtype) if reweighted else w
            sums[site.value] = _weighted_site(site, known, own, dtype)
        return run_tail(gradient, sums, known, dtype).to(wanted)

    nodes = [weights, *(second.get(n, n) for n in operands)]
    return insert(joint.graph, _behind(joint, nodes), redo, nodes)


def _weighted_site(site: Site, known: Mapping[fx.Node, Any], weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The site with one operand scaled by the weights, and every example of weight 0 erased from the others."""
    first = site.linear_operands[0]
    present = (weights != 0).to(weights.dtype)
    values = dict(known)
    for name, axis in site.axes.items():
        node = site.operands[name]
        if name == first:
            values[node] = scaled(known[node], axis, weights)
        elif name in site.linear_operands:
            values[node] = scaled(known[node], axis, present)
    result = run_operation(site.operation, values, dtype)
    return result if site.value is site.operation else result[site.value.args[1]]  # type: ignore[index]


# --- helpers ---------------------------------------------------------------------------------------------------------


def _dtype(gradient: ParameterGradient) -> torch.dtype:
    return accumulation_dtype(gradient.gradient.meta["val"].dtype)


def _widened(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _behind(joint: JointGraph, nodes: Sequence[fx.Node]) -> fx.Node:
    """Where nodes that use ``nodes`` may be written: behind the last of them, and behind all placeholders."""
    last = last_of(joint.graph, nodes)
    if last.op != "placeholder":
        return last
    return last_of(joint.graph, [n for n in joint.graph.nodes if n.op == "placeholder"])


def _prune(graph: fx.Graph) -> None:
    """Drop what only the unclipped gradients needed; a convolution's backward then makes its input gradient alone."""
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.convolution_backward.default):
        used = {u.args[1] for u in node.users}
        mask = [bool(wanted and i in used) for i, wanted in enumerate(node.args[-1])]  # type: ignore[arg-type]
        node.args = (*node.args[:-1], mask)
        node.meta["val"] = tuple(v if m else None for v, m in zip(node.meta["val"], mask, strict=True))
