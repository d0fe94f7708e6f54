"""Examples in turn, with noise in a tree or by buffers: what adds up, what it costs, what may not change in a run."""

from __future__ import annotations

import copy
import math
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
from dpcompile.noise.buffered import BufferedMechanism
from dpcompile.noise.buffers import Powers, optimal_powers
from dpcompile.noise.counter import Stream
from dpcompile.noise.mechanism import Release
from dpcompile.noise.normal import gaussian
from dpcompile.noise.strategy import optimal_coefficients, prefix_error
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


def released(
    own: TreeMechanism | BufferedMechanism, count: int, numel: int = 4, dtype: torch.dtype = torch.float64
) -> Tensor:
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


@pytest.mark.parametrize("make", [TreeMechanism, BufferedMechanism])
def test_parts_of_parameters(make: Any) -> None:
    """The same noise whatever is released together, in which layout and dtype, and after which steps."""

    def own() -> Any:
        return make(1.0, 1.0, 4.0, 5, steps=8)

    whole = torch.zeros(6, 5)
    own().release(Release([whole], [3], 13))
    first, second = torch.zeros(2, 5), torch.zeros(4, 5).T.contiguous().T
    own().release(Release([first, second], [3, 3], 13, [[(0, 10)], [(10, 20)]]))
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-7)
    wide = torch.zeros(6, 5, dtype=torch.float64)
    own().release(Release([wide], [3], 13))
    torch.testing.assert_close(wide.float(), whole, rtol=1e-5, atol=1e-6)
    after = own()
    for step in (8, 9, 11, 12, 9, 13):
        again = torch.zeros(6, 5)
        after.release(Release([again], [3], step))
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-7)


@pytest.mark.parametrize("secure", [False, True])
def test_rows_by_buffers(secure: bool) -> None:
    """Against C^-1 z by a dense matrix, over two blocks."""
    powers, count = Powers((0.5, 0.2), (0.4, 0.9)), 7
    own = BufferedMechanism(2.0, 3.0, 1.0, 5, secure, steps=count, powers=powers)
    found = released(own, 2 * count, 50).view(2, count, 50)
    t = torch.arange(1, count, dtype=torch.float64)
    column = torch.cat([torch.ones(1), 0.5 * 0.4 ** (t - 1) + 0.2 * 0.9 ** (t - 1)])
    dense = torch.stack([torch.cat([torch.zeros(i), column[: count - i]]) for i in range(count)], 1).double()
    z = torch.stack([
        gaussian(5, step=s, parameter=0, numel=50, dtype=torch.float64, secure=secure, stream=Stream.BUFFERED)
        for s in range(2 * count)
    ]).view(2, count, 50)  # fmt: skip
    torch.testing.assert_close(found, 6.0 * column.norm() * torch.linalg.solve(dense, z), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 8, 64, 256])
def test_powers_are_nearly_the_best(steps: int) -> None:
    best = prefix_error(optimal_coefficients(steps, steps, steps), steps, steps)
    assert best * (1 - 1e-6) <= optimal_powers(steps).error(steps, steps) <= 1.01 * best


@pytest.mark.parametrize(("steps", "error"), [(64, 2.179914), (256, 2.622106), (1000, 3.051082), (10_000, 3.799872)])
def test_powers_are_as_good_as_those_of_jax_privacy(steps: int, error: float) -> None:
    """Of its version 2.0.0: ``buffered_toeplitz.optimize(n=steps, error="mean")``, of C over its norm."""
    assert optimal_powers(steps).error(steps, steps) <= error * (1 + 1e-6)


def test_powers_of_long_passes() -> None:
    """Less than the square root's bound, 1 + (ln(T) + 0.6) / pi (Fichtenberger et al. 2023), and half of a tree's."""
    assert optimal_powers(10_000).error(10_000, 10_000) < 1 + (math.log(10_000) + 0.6) / math.pi
    tree = (sum(t.bit_count() for t in range(1, 10_001)) / 10_000 * (10_000).bit_length()) ** 0.5
    assert optimal_powers(10_000).error(10_000, 10_000) < tree / 2


@pytest.mark.parametrize(
    ("weights", "decays"),
    [
        ((), ()),
        ((0.5,), (0.5, 0.5)),
        ((0.6, 0.6), (0.5, 0.5)),
        ((0.5,), (1.0,)),
        ((-0.1,), (0.5,)),
        ((0.5,), (float("nan"),)),
    ],
)
def test_powers_that_are_none(weights: Any, decays: Any) -> None:
    with refused("weights are"):
        Powers(weights, decays)


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
    options = {"noise_multiplier": 1.0, "in_turn": "tree", "seed": 7, "backend": "eager", **options}
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


@pytest.mark.parametrize("kind", ["tree", "buffers"])
def test_each_example_once_in_a_pass(kind: str) -> None:
    model, optimizer, loader = private(in_turn=kind)
    assert (len(loader), loader.bands, loader.sample_rate, loader.expected_batch_size) == (5, 5, 1.0, 8)
    first, second = train(model, optimizer, loader), train(model, optimizer, loader)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first == second  # in the same step of each
    assert optimizer.accountant is not None
    assert optimizer.accountant.history == [(1.0, 1.0, 2)]


@pytest.mark.parametrize("kind", ["tree", "buffers"])
def test_the_target_is_met(kind: str) -> None:
    model, optimizer, loader = private(
        in_turn=kind, seed=8, noise_multiplier=None, target_epsilon=4.0, target_delta=1e-3, epochs=2
    )
    train(model, optimizer, loader)
    train(model, optimizer, loader)
    assert optimizer.accountant is not None
    assert 3.99 < optimizer.accountant.epsilon(1e-3) <= 4.0
    assert optimizer.noise_multiplier == calibrate_noise(
        target_epsilon=4.0, target_delta=1e-3, sample_rate=1.0, steps=10, bands=5
    )
    text = str(optimizer.report(1e-3))
    told = {
        "tree": "in a tree over each 5 steps, of which each example is in 3 nodes",
        "buffers": "5 steps by 4 buffers",
    }
    assert told[kind] in text


def weights(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["tree", "buffers"])
def test_a_resumed_run(kind: str) -> None:
    whole, optimizer, loader = private(in_turn=kind, seed=21)
    train(whole, optimizer, loader)
    states = [copy.deepcopy(x.state_dict()) for x in (whole, optimizer, loader)]
    train(whole, optimizer, loader)
    wanted = weights(whole)
    del whole, optimizer, loader
    resumed, optimizer, loader = private(in_turn=kind, seed=22)
    for own, state in zip((resumed, optimizer, loader), states, strict=True):
        own.load_state_dict(state)
    train(resumed, optimizer, loader)
    torch.testing.assert_close(weights(resumed), wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["tree", "buffers"])
def test_compile_step(kind: str) -> None:
    found = []
    for compiled in (False, True):
        model, optimizer, loader = private(in_turn=kind, seed=31 + len(kind))
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
    with refused("in_turn is 'trees'"):
        private(in_turn="trees")
    with refused("in_turn is True, and the PoissonLoader has False"):
        make_private(
            model, torch.optim.SGD(model.parameters(), lr=0.1), PoissonLoader(data(), expected_batch_size=8),
            in_turn="tree", noise_multiplier=1.0, backend="eager",
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
    with refused("the noise was made by tree in the saved run, and is by buffers here"):
        other = dpcompile.dp_compile(net(), backend="eager")
        buffered = BufferedMechanism(1.0, 1.0, 8, 42, steps=5)
        DPOptimizer(torch.optim.SGD(other.parameters(), lr=0.1), other, mechanism=buffered).load_state_dict(state)
    with refused("the noise was made by tree in the saved run, and is by bands here"):
        other = dpcompile.dp_compile(net(), backend="eager")
        banded = BandedMechanism(1.0, 1.0, 8, 43, coefficients=[1.0] * 5)
        DPOptimizer(torch.optim.SGD(other.parameters(), lr=0.1), other, mechanism=banded).load_state_dict(state)
    with refused("bands was 5 in the saved run and is 6 here"):
        other = dpcompile.dp_compile(net(), backend="eager")
        tree = TreeMechanism(1.0, 1.0, 8, 44, steps=6)
        DPOptimizer(torch.optim.SGD(other.parameters(), lr=0.1), other, mechanism=tree).load_state_dict(state)


def test_a_state_without_its_matrix() -> None:
    model, optimizer, _ = private(in_turn="buffers", seed=51)
    state, before = copy.deepcopy(optimizer.state_dict()), optimizer.mechanism.matrix  # type: ignore[attr-defined]
    own = next(v for v in [state, *state.values()] if isinstance(v, dict) and "powers" in v)
    for powers in (None, {"weights": [0.5]}, {"weights": 1, "decays": [0.5]}):
        own["powers"] = powers
        with refused("the state of the mechanism lacks its matrix: 'powers'"):
            optimizer.load_state_dict(state)
    assert optimizer.mechanism.matrix == before  # type: ignore[attr-defined]
    del model
