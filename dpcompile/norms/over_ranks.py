"""Gradients that are sums over ranks: each rank has a part of every example's positions.

The squares of the parts do not add up to the square of the sum. So before a norm is taken the parts of every example
are added up over the ranks, or rows and columns of all ranks are brought together, whichever is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from dpcompile._torch.parallel import ranks_of_group
from dpcompile.graph.operations import operation_name
from dpcompile.graph.sizes import Size, product
from dpcompile.norms.factors import Factored, oriented
from dpcompile.norms.per_example import OVER_RANKS
from dpcompile.proof.sites import ParameterGradient

__all__ = [
    "all_ranks_positions",
    "are_looked_up",
    "are_multiplied",
    "is_sum_over_ranks",
    "ranks_of",
    "reduced",
    "takes_positions",
]

_ops = torch.ops._c10d_functional


def is_sum_over_ranks(gradient: ParameterGradient) -> bool:
    """Whether a parameter's gradient is added up over ranks behind the sum over the examples."""
    return bool(reduced(gradient))


def reduced(gradient: ParameterGradient) -> list[fx.Node]:
    """The sums over ranks that its sites' values go through."""
    return [n for n in gradient.tail if _reduction(n) is not None]


def ranks_of(gradient: ParameterGradient) -> int:
    """Over how many ranks it is added up, where its sums are all over the same."""
    ((_, group),) = {_reduction(n) for n in reduced(gradient)}  # type: ignore[misc]
    return len(ranks_of_group(group))


def are_looked_up(forms: Sequence[Factored]) -> bool:
    """Whether all sites are rows given by an index, on the same side."""
    return all(f.one_hot == (forms[0].one_hot or "") for f in forms)


def are_multiplied(forms: Sequence[Factored]) -> bool:
    """Whether all sites are one product of rows and columns."""
    return forms[0].aligned and all(f.one_hot is None and f.each is None for f in forms)


def takes_positions(rule: str, forms: Sequence[Factored]) -> bool:
    """Whether a rule works on rows and columns, and so on those of all ranks; else each site goes through the tail."""
    return rule not in ("keep", "redo") or are_multiplied(forms) or (rule == "redo" and are_looked_up(forms))


def all_ranks_positions(gradient: ParameterGradient, batch: Size) -> list[Factored] | None:
    """The sites as outer products over the positions of all ranks, if each is summed over them once; else None.

    **Guarantee.** Rows and columns are those of the sum over the ranks, alike on all of them: for sites that reach the
    gradient through one sum over all of these ranks each, and otherwise as :func:`dpcompile.norms.factors.oriented`
    asks for.
    """
    groups = {_reduction(n) for n in reduced(gradient)}
    if len(groups) != 1 or any(_reductions_behind(s.value, gradient) != 1 for s in gradient.sites):
        return None
    ((kind, group),) = groups  # type: ignore[misc]
    forms = oriented(gradient, batch, through=OVER_RANKS) if kind == "sum" else None
    return None if forms is None else [_gathered(f, group, ranks_of(gradient)) for f in forms]


def _reduction(node: fx.Node) -> tuple[str, str] | None:
    if node.op != "call_function" or operation_name(node.target) != OVER_RANKS[0]:
        return None
    kind, group = node.args[1:3]
    return str(kind), str(group)


def _reductions_behind(value: fx.Node, gradient: ParameterGradient) -> int:
    """Through how many sums over ranks a site's value goes on its way to the gradient, where there is one way."""
    tail, node, found = set(gradient.tail), value, 0
    while node is not gradient.gradient:
        users = [u for u in node.users if u in tail]
        if len(users) != 1:
            return -1
        (node,) = users
        found += _reduction(node) is not None
    return found


def _gathered(form: Factored, group: str, ranks: int) -> Factored:
    build, (k, t, p, d) = form.build, form.sizes

    def of_all(*arguments: Any) -> tuple[Tensor, Tensor]:
        rows, cols = build(*arguments)
        return _gather(rows, group, ranks), _gather(cols, group, ranks)

    return replace(
        form,
        build=of_all,
        sizes=(k, product([t, ranks]), p, d),
        unfolded=product([form.unfolded, ranks]),
        each=None,
        norms=None,
        ghost=None,
        filled=0.0,
    )


def _gather(side: Tensor, group: str, ranks: int) -> Tensor:
    """``[B, K, T, features]`` or an index ``[B, T]`` of every rank, one behind the other along T."""
    own = side.contiguous()
    every = _ops.wait_tensor(_ops.all_gather_into_tensor(own, ranks, group))
    parts: Sequence[Tensor] = every.unflatten(0, (ranks, side.shape[0])).unbind(0)
    return torch.cat(list(parts), dim=1 if side.ndim == 2 else 2)
