"""Rows of all examples that are sorted: right where each comes back to its place, refused where they meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpcompile import DPCompileError, dp_compile
from dpcompile.module import engine_of

B, T, D, E, K = 4, 3, 8, 4, 2

pytest.importorskip("transformers.integrations.moe")

Sorting = Callable[["Mixture", Tensor], Tensor]


class Mixture(nn.Module):
    """A router, matrices and biases of experts, and layers; what is done with them is a function."""

    def __init__(self, function: Sorting) -> None:
        super().__init__()
        self.function = function
        self.router, self.layer, self.last = nn.Linear(D, E), nn.Linear(D, D), nn.Linear(D, 3)
        self.up, self.down = (nn.Parameter(torch.randn(E, D, D) / 2) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(E, D))
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.function(self, x.flatten(0, 1)).view(x.shape))

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the chosen experts, ``[N, K]``."""
        weights, chosen = self.router(x).softmax(-1).topk(K, -1)
        return weights, chosen


def ends_of(ordered: Tensor) -> Tensor:
    return torch.histc(ordered.float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)


def grouped(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Each stretch of rows with a matrix of its own."""
    return torch.ops.transformers.grouped_mm_fallback(rows, matrices, ends)


def back_of(order: Tensor) -> Tensor:
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return back


# --- right ------------------------------------------------------------------------------------------------------------


def grouped_and_added_up(m: Mixture, x: Tensor) -> Tensor:
    """The usual one: K experts a token, biases, and a sum at the token's place."""
    weights, chosen = m.routed(x)
    ordered, order = chosen.flatten().sort()
    token, ends = order // K, ends_of(ordered)
    rows = grouped(x[token], m.up, ends).relu() + m.bias[ordered]
    rows = grouped(rows, m.down.mT, ends) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, token, rows)


def brought_back(m: Mixture, x: Tensor) -> Tensor:
    weights, chosen = m.routed(x)
    ordered, order = chosen.flatten().sort(stable=True)
    rows = grouped(x[order.div(K, rounding_mode="floor")], m.up, ends_of(ordered))
    rows = m.norm(rows.tanh()) * weights.flatten()[order].unsqueeze(-1)
    return rows[back_of(order)].view(-1, K, D).sum(1)


def brought_back_by_argsort(m: Mixture, x: Tensor) -> Tensor:
    order = x.sum(1).argsort(descending=True)
    return m.norm(m.layer(x[order]).tanh())[order.argsort()]


def copied_back(m: Mixture, x: Tensor) -> Tensor:
    order = x.sum(1).argsort()
    return torch.empty_like(x).index_copy(0, order, m.layer(x.index_select(0, order)))


def written_back(m: Mixture, x: Tensor) -> Tensor:
    order = x.sum(1).argsort()
    rows = m.layer(x[order]).square()
    out = torch.zeros_like(x)
    out[order] = rows
    return out


def split_and_joined(m: Mixture, x: Tensor) -> Tensor:
    order = x.sum(1).argsort()
    gate, up = m.layer(x[order]).chunk(2, -1)
    return torch.cat([gate[..., ::2], up.softmax(-1), gate[..., 1::2]], -1)[back_of(order)]


def in_bfloat16(m: Mixture, x: Tensor) -> Tensor:
    """By torch's own operation, which it captures in bfloat16 only."""
    weights, chosen = m.routed(x)
    ordered, order = chosen.flatten().sort()
    token, ends = order // K, ends_of(ordered)
    rows = F.grouped_mm(x[token].bfloat16(), m.up.bfloat16(), offs=ends).relu()
    rows = F.grouped_mm(rows, m.down.bfloat16().mT, offs=ends).float() * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, token, rows)


def low_rank(m: Mixture, x: Tensor) -> Tensor:
    """Matrices that are a product of what is trained."""
    ordered, order = m.routed(x)[1][:, 0].sort()
    up = m.up + m.layer.weight[None, :, :2] @ m.down[:, :2]
    return grouped(x[order], up, ends_of(ordered))[back_of(order)]


def masked_in_a_checkpoint(m: Mixture, x: Tensor) -> Tensor:
    """What is computed again in the backward, and what is compared with sorted numbers."""
    ordered, order = m.routed(x)[1][:, 0].sort()
    rows = checkpoint(m.layer, x[order], use_reentrant=False) * (ordered > 1)[:, None]
    return rows[order.argsort()]


def sorted_twice(m: Mixture, x: Tensor) -> Tensor:
    return brought_back(m, grouped_and_added_up(m, x))


RIGHT = [
    grouped_and_added_up, brought_back, brought_back_by_argsort, copied_back, written_back, split_and_joined,
    in_bfloat16, low_rank, masked_in_a_checkpoint, sorted_twice,
]  # fmt: skip


@pytest.mark.parametrize(
    "norm", ["auto", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ghost", "instantiate", "redo", "direct"))]
)
@pytest.mark.parametrize("function", RIGHT, ids=lambda f: f.__name__)
def test_rows_that_come_back(function: Sorting, norm: str) -> None:
    compare(function, norm=norm, dynamic=False)


@pytest.mark.parametrize("function", [grouped_and_added_up], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "options",
    [
        {"dynamic": True},
        pytest.param({"clipping": "automatic"}, marks=pytest.mark.slow),
        pytest.param({"norm": "two_pass"}, marks=pytest.mark.slow),
    ],
    ids=lambda o: next(iter(o)),
)
def test_sizes_that_are_symbols_and_other_options(function: Sorting, options: dict[str, Any]) -> None:
    compare(function, **options)


def compare(function: Sorting, **options: Any) -> Any:
    torch.manual_seed(0)
    model, x = Mixture(function), torch.randn(B, T, D)
    gradients, clipping = per_example_gradients(model, (x,), {}, PseudoLoss(B)), options.get("clipping", "flat")
    bound = clip(gradients, 1.0).norms.median().item() * 1.01
    private: Any = dp_compile(model, max_grad_norm=bound, backend="eager", **options)
    train_step(private, (x,), {}, PseudoLoss(B))
    assert_right(private, clip(gradients, bound, clipping=clipping), 5e-2 if function is in_bfloat16 else 1e-4)
    return private


def test_the_sorting_is_gone() -> None:
    """Norms and sums of the experts' matrices are those of one operation, and nothing is sorted outside of it."""
    private = compare(grouped_and_added_up)
    text = str(private.graph.graph)
    assert "expert_sums" in text and "aten.sort" not in text and "_grouped_mm" not in text


@pytest.mark.filterwarnings("ignore:1 of 3 examples had a gradient that is NaN or infinite:RuntimeWarning")
def test_masked_and_bad_examples_leave_no_trace() -> None:
    """A row of padding, an example that is not a number, and an infinite one."""
    torch.manual_seed(0)
    model, x = Mixture(grouped_and_added_up), torch.randn(B, T, D)
    x[1], x[2, 0, 0] = torch.nan, torch.inf
    mask = torch.tensor([True, False, True, True])
    private: Any = dp_compile(model, max_grad_norm=1.0, backend="eager", loss_reduction="sum")
    engine_of(private).set_mask(mask)
    private(x).square().sum().backward()
    kept = x[[0, 3]]
    gradients = per_example_gradients(model, (kept,), {}, lambda out, rows: out.square().sum((1, 2)))
    truth = clip(gradients, 1.0)
    for name, p in private.named_parameters():
        torch.testing.assert_close(p.grad.double(), truth.sums[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(private.grad_norms[[0, 2]].double(), truth.norms, rtol=1e-4, atol=1e-5)


def test_users_of_several_rows() -> None:
    torch.manual_seed(0)
    model, x = Mixture(grouped_and_added_up), torch.randn(2 * B, T, D)
    private: Any = dp_compile(model, max_grad_norm=1.0, backend="eager", loss_reduction="sum", examples_per_user=2)
    private(x).square().sum().backward()
    each = per_example_gradients(model, (x,), {}, lambda out, rows: out.square().sum((1, 2)))
    truth = clip({n: g.unflatten(0, (B, 2)).sum(1) for n, g in each.items()}, 1.0)
    torch.testing.assert_close(private.grad_norms.double(), truth.norms, rtol=1e-4, atol=1e-5)


# --- refused ----------------------------------------------------------------------------------------------------------


def by_score(x: Tensor) -> Tensor:
    return x.sum(1).argsort()


def sorted_again_in_place_of_back(m: Mixture, x: Tensor) -> Tensor:
    order = by_score(x)
    return m.layer(x[order])[order]


def back_of_another_order(m: Mixture, x: Tensor) -> Tensor:
    return m.layer(x[by_score(x)])[back_of(x[:, 0].argsort())]


def back_of_descending(m: Mixture, x: Tensor) -> Tensor:
    return m.layer(x[by_score(x)])[by_score(x).argsort(descending=True)]


def back_twice(m: Mixture, x: Tensor) -> Tensor:
    back = back_of(by_score(x))
    return m.layer(x[by_score(x)])[back][back]


def never_back(m: Mixture, x: Tensor) -> Tensor:
    return m.layer(x[by_score(x)])


def order_that_is_moved(m: Mixture, x: Tensor) -> Tensor:
    order = by_score(x)
    return m.layer(x[order])[back_of((order + 1) % (B * T))]


def order_that_is_turned(m: Mixture, x: Tensor) -> Tensor:
    order = by_score(x)
    return m.layer(x[order])[back_of(order.flip(0))]


def order_with_a_place_twice(m: Mixture, x: Tensor) -> Tensor:
    order = by_score(x).clone()
    order[0] = order[1]
    return torch.zeros_like(x).index_add(0, order, m.layer(x[order]))


def back_with_a_gap(m: Mixture, x: Tensor) -> Tensor:
    order = by_score(x)
    back = torch.empty_like(order)
    back[order] = torch.arange(1, B * T + 1) % (B * T)
    return m.layer(x[order])[back]


def back_that_adds(m: Mixture, x: Tensor) -> Tensor:
    order = by_score(x)
    back = torch.ones_like(order).index_put((order,), torch.arange(B * T), accumulate=True) % (B * T)
    return m.layer(x[order])[back]


def position_as_a_value(m: Mixture, x: Tensor) -> Tensor:
    order = by_score(x)
    return (m.layer(x[order]) * torch.arange(B * T)[:, None])[back_of(order)]


def rank_as_a_value(m: Mixture, x: Tensor) -> Tensor:
    return m.layer(x) * back_of(by_score(x))[:, None]


def sorted_values(m: Mixture, x: Tensor) -> Tensor:
    return m.layer(x) * x.sum(1).sort().values[:, None]


def running_sum(m: Mixture, x: Tensor) -> Tensor:
    order = by_score(x)
    return m.layer(x[order]).cumsum(0)[back_of(order)]


def neighbours(m: Mixture, x: Tensor) -> Tensor:
    order = by_score(x)
    rows = m.layer(x[order])
    return (rows - rows.roll(1, 0))[back_of(order)]


def all_with_all(m: Mixture, x: Tensor) -> Tensor:
    order = by_score(x)
    rows = m.layer(x[order])
    return (rows @ rows.T @ rows)[back_of(order)]


def mean_of_all(m: Mixture, x: Tensor) -> Tensor:
    order = by_score(x)
    rows = m.layer(x[order])
    return (rows - rows.mean(0))[back_of(order)]


def last_one_wins(m: Mixture, x: Tensor) -> Tensor:
    order = m.routed(x)[1].flatten().argsort()
    return torch.zeros_like(x).index_put((order // K,), m.layer(x[order // K]))


def ends_of_other_numbers(m: Mixture, x: Tensor) -> Tensor:
    ordered, order = m.routed(x)[1][:, 0].sort()
    other = (x[:, :4].argmax(1)).sort().values
    return grouped(x[order], m.up, ends_of(other))[back_of(order)]


def ends_that_are_moved(m: Mixture, x: Tensor) -> Tensor:
    ordered, order = m.routed(x)[1][:, 0].sort()
    return grouped(x[order], m.up, (ends_of(ordered) - 1).clamp_min(0))[back_of(order)]


def ends_of_descending(m: Mixture, x: Tensor) -> Tensor:
    ordered, order = m.routed(x)[1][:, 0].sort(descending=True)
    return grouped(x[order], m.up, ends_of(ordered))[back_of(order)]


def equal_groups(m: Mixture, x: Tensor) -> Tensor:
    order = m.routed(x)[1][:, 0].argsort()
    return grouped(x[order], m.up, torch.arange(3, B * T + 1, 3, dtype=torch.int32))[back_of(order)]


def numbers_between(m: Mixture, x: Tensor) -> Tensor:
    """Real numbers are counted by bins of which some hold two experts' rows."""
    ordered, order = (m.router(x).amax(1).sigmoid() * 3).sort()
    return grouped(x[order], m.up, ends_of(ordered))[back_of(order)]


def capacity(m: Mixture, x: Tensor) -> Tensor:
    """Who comes too late, after other examples' tokens, is dropped."""
    chosen = F.one_hot(m.routed(x)[1][:, 0], E)
    place = (chosen.cumsum(0) * chosen).sum(1)
    return m.layer(x) * (place <= 2)[:, None]


def capacity_by_sorting(m: Mixture, x: Tensor) -> Tensor:
    order = by_score(x)[: B * T - 2]
    return torch.zeros_like(x).index_add(0, order, m.layer(x[order]))


def experts_choose(m: Mixture, x: Tensor) -> Tensor:
    scores, token = m.router(x).T.softmax(-1).topk(3, -1)
    rows = torch.einsum("ekd,edf->ekf", x[token], m.up) * scores[..., None]
    return torch.zeros_like(x).index_add(0, token.flatten(), rows.flatten(0, 1))


def how_many_there_are(m: Mixture, x: Tensor) -> Tensor:
    chosen = m.routed(x)[1][:, 0]
    share = torch.histc(chosen.float(), bins=E, min=0, max=E - 1) / (B * T)
    return m.layer(x) * share[chosen][:, None]


def how_many_by_one_hot(m: Mixture, x: Tensor) -> Tensor:
    chosen = F.one_hot(m.routed(x)[1][:, 0], E).float()
    return m.layer(x) * (chosen @ chosen.mean(0))[:, None]


def load_balancing(m: Mixture, x: Tensor) -> Tensor:
    probabilities = m.router(x).softmax(-1)
    share = F.one_hot(probabilities.argmax(-1), E).float().mean(0)
    return m.layer(x) + (share * probabilities.mean(0)).sum()


REFUSED = [
    sorted_again_in_place_of_back, back_of_another_order, back_of_descending, back_twice, never_back,
    order_that_is_moved, order_that_is_turned, order_with_a_place_twice, back_with_a_gap, back_that_adds,
    position_as_a_value, rank_as_a_value, sorted_values, running_sum, neighbours, all_with_all, mean_of_all,
    last_one_wins, ends_of_other_numbers, ends_that_are_moved, ends_of_descending, equal_groups, numbers_between,
    capacity, capacity_by_sorting, experts_choose, how_many_there_are, how_many_by_one_hot, load_balancing,
]  # fmt: skip


IN_CI = {
    sorted_again_in_place_of_back, back_of_another_order, order_with_a_place_twice, back_with_a_gap, rank_as_a_value,
    neighbours, ends_that_are_moved, capacity, experts_choose, how_many_there_are,
}  # fmt: skip


@pytest.mark.parametrize(
    "function", [pytest.param(f, id=f.__name__, marks=[] if f in IN_CI else pytest.mark.slow) for f in REFUSED]
)
def test_rows_that_meet(function: Sorting) -> None:
    torch.manual_seed(0)
    private: Any = dp_compile(Mixture(function), backend="eager", dynamic=False)
    with pytest.raises(DPCompileError, match=r"mixes examples|no rule for|not understood") as caught:
        private(torch.randn(B, T, D)).sum().backward()
    lines = function.__code__.co_firstlineno, max(n for *_, n in function.__code__.co_lines() if n)
    place = int(str(caught.value).partition("test_sorted_rows.py:")[2].partition(",")[0])
    helpers = range(by_score.__code__.co_firstlineno, by_score.__code__.co_firstlineno + 3)
    assert lines[0] <= place <= lines[1] or place in helpers or place < 70, str(caught.value)
    assert "what to do: " in str(caught.value)
