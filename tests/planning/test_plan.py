"""The planner: costs, the search, memory, rates, and the rules that it chooses among."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn

from dpcompile import PrivacyError, UnsupportedGraphError, dp_compile
from dpcompile.graph.labels import Examples
from dpcompile.kernels.workspace import Workspace
from dpcompile.module import engine_of
from dpcompile.norms.convolutions import Window, patch_columns, patch_gram
from dpcompile.norms.ghost import Sides, ghost
from dpcompile.planning.modes import MODES
from dpcompile.planning.replay import Holding, Replay, _Life
from dpcompile.planning.search import Candidate, Limit, choose, fastest, seconds_of
from dpcompile.runtime.first_step import FirstStep


class Mixture(nn.Module):
    """A site of every kind: a tied table, linear layers on one input, a convolution, norms and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.filters = nn.LayerNorm(8), nn.Conv1d(8, 8, 3, padding=1, groups=2)

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to ``[B, T, 11]``."""
        x = self.table(ids)
        x = self.norm(self.q(x) * self.k(x).tanh())
        return self.filters(x.mT).mT @ self.table.weight.T


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).square().mean((1, 2))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_clipped_sums(mode: str) -> None:
    model, ids = Mixture(), torch.randint(0, 11, (5, 7))
    private: Any = dp_compile(copy.deepcopy(model), backend="eager", norm=mode, max_grad_norm=0.3)
    losses(private, ids).mean().backward()
    found = per_example_gradients(model, [ids], {}, lambda output, _: output.square().mean((1, 2)))
    each = {name: g.float() for name, g in found.items()}
    norms = torch.stack([g.square().flatten(1).sum(1) for g in each.values()]).sum(0).sqrt()
    torch.testing.assert_close(private.grad_norms, norms, rtol=1e-4, atol=1e-6)
    weights = (0.3 / norms).clamp_max(1)
    for name, p in private.named_parameters():
        torch.testing.assert_close(p.grad, torch.einsum("b,b...->...", weights, each[name]), rtol=1e-3, atol=1e-5)


def test_published_modes_choose_by_the_published_rule() -> None:
    """2T^2 < pd chooses between ghost and instantiation (Bu et al. 2022, section 4.2)."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 64))
    private: Any = dp_compile(net, backend="eager", norm="bk_mix_opt")
    private.trace(torch.randn(3, 6, 4))  # 2 * 36 = 72: above 16, below 256
    rules = private.plan.rules()
    assert rules["0.weight"] == "keep" and rules["1.weight"] == "ghost"
    assert "norm='bk_mix_opt'" in str(private.plan)


def test_a_second_backward_refuses_sums_inside_the_model() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).square().sum()

    private: Any = dp_compile(Summed(), backend="eager", norm="ghost_clipping", loss_reduction="sum")
    with pytest.raises(UnsupportedGraphError, match=r"second backward cannot reweight.*\n.*\n?.*book_keeping"):
        private(torch.randn(4, 2, 3))


def test_a_nan_leaves_no_trace_in_a_second_backward() -> None:
    model, ids = Mixture(), torch.randint(1, 11, (5, 7))
    ids[2] = 0
    with torch.no_grad():
        model.table.weight[0, 0] = float("nan")  # only example 2 looks it up; the head would spread it
    net = nn.Sequential(model.table, nn.Linear(8, 3))
    private: Any = dp_compile(net, backend="eager", norm="ghost_clipping")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        private(ids).square().mean((1, 2)).mean().backward()
    assert torch.isnan(private.grad_norms[2]) and torch.isfinite(private.grad_norms[[0, 1, 3, 4]]).all()
    assert all(torch.isfinite(p.grad).all() for p in private.parameters())


# --- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("panels", [1, 2, 3, 8])
@pytest.mark.parametrize("one_hot", [None, "rows", "cols"])
def test_panels_give_the_same_norm(panels: int, one_hot: str | None) -> None:
    rows, cols, index = torch.randn(3, 1, 17, 5), torch.randn(3, 1, 17, 4), torch.randint(0, 5, (3, 17))
    hot = torch.nn.functional.one_hot(index, 5).float().unsqueeze(1)
    sides = {None: Sides(rows, cols), "rows": Sides(index, cols, "rows"), "cols": Sides(cols, index, "cols")}[one_hot]
    dense = {None: (rows, cols), "rows": (hot, cols), "cols": (cols, hot)}[one_hot]
    truth = torch.matmul(dense[0].double().mT, dense[1].double()).square().flatten(1).sum(1)
    found = ghost([sides], panels)
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-6)
    assert (found.double() >= truth * (1 - 1e-7)).all()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, 2, 2), (3, 1, 1)])
@pytest.mark.parametrize("frames", [1, 2])
def test_gram_matrices_of_patches_from_those_of_pixels(
    groups: int, stride: int, padding: int, dilation: int, frames: int
) -> None:
    images = torch.randn(3 * frames, 4, 7, 6, dtype=torch.float64)
    window = Window((3, 2), (stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)
    filters = torch.zeros(groups, 4 // groups, 3, 2, dtype=torch.float64)
    spatial = torch.nn.functional.conv2d(images, filters, None, stride, padding, dilation, groups).shape[2:]
    axis = Examples(0, inner=frames)
    columns = patch_columns(images, window, axis, 3, spatial)
    torch.testing.assert_close(patch_gram(images, window, axis, 3, spatial), columns @ columns.mT)


# --- the search ------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> list[list[Candidate]]:
    seconds = st.integers(1, 20).map(float)
    keys = st.dictionaries(st.sampled_from("abc"), seconds, max_size=2)
    shared = {k: float(i + 3) for i, k in enumerate("abc")}
    options = []
    for _ in range(draw(st.integers(1, 4))):
        options.append(
            [
                Candidate(f"{n}", draw(seconds), 0.0, {k: shared[k] for k in draw(keys)},
                          Holding({}, (), float(draw(st.integers(0, 50))), 0.0, 0.0))
                for n in range(draw(st.integers(1, 3)))
            ]
        )  # fmt: skip
    return options


@given(problems())
@settings(max_examples=200, deadline=None)
def test_no_single_change_of_the_fastest_choice_is_faster(options: list[list[Candidate]]) -> None:
    picks = fastest(options)
    best = seconds_of(options, picks)
    for i, candidates in enumerate(options):
        for n in range(len(candidates)):
            assert seconds_of(options, [*picks[:i], n, *picks[i + 1 :]]) >= best - 1e-9


def test_sites_that_share_a_gram_matrix_change_together() -> None:
    each = [Candidate("ghost", 0.0, 0.0, {"a": 5.0, i: 0.5}) for i in range(3)]
    options = [[c, Candidate("keep", 3.0)] for c in each]
    assert fastest(options) == [0, 0, 0]


@given(problems(), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_a_limit_holds_or_the_smallest_is_taken(options: list[list[Candidate]], budget: int) -> None:
    limit = Limit(Replay((), 0, 0.0, 0.0, {}, {}, {}, 1, 0.0, 0.0), float(budget), [1], 0.0)
    outcome = choose(options, limit)

    def peak(picks: tuple[int, ...] | list[int]) -> float:
        return limit.peak([o[i].holding for o, i in zip(options, picks, strict=True)], 1)

    every = list(itertools.product(*(range(len(o)) for o in options)))
    assert outcome.fits == any(1.01 * peak(p) <= budget for p in every)
    assert 1.01 * peak(outcome.picks) <= budget if outcome.fits else peak(outcome.picks) == min(map(peak, every))


# --- memory and parts ------------------------------------------------------------------------------------------------


def deep() -> nn.Module:
    inside = (nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64))
    return nn.Sequential(*inside, nn.LayerNorm(64), nn.Linear(64, 3))


def test_check_compares_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first try asked for parts and did not run."""
    compared: list[int] = []
    monkeypatch.setattr(FirstStep, "compare", lambda self, norms, mask, sums, bound: compared.append(len(mask)))
    private: Any = dp_compile(deep(), backend="eager", memory_budget=1.0, check=True)
    for _ in range(2):
        private(torch.randn(32, 50, 64)).square().mean().backward()
        private.zero_grad()
    assert private.plan.parts > 1 and compared == [32 // private.plan.parts] * private.plan.parts


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_parts_give_what_the_whole_batch_gives(reduction: str) -> None:
    model, x = deep(), torch.randn(32, 50, 64)
    options: dict[str, Any] = dict(backend="eager", max_grad_norm=0.05, loss_reduction=reduction)
    whole: Any = dp_compile(copy.deepcopy(model), **options)
    parted: Any = dp_compile(copy.deepcopy(model), memory_budget=1.0, check=True, **options)
    mask = torch.ones(32, dtype=torch.bool)
    mask[[3, 31]] = False
    for private in (whole, parted):
        engine_of(private).set_mask(mask)
        loss = private(x).square().mean((1, 2))
        (loss.mean() if reduction == "mean" else loss.sum()).backward()
    assert parted.plan.parts > 1 and "the batch runs in" in str(parted.plan)
    torch.testing.assert_close(parted.grad_norms, whole.grad_norms, rtol=1e-5, atol=1e-6)
    for p, q in zip(parted.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_two_calls_in_parts_before_one_backward_are_refused() -> None:
    private: Any = dp_compile(deep(), backend="eager", memory_budget=1.0)
    x = torch.randn(32, 50, 64)
    outputs = private(x), private(x)
    assert private.plan.parts > 1
    with pytest.raises(PrivacyError, match="called twice before one backward"):
        (outputs[0].square().mean() + outputs[1].square().mean()).backward()


def test_a_second_backward_through_parts_is_refused() -> None:
    private: Any = dp_compile(deep(), backend="eager", memory_budget=1.0)
    loss = private(torch.randn(32, 50, 64)).square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="second backward through the same forward"):
        loss.backward()


def test_no_part_of_a_refused_backward_delivers() -> None:
    private: Any = dp_compile(deep(), backend="eager", memory_budget=1.0)
    x = torch.randn(32, 50, 64)
    engine_of(private).set_mask(torch.ones(32, dtype=torch.bool))
    private(x).square().mean().backward()
    engine_of(private).ledger.clear()
    private.zero_grad()
    loss = private(x).square().mean()
    assert private.plan.parts > 1
    with pytest.raises(PrivacyError, match="a second backward on one batch of the loader"):
        loss.backward()
    assert not engine_of(private).ledger.deliveries and all(p.grad is None for p in private.parameters())


def test_results_that_cannot_be_joined_are_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = deep()

        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return self.inner(x), len(x)

    private: Any = dp_compile(Counts(), backend="eager", memory_budget=1.0)
    with pytest.raises(UnsupportedGraphError, match=r"returns int that cannot be put together[^$]*memory_budget=None"):
        private(torch.randn(32, 50, 64))


def test_an_object_of_each_part_is_told_of_where_it_is_read() -> None:
    class Cache:
        seen = 32

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = deep()

        def forward(self, x: Tensor) -> tuple[Tensor, Cache]:
            return self.inner(x), Cache()

    private: Any = dp_compile(Caching(), backend="eager", memory_budget=1.0)
    out, cache = private(torch.randn(32, 50, 64))
    out.square().mean().backward()
    assert private.plan.parts > 1 and cache is not None
    with pytest.raises(UnsupportedGraphError, match="each returned a Cache of its own[^$]*without memory_budget"):
        cache.seen  # noqa: B018


def test_a_replay_counts_what_lives() -> None:
    """Three kept squares: the peak is the start of the backward."""
    net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    private: Any = dp_compile(net, backend="eager", memory_budget=100.0)
    private.trace(torch.randn(4, 1000, 32))
    expected = private.plan.prediction
    activations = 4 * 1000 * 32 * 4
    assert 4 * activations <= expected.plain_peak <= 7 * activations
    assert expected.peak >= expected.plain_peak - 3 * 33 * 32 * 4


def test_over_the_budget_the_fewest_parts_that_come_near_to_the_smallest() -> None:
    plain = Replay((), 0, 0.0, 0.0, {"x": _Life(0, 1, 8.0, True)}, {}, {}, 1, 0.0, 100.0)
    options = [[Candidate("keep", 1.0)]]
    outcome = choose(options, Limit(plain, 50.0, [1, 2, 4, 8], 0.0))
    assert not outcome.fits
    assert [plain.peak([], parts) for parts in (1, 2, 8)] == [108, 104, 101]
    assert outcome.parts == 2


def test_what_is_made_of_parameters_does_not_shrink_with_the_batch() -> None:
    """Neither in the forward's peak nor where it waits for the backward: every part's forward makes it anew."""
    before = (_Life(1, 2, 10.0, False), _Life(2, 2, 20.0, True))
    plain = Replay(before, 2, 8.0, 10.0, {}, {}, {}, 1, 3.0, 100.0)
    assert plain.plain_peak() == 100 + 10 + 20
    assert plain.plain_peak(seen=4) == 100 + 10 + 80
    assert plain.peak([]) == 100 + 10 + 20
    assert plain.peak([], parts=4) == 100 + 10 + 20 / 4 + 3 * (8 / 4 + 10)
    assert plain.peak([], parts=4, seen=4) == 100 + 10 + 20 + 3 * (8 + 10)


def test_a_fused_value_has_memory_where_it_is_held() -> None:
    lives = {"x": _Life(1, 2, 0.0, True), "y": _Life(2, 3, 5.0, True)}
    plain = Replay((), 0, 0.0, 0.0, lives, {"x": 1, "y": 2}, {n: n for n in lives}, 3, 1.0, 0.0)
    assert plain.plain_peak() == 5
    assert plain.peak([Holding({"x": 40.0}, ("y",), 0.0, 2.0, 1.0)]) == 40 + 5 + 2


def test_an_accumulation_by_index_reads_no_memory_that_its_loop_can_compute() -> None:
    """Word vectors are looked up in the loop of their mean, and its cotangent is spread in the loop that adds it up."""
    table, index, vectors = 200 * 16 * 4, 4 * 500 * 8, 4 * 500 * 16 * 4
    for between, alike in ((nn.Identity(), True), (nn.Tanh(), False)):
        net = nn.Sequential(nn.Embedding(200, 16), between, Mean(), nn.Linear(16, 2))
        private: Any = dp_compile(net, backend="eager", norm="ghost", memory_budget=100.0)
        private.trace(torch.randint(0, 200, (4, 500)))
        expected = private.plan.prediction
        if alike:  # for all positions: ours needs one for each example, and the index once more
            assert 2 * table + index < expected.plain_peak < 2.2 * table + index
            assert expected.peak < expected.plain_peak + 1.2 * index
        else:
            assert expected.peak > vectors


class Mean(nn.Module):
    """Over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Narrowing(nn.Module):
    """Many positions first, few behind: at few, per-example gradients are larger than what they are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.many, self.few = nn.Linear(96, 96, bias=False), nn.Linear(96, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.few(torch.sin(torch.tanh(self.many(torch.tanh(x)))[:, :8]))


def test_kept_gradients_are_made_late_where_that_is_smaller() -> None:
    """Under a budget that asks for it: behind everything else of the backward."""
    model, x, loss = Narrowing(), torch.randn(2, 300, 96), PseudoLoss(2)
    truth = clip(per_example_gradients(model, (x,), {}, loss), 0.5)
    budget: float | int = 100.0
    for late in (False, True):
        private: Any = dp_compile(model, max_grad_norm=0.5, norm="instantiate", backend="eager", memory_budget=budget)
        train_step(private, (x,), {}, loss)
        assert_right(private, truth, 1e-5)
        assert next(c.late for c in private.plan.choices if c.gradient.name == "few.weight") == late
        nodes = list(private.graph.graph.nodes)
        made = next(
            i for i, n in enumerate(nodes) if "product_with" in str(n.target) and n.meta["val"][0].shape[2] == 48
        )
        assert (made > max(i for i, n in enumerate(nodes) if n.target is torch.ops.aten.mm.default)) == late
        budget = int(private.plan.prediction.peak)
        private.zero_grad()


def test_a_replay_of_late_gradients() -> None:
    """They take the place of their own operands, one after the other, and all wait for the clip."""
    lives = {"x": _Life(0, 1, 10.0, True), "y": _Life(0, 2, 20.0, True), "z": _Life(1, 4, 5.0, True)}
    plain = Replay((), 0, 0.0, 0.0, lives, {"x": 0, "y": 0}, {n: n for n in lives}, 4, 1.0, 0.0)
    early = [Holding({}, ("x",), 100.0, 0.0, 1.0), Holding({}, ("y",), 200.0, 0.0, 1.0)]
    late = [Holding({"x": 10.0}, (), 100.0, 0.0, 1.0), Holding({"y": 20.0}, (), 200.0, 0.0, 1.0)]
    assert plain.peak(early) == 10 + 20 + 5 + 300
    assert plain.peak(late) == 10 + 300
    assert plain.peak(late, parts=2) == (10 + 300) / 2 + 1.0


def test_workspace_never_hands_out_what_is_held() -> None:
    work = Workspace()
    like = torch.empty(1)
    first = work.take((2**19,), like)
    view = first[:10]
    view.fill_(7.0)
    del first
    assert work.take((2**19,), like).data_ptr() != view.data_ptr()
    place = view.data_ptr()
    del view
    assert work.take((2**18, 2), like).data_ptr() == place
    assert work.bytes == 2 * 2**19 * 4
    work.release()
    assert work.bytes == 0
