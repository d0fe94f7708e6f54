"""Noise in a tree: which nodes a step has, what adds up, what it costs, and what may not change in a run."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from dp_accounting import NeighboringRelation, SelfComposedDpEvent, SingleEpochTreeAggregationDpEvent, rdp
from small_models import labelled, net
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpcompile
from dpcompile import AdaptiveClip, DPOptimizer, PoissonLoader, PrivacyError, calibrate_noise
from dpcompile.noise.banded import BandedMechanism
from dpcompile.noise.mechanism import Release
from dpcompile.noise.tree import TreeMechanism, nodes

make_private: Any = dpcompile.make_private


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13, 64])
def test_nodes(steps: int) -> None:
    """After t steps of a pass a node for each digit 1 of t; none comes twice, and none is in two passes."""
    seen: set[int] = set()
    for tree in range(3):
        standing: set[int] = set()
        for leaf in range(steps):
            for number, sign in nodes(tree * steps + leaf, steps):
                if sign > 0:
                    assert number not in seen
                    seen.add(number)
                    standing.add(number)
                else:
                    standing.remove(number)
            assert len(standing) == (leaf + 1).bit_count()


def mechanism(steps: int, **options: Any) -> TreeMechanism:
    return TreeMechanism(
        **{"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 1.0, "seed": 5} | options, steps=steps
    )


def released(own: TreeMechanism, count: int, numel: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[count, numel]``, of sums that are zero."""
    rows = []
    for step in range(count):
        total = torch.zeros(numel, dtype=dtype)
        own.release(Release([total], [0], step))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("steps", [1, 6, 8])
def test_what_adds_up(steps: int, secure: bool) -> None:
    """The covariance of the sums of the first t steps: a node's variance for each that both have."""
    count = 2 * steps
    sums = released(mechanism(steps, secure=secure), count, 20_000).view(2, steps, -1).cumsum(1).flatten(0, 1)
    found = sums @ sums.T / sums.shape[1]
    height, wanted = steps.bit_length(), torch.zeros(count, count, dtype=torch.float64)
    standing: list[set[int]] = []
    for step in range(count):
        own = set() if step % steps == 0 else set(standing[-1])
        for number, sign in nodes(step, steps):
            own.add(number) if sign > 0 else own.remove(number)
        standing.append(own)
    for i, a in enumerate(standing):
        for j, b in enumerate(standing):
            wanted[i, j] = height * len(a & b)
    assert (found - wanted).abs().max() < 6 * height * steps.bit_length() / 20_000**0.5


def test_parts_of_parameters() -> None:
    """The same noise whatever is released together, in which layout and dtype."""
    whole = torch.zeros(6, 5)
    own = mechanism(8, expected_batch_size=4.0)
    own.release(Release([whole], [3], 5))
    first, second = torch.zeros(2, 5), torch.zeros(4, 5).T.contiguous().T
    mechanism(8, expected_batch_size=4.0).release(Release([first, second], [3, 3], 5, [[(0, 10)], [(10, 20)]]))
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=0)
    wide = torch.zeros(6, 5, dtype=torch.float64)
    mechanism(8, expected_batch_size=4.0).release(Release([wide], [3], 5))
    torch.testing.assert_close(wide.float(), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 7, 8, 1000])
def test_cost_is_that_of_the_tree(steps: int) -> None:
    """dp-accounting's, of the nodes' noise multiplier and so many passes; by Rényi, which it knows for trees."""
    own = mechanism(steps, noise_multiplier=2.0)
    by_hand, by_event = (rdp.RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL) for _ in range(2))
    by_hand.compose(SelfComposedDpEvent(SingleEpochTreeAggregationDpEvent(own.std, steps), 3))
    by_event.compose(own.event(1.0), 3)
    assert by_event.get_epsilon(1e-5) == pytest.approx(by_hand.get_epsilon(1e-5), rel=1e-9)


def data(count: int = 40) -> TensorDataset:
    x, y = labelled(count)
    return TensorDataset(torch.arange(count), x, y)


def private(**options: Any) -> tuple[Any, DPOptimizer, PoissonLoader]:
    model = net()
    options = {"noise_multiplier": 1.0, "tree": True, "seed": 7, "backend": "eager", **options}
    return make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data(), batch_size=8), **options)


def train(model: Any, optimizer: DPOptimizer, loader: Any) -> list[int]:
    seen: list[int] = []
    for index, x, y in loader:
        mask = optimizer.engine.draws._waiting[-1].mask  # type: ignore[union-attr]
        seen += index[mask].tolist()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen


def test_each_example_once_in_a_pass() -> None:
    model, optimizer, loader = private()
    assert (len(loader), loader.bands, loader.sample_rate, loader.expected_batch_size) == (5, 5, 1.0, 8)
    first, second = train(model, optimizer, loader), train(model, optimizer, loader)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first == second  # in the same step of each
    assert optimizer.accountant is not None
    assert optimizer.accountant.history == [(1.0, 1.0, 2)]


def test_the_target_is_met() -> None:
    model, optimizer, loader = private(noise_multiplier=None, target_epsilon=4.0, target_delta=1e-3, epochs=2)
    train(model, optimizer, loader)
    train(model, optimizer, loader)
    assert optimizer.accountant is not None
    assert 3.99 < optimizer.accountant.epsilon(1e-3) <= 4.0
    assert optimizer.noise_multiplier == calibrate_noise(
        target_epsilon=4.0, target_delta=1e-3, sample_rate=1.0, steps=10, bands=5
    )
    text = str(optimizer.report(1e-3))
    assert "in a tree over each 5 steps, of which each example is in 3 nodes" in text


def weights(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_resumed_run() -> None:
    whole, optimizer, loader = private(seed=21)
    train(whole, optimizer, loader)
    states = [copy.deepcopy(x.state_dict()) for x in (whole, optimizer, loader)]
    train(whole, optimizer, loader)
    wanted = weights(whole)
    del whole, optimizer, loader
    resumed, optimizer, loader = private(seed=22)
    for own, state in zip((resumed, optimizer, loader), states, strict=True):
        own.load_state_dict(state)
    train(resumed, optimizer, loader)
    torch.testing.assert_close(weights(resumed), wanted, rtol=0, atol=1e-7)


def test_compile_step() -> None:
    found = []
    for compiled in (False, True):
        model, optimizer, loader = private(seed=31)
        if compiled:
            step = dpcompile.compile_step(model, F.cross_entropy, optimizer)
            for _, x, y in loader:
                step(x, y)
        else:
            train(model, optimizer, loader)
        found.append(weights(model))
        del model, optimizer, loader
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def refused(message: str) -> Any:
    return pytest.raises(PrivacyError, match=re.escape(message))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": 2}, "in_turn, and bands: each example comes once in a pass"),
        ({"max_grad_norm": AdaptiveClip()}, "C that follows a quantile, and noise that is correlated over 5 steps"),
        ({"exact": True}, "exact noise that is correlated over 5 steps"),
        ({"max_batch_size": 8}, "draws from 5 parts by turns for noise that is correlated over steps"),
        ({"relation": "replace_one"}, "noise that is correlated over 5 steps, for relation 'replace_one'"),
        ({"relation": "add_remove"}, "the size of the dataset"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], message: str) -> None:
    with refused(message):
        private(**options)


def test_options_that_make_no_sense() -> None:
    with refused("steps of a pass is 0"):
        mechanism(0)
    with refused("number of the node"):
        list(nodes(2**31, 8))
    with refused("in_turn, and sample_rate"):
        PoissonLoader(data(), in_turn=True, expected_batch_size=8, sample_rate=0.5)
    with refused("in_turn, and an expected_batch_size of 50, not in (0, 40]"):
        PoissonLoader(data(), in_turn=True, expected_batch_size=50)
    model = net()
    with refused("in_turn is True, and the PoissonLoader has False"):
        make_private(
            model, torch.optim.SGD(model.parameters(), lr=0.1), PoissonLoader(data(), expected_batch_size=8),
            tree=True, noise_multiplier=1.0, backend="eager",
        )  # fmt: skip


def test_numbers_that_change_in_a_run() -> None:
    own = mechanism(4)
    released(own, 2)
    own.noise_multiplier = 0.5
    with refused("noise_multiplier of the TreeMechanism changed in a run"):
        own.release(Release([torch.zeros(2)], [0], 2))
    own.noise_multiplier, own.steps = 1.0, 8
    with refused("the matrix of the TreeMechanism changed in a run"):
        own.release(Release([torch.zeros(2)], [0], 2))


def test_states_of_other_mechanisms() -> None:
    model, optimizer, loader = private(seed=41)
    train(model, optimizer, loader)
    state = optimizer.state_dict()
    del model, optimizer, loader
    with refused("the noise was that of a tree in the saved run, and is not here"):
        other = dpcompile.dp_compile(net(), backend="eager")
        banded = BandedMechanism(1.0, 1.0, 8, 43, coefficients=[1.0] * 5)
        DPOptimizer(torch.optim.SGD(other.parameters(), lr=0.1), other, mechanism=banded).load_state_dict(state)
    with refused("bands was 5 in the saved run and is 6 here"):
        other = dpcompile.dp_compile(net(), backend="eager")
        tree = TreeMechanism(1.0, 1.0, 8, 44, steps=6)
        DPOptimizer(torch.optim.SGD(other.parameters(), lr=0.1), other, mechanism=tree).load_state_dict(state)
