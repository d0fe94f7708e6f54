"""A C for each layer or block, that follows its own quantile: the same as a slow loop, and what all together cost."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from block_models import GPT, ids
from dp_accounting import ComposedDpEvent, GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import PseudoLoss, per_example_gradients, train_step
from small_models import labelled, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpcompile
from dpcompile import AdaptiveClip, DPOptimizer, PrivacyAccountant, PrivacyError, compile_step, dp_compile, make_private
from dpcompile.clipping.groups import Bounds, clip_groups
from dpcompile.module import engine_of
from dpcompile.noise.adaptive import AdaptiveGaussianMechanism
from dpcompile.noise.counter import Stream
from dpcompile.noise.normal import gaussian
from dpcompile.runtime.bound import votes_within

B, SIGMA, SEED, K = 9, 0.8, 11, 3
CLIP = AdaptiveClip(quantile=0.4, learning_rate=0.5, initial=0.3, count_noise=2.0)
LAYERS = {"0": ["0.weight", "0.bias"], "2.0": ["2.0.weight", "2.0.bias"], "3": ["3.weight", "3.bias"]}
BLOCKS = {"0": LAYERS["0"], "2": LAYERS["2.0"], "3": LAYERS["3"]}


def wrapped(module: nn.Module, clip: AdaptiveClip = CLIP, **options: Any) -> tuple[Any, DPOptimizer]:
    options = {"backend": "eager", "clipping": "per_layer", **options}
    model = dp_compile(module, **options)
    accountant = PrivacyAccountant(noise_multiplier=SIGMA, sample_rate=0.1)
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.1),
        model,
        noise_multiplier=SIGMA,
        expected_batch_size=B,
        seed=SEED,
        accountant=accountant,
        adaptive_clip=clip,
    )
    return model, optimizer


def batch(step: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(step)
    return torch.randn(B, 6), torch.randint(0, 3, (B,))


class Reference:
    """One backward per example, and the rest in NumPy, float64."""

    def __init__(self, module: nn.Module, groups: dict[str, list[str]], clip: AdaptiveClip = CLIP) -> None:
        self.module, self.groups, self.clip, self.step = copy.deepcopy(module), groups, clip, 0
        assert clip.initial is not None and clip.count_noise is not None
        self.count_noise = clip.count_noise
        self.bounds = {group: clip.initial / np.sqrt(len(groups)) for group in groups}
        self.scale = 1 / np.sqrt(1 / SIGMA**2 - len(groups) / (4 * clip.count_noise**2))

    def __call__(self, x: Tensor, y: Tensor, of_user: int = 1) -> None:
        found = per_example_gradients(
            self.module, [x], {}, lambda out, rows: F.cross_entropy(out, y[rows], reduction="none"), in_dims=0
        )
        each = {n: g.double().numpy().reshape(-1, of_user, *g.shape[1:]).sum(1) for n, g in found.items()}
        total = np.sqrt(sum(c**2 for c in self.bounds.values()))
        parameters, noised = dict(self.module.named_parameters()), {}
        within = {}
        for group, names in self.groups.items():
            norms = np.sqrt(sum((each[n] ** 2).reshape(len(each[n]), -1).sum(1) for n in names))
            weights = np.minimum(1, self.bounds[group] / norms)
            within[group] = (norms <= self.bounds[group]).sum()
            for n in names:
                i = list(parameters).index(n)
                drawn = gaussian(SEED, step=self.step, parameter=i, numel=each[n][0].size, dtype=torch.float64)
                clipped = np.tensordot(weights, each[n], 1)
                noised[n] = clipped + self.scale * total * drawn.numpy().reshape(clipped.shape)
        with torch.no_grad():
            for n, value in noised.items():
                parameters[n].sub_(torch.from_numpy(0.1 * value / B).float())
        z = gaussian(
            SEED, step=self.step, parameter=0, numel=len(self.groups), dtype=torch.float64, stream=Stream.VOTES
        )
        for k, group in enumerate(self.groups):
            share = 0.5 + (within[group] - len(x) / of_user / 2 + self.count_noise * z[k].item()) / B
            self.bounds[group] *= np.exp(-self.clip.learning_rate * (share - self.clip.quantile))
        self.step += 1


def bounds_of(optimizer: DPOptimizer) -> dict[str, float]:
    now = optimizer.engine.clip.now
    return now.of(tuple(now.shares))


def agree(optimizer: DPOptimizer, reference: Reference, module: nn.Module) -> None:
    assert bounds_of(optimizer) == pytest.approx(reference.bounds, rel=1e-6)
    assert optimizer.max_grad_norm == pytest.approx(math.hypot(*reference.bounds.values()), rel=1e-6)
    assert optimizer.mechanism.max_grad_norm == optimizer.max_grad_norm
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.float(), dict(reference.module.named_parameters())[name], rtol=1e-4, atol=1e-5)


WAYS: dict[str, dict[str, Any]] = {
    "graph": {},
    "blocks": {"clipping": "per_block"},
    "ghost": {"norm": "ghost"},
    "a second backward": {"norm": "two_pass"},
    "at once": {"regions": "blocks"},
    "blocks at once": {"regions": "blocks", "clipping": "per_block"},
    "deferred": {"regions": "breaks"},
    "a sum": {"loss_reduction": "sum"},
    "the first step compared": {"check": True},
    "a second backward in regions": {"regions": "blocks", "norm": "two_pass"},
    "inductor": {"backend": "inductor"},
    "regions by inductor": {"regions": "blocks", "backend": "inductor"},
}


@pytest.mark.parametrize("way", WAYS)
def test_steps_are_those_of_the_slow_loop(way: str) -> None:
    options = WAYS[way]
    module = net()
    reference = Reference(module, BLOCKS if options.get("clipping") == "per_block" else LAYERS)
    model, optimizer = wrapped(module, **options)
    bounds = set()
    for step in range(5):
        x, y = batch(step)
        F.cross_entropy(model(x), y, reduction=options.get("loss_reduction", "mean")).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference(x, y)
        agree(optimizer, reference, module)
        bounds.add(tuple(bounds_of(optimizer).values()))
    assert len(bounds) == 5 and all(len(set(b)) == K for b in bounds)
    assert optimizer.accountant is not None and optimizer.accountant.history == [(SIGMA, 0.1, 5)]


def test_the_compiled_step_does_the_same() -> None:
    module = net()
    reference = Reference(module, LAYERS)
    model, optimizer = wrapped(module)
    step = compile_step(model, F.cross_entropy, optimizer)
    for i in range(3):
        step(*batch(i))
        reference(*batch(i))
        agree(optimizer, reference, module)


@pytest.mark.parametrize("options", [{}, {"regions": "blocks"}])
def test_physical_batches_of_a_step_vote_together(options: dict[str, Any]) -> None:
    module = net()
    reference = Reference(module, LAYERS)
    model, optimizer = wrapped(module, **options)
    for i in range(3):
        x, y = batch(i)
        for rows in (slice(0, 4), slice(4, 5), slice(5, B)):
            optimizer.accumulating = rows.stop < B
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        reference(x, y)
        agree(optimizer, reference, module)


def test_users_vote_and_a_scaled_loss_changes_nothing() -> None:
    module = net()
    clip = AdaptiveClip(quantile=0.4, learning_rate=0.5, initial=2.5, count_noise=2.0)
    reference = Reference(module, LAYERS, clip)
    model, optimizer = wrapped(module, clip, examples_per_user=3)
    votes = set()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(3):
        x, y = batch(i)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        assert optimizer.engine.ledger.votes is not None
        votes.update(optimizer.engine.ledger.votes.tolist())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        reference(x, y, of_user=3)
        agree(optimizer, reference, module)
    assert len(votes) > 2 and votes <= {-3, -1, 1, 3}


class Narrow(nn.Module):
    """Parameters of bfloat16 beside others: their sums leave the graph behind the norms of the groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(6, 8).bfloat16(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.bfloat16()).float().tanh())


@pytest.mark.full
def test_narrow_parameters_and_parts_of_a_batch() -> None:
    """Against the same model at fixed bounds: what the votes made of them, without noise."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    wanted = {}
    ways: list[dict[str, Any]] = [{}, {"memory_budget": 1}, {"regions": "blocks"}]
    for options in ways:
        model = dp_compile(Narrow(), clipping="per_layer", backend="eager", max_grad_norm=0.4, **options)
        inner = torch.optim.SGD(model.parameters(), lr=0.0)
        clip = AdaptiveClip(learning_rate=1.0)
        optimizer = DPOptimizer(inner, model, noise_multiplier=0.0, expected_batch_size=8, adaptive_clip=clip)
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        found = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        bounds = bounds_of(optimizer)
        each = per_example_gradients(
            Narrow(), [x], {}, lambda out, rows: F.cross_entropy(out, y[rows], reduction="none"), in_dims=0
        )
        for group, bound in bounds.items():
            names = [n for n in each if n.startswith(group)]
            norms = sum(each[n].double().square().reshape(8, -1).sum(1) for n in names).sqrt()  # type: ignore[union-attr]
            for n in names:
                truth = torch.tensordot((bound / norms).clamp_max(1), each[n].double(), 1)
                torch.testing.assert_close(found[n].double(), truth, rtol=2e-2, atol=2e-3)
        assert len(set(bounds.values())) == 2
        assert bounds == pytest.approx(wanted or bounds, rel=1e-6)
        wanted = bounds


def test_nothing_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpcompile.regions import region
    from dpcompile.runtime import engine

    compiled = []
    for where in (engine, region):
        original = where.compile_joint
        monkeypatch.setattr(where, "compile_joint", lambda *a, o=original, **k: compiled.append(1) or o(*a, **k))
    ways: list[dict[str, Any]] = [{}, {"regions": "blocks"}]
    for options in ways:
        model, optimizer = wrapped(net(), **options)
        model.trace(batch(0)[0])  # before there is a vote; nor does a C by hand compile anything
        F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
        count = len(compiled)
        for i in range(3):
            optimizer.step()
            optimizer.zero_grad()
            optimizer.max_grad_norm = 0.2 + i
            F.cross_entropy(model(batch(i)[0]), batch(i)[1]).backward()
        assert len(compiled) == count > 0


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 20), st.floats(1, 1e5), st.integers(1, 40), st.floats(0.51, 1e3), st.randoms())
def test_all_releases_together_cost_what_sigma_says(
    sigma: float, batch_size: float, k: int, more: float, random: Any
) -> None:
    """The worst difference of two neighbours, measured in the noise's own covariance."""
    bounds = Bounds.each({f"layer {i}": random.uniform(0.01, 10) for i in range(k)})
    for noise in (None, more * sigma * math.sqrt(k)):
        clip = AdaptiveClip(count_noise=noise)
        mechanism = AdaptiveGaussianMechanism(sigma, bounds.total, batch_size, 0, clip=clip, shares=bounds.shares)
        difference = np.array([*bounds.of(tuple(bounds.shares)).values(), *[0.5] * k])  # one direction of each group
        std = np.array([mechanism.std] * k + [mechanism.count_std] * k)
        assert np.linalg.norm(difference / std) == pytest.approx(1 / sigma, rel=1e-6)
        assert mechanism.std >= bounds.total * sigma


@pytest.mark.parametrize("k", [1, 2, 5, 50])
def test_the_split_of_the_noise(k: int) -> None:
    """By formula, and by composing the sums with k counts as mechanisms of their own, which costs the same."""
    shares = Bounds.equal(1.0, [str(i) for i in range(k)]).shares
    mechanism = AdaptiveGaussianMechanism(1.0, 1.0, 256.0, 0, clip=AdaptiveClip(count_noise=12.8), shares=shares)
    assert mechanism.std == pytest.approx((1 - k / 655.36) ** -0.5, rel=1e-9)
    assert mechanism.std == pytest.approx({1: 1.00076, 2: 1.00153, 5: 1.00384, 50: 1.04048}[k], abs=5e-6)
    one, other = RdpAccountant(), RdpAccountant()
    one.compose(GaussianDpEvent(1.0))
    counts = SelfComposedDpEvent(GaussianDpEvent(mechanism.count_std / 0.5), k)
    other.compose(ComposedDpEvent([GaussianDpEvent(mechanism.std), counts]))
    assert other.get_epsilon(1e-5) == pytest.approx(one.get_epsilon(1e-5), rel=1e-9)


def test_the_noise_of_small_batches_is_that_of_one_count() -> None:
    shares = Bounds.equal(1.0, [str(i) for i in range(100)]).shares
    many = AdaptiveGaussianMechanism(1.0, 1.0, 8.0, 0, shares=shares)
    assert many.count_std == 20.0 and many.std == pytest.approx(16 / math.sqrt(240), rel=1e-9)
    assert many.std == pytest.approx(AdaptiveGaussianMechanism(1.0, 1.0, 8.0, 0).std, rel=1e-9)
    none = AdaptiveGaussianMechanism(0.0, 1.0, 8.0, 0, shares=shares)
    assert none.std == none.count_std == 0.0


def test_each_count_has_its_own_noise() -> None:
    shares = Bounds.equal(1.0, ["a", "b"]).shares
    clip = AdaptiveClip(learning_rate=1.0, count_noise=7.0)
    mechanism = AdaptiveGaussianMechanism(1.0, 1.0, 100.0, 5, clip=clip, shares=shares)
    moved = [mechanism.next_bounds([0, 0], step).of("ab") for step in range(1500)]
    found = np.array([[-100 * math.log(m[g] * math.sqrt(2)) for g in "ab"] for m in moved])
    assert found.mean(0) == pytest.approx(0, abs=0.5) and found.std(0) == pytest.approx(7.0, rel=0.05)
    assert abs(np.corrcoef(found.T)[0, 1]) < 0.06


def test_one_example_moves_every_count_by_one() -> None:
    bounds = Bounds.each({"a": 1.0, "b": 2.0, "absent": 0.5})
    norms = {"a": torch.tensor([0.5, 2.0, math.nan, math.inf]), "b": torch.tensor([2.0, 2.0, 3.0, 0.0])}
    every = votes_within(norms, torch.ones(4), bounds)
    assert every.tolist() == [1 - 3, 3 - 1, 4]
    for i in range(4):
        mask = torch.ones(4)
        mask[i] = 0
        assert (votes_within(norms, mask, bounds) - every).abs().tolist() == [1, 1, 1]
    assert votes_within(norms, torch.zeros(4), bounds).tolist() == [0, 0, 0]


@pytest.mark.parametrize("options", [{}, {"regions": "blocks"}, {"regions": "breaks"}, {"norm": "two_pass"}])
def test_one_example_changes_the_sum_by_no_more_than_c(options: dict[str, Any]) -> None:
    """Group by group, at bounds that differ: whatever one example is."""
    module = net()
    model, optimizer = wrapped(module, AdaptiveClip(initial=0.3), **options)
    optimizer.move_bounds(Bounds.each({"0": 0.01, "2.0": 0.4, "3": 0.07}))
    x, y = batch(0)
    x[0] *= 3
    found = []
    for mask in (torch.ones(B, dtype=torch.bool), torch.arange(B) > 0):
        optimizer.discard()
        dpcompile.set_mask(model, mask)
        F.cross_entropy(model(x), y).backward()
        found.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})
    for group, bound in bounds_of(optimizer).items():
        squares = sum((found[0][n] - found[1][n]).double().square().sum() for n in LAYERS[group])
        assert math.sqrt(squares) <= bound * (1 + 1e-5)
        assert group != "0" or math.sqrt(squares) > 0.9 * bound


def steps(model: Any, optimizer: DPOptimizer, which: range) -> None:
    for i in which:
        x, y = batch(i)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"regions": "blocks"}])
def test_a_resumed_run_goes_on_exactly(options: dict[str, Any]) -> None:
    module = net()
    model, optimizer = wrapped(module, **options)
    steps(model, optimizer, range(3))
    saved = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, range(3, 6))
    other = net()
    resumed, following = wrapped(other, **options)
    other.load_state_dict(saved[0])
    following.load_state_dict(saved[1])
    assert following.state_dict()["dpcompile"] == saved[1]["dpcompile"]
    steps(resumed, following, range(3, 6))
    assert bounds_of(following) == bounds_of(optimizer) and len(set(bounds_of(optimizer).values())) == K
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shares", [{"0": 1.0}, {}, {"0": 0.5, "2.0": 0.5, "4": 0.5}, {"": 1.0}])
def test_a_state_of_other_groups_is_refused(shares: dict[str, float]) -> None:
    _, optimizer = wrapped(net())
    state = copy.deepcopy(optimizer.state_dict())
    state["dpcompile"]["clip_shares"] = shares
    with pytest.raises(
        PrivacyError, match=r"(?s)bounds followed quantiles of .* in the saved run, and do of 3 clip gr"
    ):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("part", [0.0, -0.1, math.nan, math.inf, 2.0, "1", None])
def test_a_state_with_bounds_that_are_none_is_refused(part: Any) -> None:
    _, optimizer = wrapped(net())
    before = optimizer.engine.clip.now
    state = copy.deepcopy(optimizer.state_dict())
    state["dpcompile"]["clip_shares"]["3"] = part
    with pytest.raises(PrivacyError, match=r"(bounds of the clip groups are|'clip_shares' of the DPOptimizer's state)"):
        optimizer.load_state_dict(state)
    assert optimizer.engine.clip.now is before


def test_a_run_with_one_c_is_not_resumed_by_groups() -> None:
    _, flat = wrapped(net(), clipping="flat")
    _, optimizer = wrapped(net())
    with pytest.raises(
        PrivacyError, match=r"quantiles of one clip group of all in .* of 3 clip groups \('0', '2.0', '3'"
    ):
        optimizer.load_state_dict(flat.state_dict())
    with pytest.raises(
        PrivacyError, match=r"(?s)of 3 clip groups .* saved run, and do of one clip group.*the clipping"
    ):
        flat.load_state_dict(optimizer.state_dict())


@pytest.mark.full
def test_c_by_hand_scales_all_bounds() -> None:
    module = net()
    reference = Reference(module, LAYERS)
    model, optimizer = wrapped(module)
    steps(model, optimizer, range(2))
    before = bounds_of(optimizer)
    optimizer.max_grad_norm = 2.0 * optimizer.max_grad_norm
    assert bounds_of(optimizer) == pytest.approx({g: 2 * c for g, c in before.items()}, rel=1e-12)
    for i in range(2):
        reference(*batch(i))
    reference.bounds = {g: 2 * c for g, c in reference.bounds.items()}
    reference(*batch(5))
    steps(model, optimizer, range(5, 6))
    agree(optimizer, reference, module)


def test_moving_bounds_between_backward_and_step_is_refused() -> None:
    model, optimizer = wrapped(net())
    x, y = batch(0)
    loss = F.cross_entropy(model(x), y)
    now = optimizer.engine.clip.now
    other = Bounds(now.total, dict(zip(now.shares, (0.1, 0.2, 0.3), strict=True)))  # the same C
    optimizer.move_bounds(other)
    with pytest.raises(PrivacyError, match="was changed between a forward"):
        loss.backward()
    optimizer.discard()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(PrivacyError, match="between a backward, clipped to"):
        optimizer.move_bounds(now)


def test_layers_frozen_or_unfrozen_are_refused() -> None:
    module = net()
    model, optimizer = wrapped(module)
    steps(model, optimizer, range(1))
    module[3].requires_grad_(False)  # type: ignore[index]
    x, y = batch(1)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(
        PrivacyError, match=r"(?s)moves the bounds of 3 clip groups .* parameters in 2 clip groups .*new"
    ):
        optimizer.step()
    optimizer.discard()
    module[3].requires_grad_(True)  # type: ignore[index]
    module[0].bias.requires_grad_(False)  # type: ignore[index]
    module[0].bias.grad = None  # type: ignore[index]
    steps(model, optimizer, range(1, 2))  # the group is still there


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"regions": "blocks"}])
def test_a_layer_without_a_bound_is_refused_before_its_sum_is_made(options: dict[str, Any]) -> None:
    module = net()
    module[0].requires_grad_(False)  # type: ignore[index]
    model, _ = wrapped(module, **options)
    module[0].requires_grad_(True)  # type: ignore[index]
    x, y = batch(0)
    with pytest.raises(PrivacyError, match=r"(?s)no bound is known for the clip group '0'.*a new one after unfreezing"):
        F.cross_entropy(model(x), y).backward()
    assert module[0].weight.grad is None  # type: ignore[index]


def test_a_mechanism_of_other_groups_is_refused() -> None:
    model = dp_compile(net(), clipping="per_layer", backend="eager")
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        PrivacyError, match=r"(?s)bounds of one clip group of all, and .* in 3 clip groups.*adaptive_clip="
    ):
        DPOptimizer(inner, model, mechanism=AdaptiveGaussianMechanism(1.0, 1.0, B, 0))
    shares: Sequence[dict[str, float]] = [{}, {"a": 1.0, "b": 1.0}, {"a": -1.0}]
    for wrong in shares:
        with pytest.raises(PrivacyError, match=r"without clip groups|squares add up to 1"):
            AdaptiveGaussianMechanism(1.0, 1.0, B, 0, shares=wrong)


def test_counts_that_cost_more_than_the_step_are_refused() -> None:
    with pytest.raises(
        PrivacyError, match=r"(?s)count_noise 0.6 is not more than half of .* 0.8 times √3: 3 counts .*lea"
    ):
        wrapped(net(), AdaptiveClip(count_noise=0.6))


def test_a_group_without_a_gradient_and_an_empty_batch() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.used, self.rest = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor, both: bool = False) -> Tensor:
            return self.used(x) + self.rest(x) if both else self.used(x)

    model = dp_compile(Sometimes(), clipping="per_layer", backend="eager", max_grad_norm=1e-3)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    clip = AdaptiveClip(quantile=0.5, learning_rate=1.0)
    optimizer = DPOptimizer(inner, model, noise_multiplier=0.0, expected_batch_size=B, adaptive_clip=clip)
    x, y = batch(0)
    first = bounds_of(optimizer)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    after = bounds_of(optimizer)
    assert after["rest"] / first["rest"] == pytest.approx(math.exp(-0.5))
    assert after["used"] / first["used"] == pytest.approx(math.exp(0.5))
    F.cross_entropy(model(x, True), y).backward()
    for name in ("used", "rest"):
        own = sum(p.grad.double().square().sum() for n, p in model.named_parameters() if n.startswith(name))  # type: ignore[union-attr]
        assert math.sqrt(own) <= B * after[name]
    optimizer.step()
    optimizer.zero_grad()
    before = bounds_of(optimizer)
    F.cross_entropy(model(x[:0]), y[:0], reduction="sum").backward()
    optimizer.step()
    assert bounds_of(optimizer) == pytest.approx(before)  # no vote: 0.5 of the expected examples, the quantile


@pytest.mark.full
def test_through_make_private_the_quantile_of_each_layer_is_found() -> None:
    x, y = labelled(400)
    module = net()
    model, optimizer, loader = make_private(
        module,
        torch.optim.SGD(module.parameters(), lr=1e-3),
        DataLoader(TensorDataset(x, y), batch_size=100),
        noise_multiplier=1.0,
        max_grad_norm=AdaptiveClip(quantile=0.3, learning_rate=0.3, initial=5.0),
        physical_batch_size=40,
        clipping="per_layer",
        backend="eager",
        seed=4,
    )
    for _ in range(14):
        for inputs, targets in loader:
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    plain = net()
    plain.load_state_dict(module.state_dict())
    each = per_example_gradients(
        plain, [x], {}, lambda out, rows: F.cross_entropy(out, y[rows], reduction="none"), in_dims=0
    )
    for group, bound in bounds_of(optimizer).items():
        norms = sum(each[n].double().square().reshape(400, -1).sum(1) for n in LAYERS[group]).sqrt()  # type: ignore[union-attr]
        assert 0.18 < (norms <= bound).double().mean().item() < 0.42
    report = optimizer.report(1e-5)
    assert report.sections["Privacy"]["mechanism"].endswith("one count for each of 3 clip groups")
    assert (
        report.sections["Privacy"]["C"]
        == "that of each clip group follows the 0.3 quantile of the gradients' norms there"
    )
    low, high = (float(v) for v in report.sections["Model"]["C of the clip groups"].split(" to "))
    assert low == pytest.approx(min(bounds_of(optimizer).values()), rel=1e-4) and high > low


def test_an_optimizer_with_one_c_begins_with_equal_parts() -> None:
    module = net()
    model, optimizer = wrapped(module)
    steps(model, optimizer, range(2))
    total = optimizer.max_grad_norm
    inner = torch.optim.SGD(module.parameters(), lr=0.1)
    plain = DPOptimizer(inner, model, noise_multiplier=0.0, expected_batch_size=B)
    assert plain.engine.clip.now == Bounds(total) and not plain.engine.votes
    x, y = batch(2)
    F.cross_entropy(model(x), y).backward()
    assert plain.engine.ledger.votes is None
    plain.step()


def test_a_region_of_several_groups_clips_each_to_its_own_bound() -> None:
    found, model, x = [], GPT(2), ids()
    ways: list[dict[str, Any]] = [{}, {"regions": "blocks"}]
    for options in ways:
        private = dp_compile(model, clipping="per_layer", backend="eager", **options)
        engine = engine_of(private)
        groups = clip_groups(engine.trainable(), "per_layer")
        engine.move_bounds(Bounds.each({group: 0.01 * 1.2**i for i, group in enumerate(groups)}))
        private.zero_grad()
        train_step(private, (x,), {}, PseudoLoss(len(x)))
        found.append({n: p.grad.clone() for n, p in private.named_parameters() if p.grad is not None})
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-4, atol=1e-6, msg=name)
