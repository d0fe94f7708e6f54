"""C that follows a quantile of the gradients' norms: votes, noise on both, what it costs, loops, resuming."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import clip, per_example_gradients
from small_models import labelled, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import AdaptiveClip, DPOptimizer, PrivacyAccountant, PrivacyError, compile_step, dp_compile, make_private
from dpcompile.clipping.groups import Bounds
from dpcompile.noise.adaptive import AdaptiveGaussianMechanism
from dpcompile.noise.counter import Stream
from dpcompile.noise.normal import gaussian
from dpcompile.runtime.bound import votes_within
from dpcompile.schedules import ClipSchedule

B, SIGMA, SEED = 9, 0.8, 11
CLIP = AdaptiveClip(quantile=0.4, learning_rate=0.5, initial=0.3, count_noise=2.0)


def wrapped(
    module: nn.Module, clip: AdaptiveClip = CLIP, sigma: float = SIGMA, **options: Any
) -> tuple[Any, DPOptimizer]:
    options.setdefault("backend", "eager")
    model = dp_compile(module, **options)
    inner = torch.optim.SGD(module.parameters(), lr=0.1)
    accountant = PrivacyAccountant(noise_multiplier=sigma, sample_rate=0.1)
    return model, DPOptimizer(
        inner,
        model,
        noise_multiplier=sigma,
        expected_batch_size=B,
        seed=SEED,
        accountant=accountant,
        adaptive_clip=clip,
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(step)
    return labelled(B)


class Reference:
    """The published algorithm, one backward per example, in float64."""

    def __init__(self, module: nn.Module, clip: AdaptiveClip = CLIP, sigma: float = SIGMA) -> None:
        self.module, self.clip = copy.deepcopy(module), clip
        self.bound, self.step = clip.initial or 1.0, 0
        assert clip.count_noise is not None
        self.count_noise = clip.count_noise
        self.scale = 1 / math.sqrt(1 / sigma**2 - 1 / (2 * clip.count_noise) ** 2)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        each = per_example_gradients(
            self.module, [x], {}, lambda out, rows: F.cross_entropy(out, y[rows], reduction="none"), in_dims=0
        )
        clipped = clip(each, self.bound)
        within = (clipped.norms <= self.bound).sum().item()
        for i, (name, p) in enumerate(self.module.named_parameters()):
            noise = gaussian(SEED, step=self.step, parameter=i, numel=p.numel(), dtype=torch.float64).view_as(p)
            with torch.no_grad():
                p -= 0.1 * (clipped.sums[name] + self.scale * self.bound * noise).float() / B
        z = gaussian(SEED, step=self.step, parameter=0, numel=1, dtype=torch.float64, stream=Stream.VOTES).item()
        share = (within - len(x) / 2 + self.count_noise * z) / B + 0.5
        self.bound *= np.exp(-self.clip.learning_rate * (share - self.clip.quantile))
        self.step += 1


def agree(optimizer: DPOptimizer, reference: Reference, module: nn.Module) -> None:
    assert optimizer.max_grad_norm == pytest.approx(reference.bound, rel=1e-6)
    assert optimizer.mechanism.max_grad_norm == optimizer.engine.max_grad_norm == optimizer.max_grad_norm
    for name, p in module.named_parameters():
        torch.testing.assert_close(p, dict(reference.module.named_parameters())[name], rtol=1e-4, atol=1e-5)


WAYS: dict[str, dict[str, Any]] = {
    "graph": {},
    "ghost": {"norm": "ghost"},
    "a second backward": {"norm": "two_pass"},
    "regions": {"regions": "blocks"},
    "a sum": {"loss_reduction": "sum"},
    "inductor": {"backend": "inductor"},
}


@pytest.mark.parametrize("way", WAYS)
def test_steps_are_those_of_the_published_algorithm(way: str) -> None:
    module = net()
    reference = Reference(module)
    model, optimizer = wrapped(module, **WAYS[way])
    bounds = set()
    for step in range(6):
        x, y = batch(step)
        F.cross_entropy(model(x), y, reduction=WAYS[way].get("loss_reduction", "mean")).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference(x, y)
        agree(optimizer, reference, module)
        bounds.add(optimizer.max_grad_norm)
    assert len(bounds) == 6
    assert optimizer.accountant is not None and optimizer.accountant.history == [(SIGMA, 0.1, 6)]


def test_the_compiled_step_does_the_same() -> None:
    module = net()
    reference = Reference(module)
    model, optimizer = wrapped(module)
    step = compile_step(model, F.cross_entropy, optimizer)
    for i in range(3):
        step(*batch(i))
        reference(*batch(i))
        agree(optimizer, reference, module)


def test_physical_batches_of_a_step_vote_together() -> None:
    module = net()
    reference = Reference(module)
    model, optimizer = wrapped(module)
    for i in range(3):
        x, y = batch(i)
        for rows in (slice(0, 4), slice(4, 5), slice(5, B)):
            optimizer.accumulating = rows.stop < B
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        reference(x, y)
        agree(optimizer, reference, module)


def drop_by_none(model: Any, optimizer: DPOptimizer) -> None:
    model.zero_grad()


def drop_by_zeros(model: Any, optimizer: DPOptimizer) -> None:
    model.zero_grad(set_to_none=False)


def drop_by_optimizer(model: Any, optimizer: DPOptimizer) -> None:
    optimizer.zero_grad()


def discard(model: Any, optimizer: DPOptimizer) -> None:
    optimizer.discard()


@pytest.mark.parametrize("drop", [drop_by_none, drop_by_zeros, drop_by_optimizer, discard])
def test_votes_are_dropped_with_the_sums(drop: Callable[[Any, DPOptimizer], None]) -> None:
    module = net()
    reference = Reference(module)
    model, optimizer = wrapped(module)
    x, y = batch(0)
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
        drop(model, optimizer)
    F.cross_entropy(model(x), y).backward()
    assert optimizer.engine.ledger.votes is not None and abs(int(optimizer.engine.ledger.votes)) <= B
    optimizer.step()
    reference(x, y)
    agree(optimizer, reference, module)


def test_padding_has_no_vote_and_nan_votes_for_more() -> None:
    norms = torch.tensor([0.5, 1.0, 1.5, math.nan, math.inf, 0.0])

    def votes(mask: Tensor) -> int:
        return int(votes_within({"": norms}, mask, Bounds(1.0, {"": 1.0})))

    assert votes(torch.ones(6)) == 3 - 3
    assert votes(torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 2.0])) == 2 - 2
    assert votes(torch.zeros(6)) == 0
    for i in range(6):  # one example more moves the sum by one
        mask = torch.ones(6)
        mask[i] = 0
        assert abs(votes(mask) - votes(torch.ones(6))) == 1


def test_the_quantile_is_found() -> None:
    x, y = labelled(400)
    module = net()
    model, optimizer, loader = make_private(
        module,
        torch.optim.SGD(module.parameters(), lr=1e-3),
        DataLoader(TensorDataset(x, y), batch_size=100),
        noise_multiplier=1.0,
        max_grad_norm=AdaptiveClip(quantile=0.3, learning_rate=0.3, initial=20.0),
        physical_batch_size=30,
        seed=4,
        backend="eager",
    )
    for _ in range(12):
        for inputs, targets in loader:
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    plain = net()
    plain.load_state_dict(module.state_dict())
    each = per_example_gradients(
        plain, [x], {}, lambda out, rows: F.cross_entropy(out, y[rows], reduction="none"), in_dims=0
    )
    share = (clip(each, 1.0).norms <= optimizer.max_grad_norm).double().mean().item()
    assert 0.2 < share < 0.4


def test_a_resumed_run_goes_on_exactly() -> None:
    def run(model: Any, optimizer: DPOptimizer, steps: range) -> None:
        for i in steps:
            x, y = batch(i)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    module = net()
    model, optimizer = wrapped(module)
    run(model, optimizer, range(3))
    saved = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    run(model, optimizer, range(3, 6))
    other = net()
    resumed, following = wrapped(other)
    other.load_state_dict(saved[0])
    following.load_state_dict(saved[1])
    run(resumed, following, range(3, 6))
    assert following.max_grad_norm == optimizer.max_grad_norm
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf, "1"])
def test_a_state_with_a_bound_that_is_none_is_refused(bound: Any) -> None:
    _, optimizer = wrapped(net())
    state = optimizer.state_dict()
    state["dpcompile"]["max_grad_norm"] = bound
    with pytest.raises(PrivacyError, match=r"(?s)'max_grad_norm' of the DPOptimizer's state is .*not a bound"):
        optimizer.load_state_dict(state)


@given(st.floats(0.01, 20), st.floats(1, 1e5), st.floats(0.51, 1e3))
def test_both_releases_together_cost_what_sigma_says(sigma: float, batch_size: float, more: float) -> None:
    for noise in (None, more * sigma):
        mechanism = AdaptiveGaussianMechanism(sigma, 3.0, batch_size, 0, clip=AdaptiveClip(count_noise=noise))
        both = (3.0 / mechanism.std) ** 2 + (0.5 / mechanism.count_std) ** 2
        assert both**-0.5 == pytest.approx(sigma, rel=1e-9)
        assert mechanism.std >= 3.0 * sigma


def test_the_split_of_the_noise_as_published() -> None:
    assert AdaptiveGaussianMechanism(1.0, 1.0, 256.0, 0).std == pytest.approx(1.00076, abs=5e-6)
    assert AdaptiveGaussianMechanism(1.0, 1.0, 256.0, 0).count_std == 12.8
    none = AdaptiveGaussianMechanism(0.0, 1.0, 256.0, 0)
    assert none.std == none.count_std == 0.0


def test_the_noise_of_the_count_has_its_size_and_is_drawn_once() -> None:
    mechanism = AdaptiveGaussianMechanism(1.0, 1.0, 100.0, 5, clip=AdaptiveClip(learning_rate=1.0, count_noise=7.0))
    found = np.array([-100 * math.log(mechanism.next_bounds([0], step).total) for step in range(4000)])
    assert found.mean() == pytest.approx(0, abs=0.4) and found.std() == pytest.approx(7.0, rel=0.05)
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.05
    assert mechanism.next_bounds([0], 3) == mechanism.next_bounds([0], 3)
    secure = AdaptiveGaussianMechanism(1.0, 1.0, 100.0, 5, True, AdaptiveClip(count_noise=7.0))
    assert secure.next_bounds([0], 3) != mechanism.next_bounds([0], 3)


def test_c_stays_within_reach() -> None:
    for rate, votes in ((1e6, 1e6), (1e6, -1e6)):
        mechanism = AdaptiveGaussianMechanism(1.0, 1.0, 1.0, 0, clip=AdaptiveClip(learning_rate=rate))
        assert mechanism.next_bounds([votes], 0).total in (2.0**-30, 2.0**30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile": 0.0}, r"(?s)quantile is 0.0, not in \(0, 1\).*common choice"),
        ({"quantile": 1.0}, "quantile is 1.0"),
        ({"quantile": "half"}, "quantile is 'half'"),
        ({"learning_rate": None}, "learning_rate of AdaptiveClip is None"),
        ({"learning_rate": 0.0}, "learning_rate of AdaptiveClip is 0.0"),
        ({"initial": -1.0}, r"(?s)initial of AdaptiveClip is -1.0.*finite number above 0"),
        ({"count_noise": math.inf}, "count_noise of AdaptiveClip is inf"),
    ],
)
def test_numbers_without_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        AdaptiveClip(**options)


def test_a_count_that_costs_more_than_the_step_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"(?s)count_noise 0.4 is not more than half of .* multiplier 0.8.*leave"):
        wrapped(net(), AdaptiveClip(count_noise=0.4))
    _, optimizer = wrapped(net(), AdaptiveClip(count_noise=0.5))
    with pytest.raises(PrivacyError, match="not more than half of the noise multiplier 1.0"):
        optimizer.move_noise_multiplier(1.0)


def test_clippings_that_know_no_quantile_are_refused() -> None:
    for clipping in ("automatic", lambda norms, c: c / (norms + 1)):
        with pytest.raises(PrivacyError, match=r"(?s)max_grad_norm of a model with clipping=.*was to change"):
            wrapped(net(), clipping=clipping)


def test_a_mechanism_and_a_quantile_are_one_too_many() -> None:
    model, _ = wrapped(net())
    mechanism = AdaptiveGaussianMechanism(1.0, 0.3, B, 0)
    with pytest.raises(PrivacyError, match=r"(?s)a mechanism was given, and .*adaptive_clip too.*the mechanism alone"):
        DPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, mechanism=mechanism, adaptive_clip=CLIP)


def test_a_schedule_beside_it_is_refused() -> None:
    _, optimizer = wrapped(net())
    with pytest.raises(PrivacyError, match=r"(?s)a schedule of a C that follows a quantile.*leave out"):
        ClipSchedule(optimizer, lambda t: 1.0)


def test_a_model_that_is_compiled_already_begins_at_the_first_c() -> None:
    model = dp_compile(net(), max_grad_norm=2.0, backend="eager")
    loader = DataLoader(TensorDataset(*labelled(20)), batch_size=5)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    _, optimizer, _ = make_private(model, inner, loader, noise_multiplier=1.0, max_grad_norm=CLIP)
    assert optimizer.max_grad_norm == CLIP.initial


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_a_gradient_scaler_changes_no_vote(scale: float) -> None:
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=scale)):
        module = net()
        model, optimizer = wrapped(module)
        for step in range(3):
            x, y = batch(step)
            loss = F.cross_entropy(model(x), y)
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        found.append(optimizer.max_grad_norm)
    assert found[0] == pytest.approx(found[1], rel=1e-6)
