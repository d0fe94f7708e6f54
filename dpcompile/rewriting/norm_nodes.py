"""Nodes that take the norm of every example's gradient, by the rule of the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.insert import behind, insert
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.locate import where
from dpcompile.graph.sizes import Size
from dpcompile.graph.slices import accumulation_dtype
from dpcompile.kernels.kept import FEW, has_operations, norms_of_vectors, squared_norms
from dpcompile.kernels.narrow import NARROW
from dpcompile.kernels.product_op import product_norms, product_with_norms
from dpcompile.kernels.products import product
from dpcompile.norms.factors import Factored, alone, factored
from dpcompile.norms.fused import fused_norm, fusible
from dpcompile.norms.ghost import Sides, ghost, merge, outer
from dpcompile.norms.mapped import Mapped, norms_of_mapped
from dpcompile.norms.over_ranks import are_looked_up, are_multiplied
from dpcompile.norms.per_example import per_example_site, tail_inputs, through_tail
from dpcompile.norms.tied_heads import norms_by_parts
from dpcompile.planning.choices import Choice
from dpcompile.planning.plan import Plan
from dpcompile.proof.sites import ParameterGradient

__all__ = ["Norm", "find_norms", "sum_dtype", "widened"]

_NARROW = [{dtype} for dtype in NARROW]  # operands whose products need not be widened first


@dataclass(frozen=True, slots=True)
class Norm:
    """The norms of one parameter's per-example gradients, in the graph.

    Attributes:
        choice: of the plan.
        squared: ``[B]``, float64, of the gradients as they stand in the graph; of rule "later" the mask, which nobody
            reads.
        kept: ``[B, *parameter shape]``, where they are kept.
    """

    choice: Choice
    squared: fx.Node
    kept: fx.Node | None


def find_norms(joint: JointGraph, plan: Plan) -> list[Norm]:
    """A norm for every gradient; those of kept vectors come out of one operation.

    **Guarantee.** Every norm is that of the sum of all the parameter's uses in the graph, behind their tails; but for
    rule "later", whose uses in other regions come first. It is right or too large whatever the values are: where a
    gradient is kept it is that of the gradient which is summed, and elsewhere it is not below that of the real numbers.
    Squares are float64: none is lost or overflows.
    """
    operations = [s.operation for c in plan.choices for s in c.gradient.sites]
    norms = [_norm(joint, choice, operations if choice.late else []) for choice in plan.choices]
    vectors: dict[torch.dtype, list[int]] = {}
    for i, norm in enumerate(norms):
        if norm.kept is not None and _is_vector(norm.kept.meta["val"]):
            vectors.setdefault(norm.kept.meta["val"].dtype, []).append(i)
    for places in vectors.values():
        if len(places) <= FEW:
            continue
        kept = [n for i in places if (n := norms[i].kept) is not None]
        squared = insert(joint.graph, behind(joint.graph, kept), lambda *each: norms_of_vectors(each).unbind(), kept)
        for i, node in zip(places, squared, strict=True):
            norms[i] = replace(norms[i], squared=node)
    return norms


def _is_vector(each: Tensor) -> bool:
    return each.ndim == 2 and has_operations(each.device)


def _norm(joint: JointGraph, choice: Choice, later_than: Sequence[fx.Node]) -> Norm:
    gradient, rule = choice.gradient, choice.rule
    if rule == "whole":
        squared = insert(joint.graph, behind(joint.graph, [gradient.gradient]), _whole_norm, [gradient.gradient])
        return Norm(choice, squared, None)
    if rule == "later":
        return Norm(choice, joint.mask, None)
    if rule in ("outer", "ghost", "direct"):
        return Norm(choice, _factored_norm(joint, choice), None)
    operands, compute = _instantiation(choice, joint.batch)

    def norm_and_gradients(mask: Tensor, *values: Any) -> tuple[Tensor, Tensor | None]:
        return compute(mask.shape[0], values)

    nodes = [joint.mask, *operands]
    try:
        squared, kept = insert(joint.graph, behind(joint.graph, [*nodes, *later_than]), norm_and_gradients, nodes)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UnsupportedGraphError(
            f"the gradient of parameter '{gradient.name}' cannot be computed per example: {str(error).splitlines()[0]}",
            where=where(gradient.sites[0].operation),
            remedy="simplify what stands between the parameter and the layer that uses it, or freeze the parameter; "
            "for an operator of your own mend per_example= of register_site, or leave it out: then torch.vmap runs the "
            "operator",
        ) from error
    return Norm(choice, squared, kept if rule == "keep" else None)


def _whole_norm(gradient: Tensor) -> Tensor:
    return gradient.double().square().sum().reshape(1)


def _factored_norm(joint: JointGraph, choice: Choice) -> fx.Node:
    assert choice.forms is not None
    forms, rule, behind_tail = choice.forms, choice.rule, choice.mapped
    if behind_tail is not None:
        return _norm_behind_tail(joint, choice, behind_tail)
    fused = choice.fused and fusible(rule, [f.one_hot for f in forms])
    dtype = None if fused else sum_dtype(choice.gradient)

    def compute(mask: Tensor, *values: Tensor) -> Tensor:
        of_form = (forms[0].ghost if len(forms) == 1 else norms_by_parts(forms)) if rule == "ghost" else None
        if of_form is not None:
            return of_form(*_taken(forms, values, sum_dtype(choice.gradient)), mask.shape[0])
        sides = _sides(choice, values, mask.shape[0], dtype)
        if fused:
            return fused_norm(rule, sides)
        if rule == "outer":
            return outer(sides[0])
        if rule == "direct":
            (merged,) = merge(sides)
            return product_norms(merged.rows, merged.cols)
        return ghost(sides, choice.panels)

    nodes = [joint.mask, *(n for f in forms for n in f.operands)]
    return insert(joint.graph, behind(joint.graph, nodes), compute, nodes)


def _norm_behind_tail(joint: JointGraph, choice: Choice, found: Mapped) -> fx.Node:
    gradient, dtype = choice.gradient, sum_dtype(choice.gradient)
    operands = len(found.operands) - len(found.values)

    def compute(mask: Tensor, *values: Tensor) -> Tensor:
        taken = [*_taken(found.forms, values[:operands], dtype), *values[operands:]]
        return norms_of_mapped(gradient, found, mask.shape[0], taken)

    nodes = [joint.mask, *found.operands]
    return insert(joint.graph, behind(joint.graph, nodes), compute, nodes)


def _sides(choice: Choice, values: Sequence[Tensor], batch: int, dtype: torch.dtype | None) -> list[Sides]:
    """The forms' sides in ``dtype``, or in their own."""
    assert choice.forms is not None
    remaining = _taken(choice.forms, values, dtype)
    sides = []
    for form in choice.forms:
        own = [remaining.pop(0) for _ in form.operands]
        sides.append(Sides(*form.build(*own, batch), one_hot=form.one_hot))
    return sides


def _taken(forms: Sequence[Factored], values: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """The operands of all forms, as they are taken: in ``dtype``, or in their own."""
    sites = [f.site for f in forms for _ in f.operands]
    return [v if dtype is None or s.widens else widened(v, dtype) for s, v in zip(sites, values, strict=True)]


def _instantiation(
    choice: Choice, batch: Size
) -> tuple[list[fx.Node], Callable[[int, Sequence[Any]], tuple[Tensor, Tensor | None]]]:
    """Operands, and a function from B and their values to every example's squared norm and gradient.

    There is None for gradients that nobody keeps, where their norms come without them.
    """
    gradient, forms, dtype = choice.gradient, choice.forms, sum_dtype(choice.gradient)
    single = alone(forms) if forms is not None and choice.rule == "redo" else None
    if single is not None and (norms := single.norms) is not None:
        return list(single.operands), lambda batch, values: (norms(*_taken([single], values, dtype), batch), None)
    if choice.rule == "redo" and forms is not None and are_looked_up(forms):

        def looked_up(batch: int, values: Sequence[Any]) -> tuple[Tensor, None]:
            return ghost(_sides(choice, values, batch, dtype)), None

        return [n for f in forms for n in f.operands], looked_up
    if forms is not None and are_multiplied(forms):

        def merged_product(batch: int, values: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
            narrow = choice.rule == "keep" and {v.dtype for v in values} in _NARROW
            (merged,) = merge(_sides(choice, values, batch, None if narrow else dtype))
            if choice.rule == "redo":
                return product_norms(merged.rows, merged.cols), None
            each, squared = product_with_norms(merged.rows, merged.cols, choice.reuse)
            return squared, each.reshape(batch, *gradient.gradient.meta["val"].shape)

        return [n for f in forms for n in f.operands], merged_product
    needed = dict.fromkeys(n for s in gradient.sites for n in s.operation.all_input_nodes)
    operands = [*needed, *(n for n in tail_inputs(gradient) if n not in needed)]
    own_forms = [factored(s, batch) for s in gradient.sites]
    if choice.rule == "redo" and (forms is None or len(forms) > 1 or forms[0].each is None):  # type: ignore[misc]
        dtype = torch.float64  # the sum is another than the one whose norm is taken: that is one of the real numbers

    def through_sites(batch: int, values: Sequence[Any]) -> tuple[Tensor, Tensor]:
        narrow = dict(zip(operands, values, strict=True))
        wide = {n: widened(v, dtype) for n, v in narrow.items()}
        sites, squared = [], []
        for site, form in zip(gradient.sites, own_forms, strict=True):
            known = narrow if site.widens else wide
            if form is None or form.one_hot is not None:
                sites.append(per_example_site(site, known, batch, dtype))
            elif form.each is not None and choice.exchange is None:
                kept = choice.rule == "keep"
                value, norm = form.each(*(known[n] for n in form.operands), batch, choice.reuse, kept)
                sites.append(value)
                squared.append(norm)
            else:
                rows, cols = form.build(*(known[n] for n in form.operands), batch)
                sites.append(product(rows.mT, cols).reshape(batch, *site.value.meta["val"].shape))
        each = through_tail(gradient, sites, wide, dtype)
        one = forms is not None and len(forms) == len(squared) == 1 and choice.exchange is None
        if one:  # no tail, or one that norms do not see
            return squared[0], each
        return squared_norms(each), each

    return operands, through_sites


def sum_dtype(gradient: ParameterGradient) -> torch.dtype:
    """What a gradient's norms and sums are taken in."""
    return accumulation_dtype(gradient.gradient.meta["val"].dtype)


def widened(value: Any, dtype: torch.dtype | None) -> Any:
    """A value in ``dtype`` if it is a tensor of floating numbers."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
