"""Where each expert's rows end, computed in many ways: each is recognised, or the rows stay sorted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_sorted_rows import E, K, Mixture, compare, grouped
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dpcompile.proof.unsort import unsort

Ends = Callable[[Tensor, Tensor], Tensor]
N, P, D = 7, 5, 6


def each() -> Tensor:
    return torch.arange(E)


def by_one_hot(ordered: Tensor, chosen: Tensor) -> Tensor:
    return F.one_hot(chosen, E).sum(0).cumsum(0)


def by_one_hot_of_sorted(ordered: Tensor, chosen: Tensor) -> Tensor:
    return F.one_hot(ordered, E).sum(0).cumsum(0, dtype=torch.int32)


def by_scatter(ordered: Tensor, chosen: Tensor) -> Tensor:
    return torch.zeros(E, dtype=torch.long).scatter_add(0, chosen, torch.ones_like(chosen)).cumsum(0)


def by_index_add(ordered: Tensor, chosen: Tensor) -> Tensor:
    return torch.zeros(E, dtype=torch.long).index_add(0, ordered, torch.ones_like(chosen)).cumsum(0)


def by_searching(ordered: Tensor, chosen: Tensor) -> Tensor:
    return torch.searchsorted(ordered, each(), right=True)


def by_comparing(ordered: Tensor, chosen: Tensor) -> Tensor:
    return (chosen[:, None] == each()).sum(0).cumsum(0)


def by_comparing_all(ordered: Tensor, chosen: Tensor) -> Tensor:
    return (ordered <= each()[:, None]).sum(1)


def by_histc_in_their_own_order(ordered: Tensor, chosen: Tensor) -> Tensor:
    return torch.histc(chosen.reshape(-1).float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)


def without_what_is_elsewhere(ordered: Tensor, chosen: Tensor) -> Tensor:
    return F.one_hot(ordered.clamp(max=E), E + 1).sum(0)[:E].cumsum(0)


RIGHT = [
    without_what_is_elsewhere, by_one_hot, by_one_hot_of_sorted, by_scatter, by_index_add, by_searching, by_comparing,
    by_comparing_all, by_histc_in_their_own_order,
]  # fmt: skip


def starts(ordered: Tensor, chosen: Tensor) -> Tensor:
    return torch.searchsorted(ordered, each())


def of_the_next(ordered: Tensor, chosen: Tensor) -> Tensor:
    return F.one_hot((chosen + 1) % E, E).sum(0).cumsum(0)


def not_added_up(ordered: Tensor, chosen: Tensor) -> Tensor:
    return F.one_hot(chosen, E).sum(0)


def limited(ordered: Tensor, chosen: Tensor) -> Tensor:
    counts = F.one_hot(chosen, E).sum(0)
    return torch.where(counts > N - 1, N - 1, counts).cumsum(0)


def clamped(ordered: Tensor, chosen: Tensor) -> Tensor:
    return F.one_hot(chosen, E).sum(0).clamp(max=N).cumsum(0)


def none_is_elsewhere(ordered: Tensor, chosen: Tensor) -> Tensor:
    return F.one_hot(ordered.clamp(max=E - 1), E).sum(0).cumsum(0)


def all_but_the_last(ordered: Tensor, chosen: Tensor) -> Tensor:
    return (ordered <= each().where(each() < E - 1, E - 2)[:, None]).sum(1)


def without_the_first_row(ordered: Tensor, chosen: Tensor) -> Tensor:
    return F.one_hot(chosen[1:], E).sum(0).cumsum(0)


def equal_parts(ordered: Tensor, chosen: Tensor) -> Tensor:
    return torch.full((E,), 1).cumsum(0)


REFUSED = [
    starts, of_the_next, not_added_up, limited, clamped, none_is_elsewhere, all_but_the_last, without_the_first_row,
    equal_parts,
]  # fmt: skip


def unsorted(ends_of: Ends, descending: bool = False) -> tuple[Any, Any, tuple[Tensor, ...]]:
    """A function of rows, matrices and numbers as it is traced, and after the pass."""

    def experts(x: Tensor, matrices: Tensor, chosen: Tensor) -> Tensor:
        ordered, order = chosen.sort(descending=descending)
        return torch.zeros(N, D).index_add(0, order, grouped(x[order], matrices, ends_of(ordered, chosen)))

    given = torch.randn(N, P), torch.randn(E, P, D), torch.randint(0, E, (N,))
    plain, module = (make_fx(experts, tracing_mode="fake")(*given) for _ in range(2))
    unsort(module.graph, {})
    module.recompile()
    return plain, module, given


@pytest.mark.parametrize("ends_of", RIGHT, ids=lambda f: f.__name__)
def test_however_they_are_counted(ends_of: Ends) -> None:
    plain, module, given = unsorted(ends_of)
    assert "sort" not in {getattr(n.target, "_opname", "") for n in module.graph.nodes}
    torch.testing.assert_close(module(*given), plain(*given))


@pytest.mark.parametrize("ends_of", REFUSED, ids=lambda f: f.__name__)
def test_what_is_something_else_stays_sorted(ends_of: Ends) -> None:
    _, module, _ = unsorted(ends_of)
    assert "expert_products" not in str(module.graph) and "sort" in str(module.graph)


def test_descending_rows_have_other_ends() -> None:
    _, module, _ = unsorted(by_one_hot, descending=True)
    assert "expert_products" not in str(module.graph)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_in_a_model(dynamic: bool) -> None:
    def mixture(m: Mixture, x: Tensor) -> Tensor:
        weights, chosen = m.routed(x)
        ordered, order = chosen.flatten().sort()
        ends = F.one_hot(chosen.flatten(), E).sum(0).cumsum(0)
        rows = grouped(grouped(x[order // K], m.up, ends).relu(), m.down.mT, ends) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // K, rows)

    compare(mixture, dynamic=dynamic)
