"""Cyclic Poisson sampling: parts, draws by turns, rates, states."""

from __future__ import annotations

import collections
import itertools
import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

from dpcompile.data import cyclic
from dpcompile.data.cyclic import deal
from dpcompile.data.loader import PoissonLoader
from dpcompile.errors import PrivacyError


def loader_of(n: int = 60, expected: float | None = 6.0, bands: int = 4, **options: Any) -> PoissonLoader:
    data = TensorDataset(torch.arange(n))
    return PoissonLoader(data, expected_batch_size=expected, bands=bands, **{"seed": 0, **options})


def draws(loader: PoissonLoader) -> list[list[int]]:
    found, current = [], []
    for batch in loader.batches():
        current += batch.data[0][batch.mask].tolist()
        if batch.ends_step:
            found.append(current)
            current = []
    return found


def test_every_example_is_in_one_part() -> None:
    for size, bands in ((1, 3), (10, 1), (1000, 7), (5, 50)):
        parts = deal(3, size=size, bands=bands)
        assert len(parts) == bands and sorted(torch.cat(parts).tolist()) == list(range(size))
        assert all(part.tolist() == sorted(part.tolist()) for part in parts)


def test_parts_do_not_depend_on_how_many_others_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """One example more moves none of the others."""
    for secure in (False, True):
        few, many = (deal(5, size=n, bands=4, secure=secure) for n in (500, 501))
        assert all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(few, many, strict=True))
    monkeypatch.setattr(cyclic, "_AT_A_TIME", 7)
    for a, b in zip(few, deal(5, size=500, bands=4, secure=True), strict=True):
        assert torch.equal(a, b)


def test_parts_are_uniform_and_another_seed_deals_anew() -> None:
    bands, n = 5, 50_000
    one, other = (torch.empty(n, dtype=torch.int64) for _ in range(2))
    for seed, where in ((1, one), (2, other)):
        for i, part in enumerate(deal(seed, size=n, bands=bands)):
            where[part] = i
    assert stats.chisquare(torch.bincount(one, minlength=bands).numpy()).pvalue > 1e-3
    both = torch.bincount(one * bands + other, minlength=bands**2)
    assert stats.chisquare(both.numpy()).pvalue > 1e-3


def test_no_example_is_in_two_of_b_steps_in_a_row() -> None:
    loader = loader_of(steps=200)
    found = draws(loader) + draws(loader)
    for i in range(len(found) - 3):
        window = list(itertools.chain(*found[i : i + 4]))
        assert len(window) == len(set(window))
    parts = [set(p.tolist()) for p in deal(0, size=60, bands=4)]
    assert all(set(drawn) <= parts[step % 4] for step, drawn in enumerate(found))


def test_the_draws_of_a_part_are_poisson_samples() -> None:
    loader = loader_of(n=40, expected=4.0, steps=4000)
    assert loader.sample_rate == 4.0 * 4 / 40
    counts = collections.Counter(itertools.chain(*draws(loader)))
    turns = 1000
    z = [(counts[i] - turns * 0.4) / math.sqrt(turns * 0.4 * 0.6) for i in range(40)]
    assert max(map(abs, z)) < 4.5 and stats.kstest(z, "norm").pvalue > 1e-3


@pytest.mark.parametrize(
    ("given", "rate", "expected", "steps", "from_size"),
    [
        ({"expected": 6.0}, 0.4, 6.0, 10, True),
        ({"expected": None, "sample_rate": 0.2}, 0.2, 3.0, 20, True),
        ({"expected": 5.0, "sample_rate": 0.2}, 0.2, 5.0, 20, False),
        ({"expected": 15.0}, 1.0, 15.0, 4, True),
    ],
)
def test_rates(given: dict[str, Any], rate: float, expected: float, steps: int, from_size: bool) -> None:
    loader = loader_of(**given)
    assert (loader.sample_rate, loader.expected_batch_size) == (rate, expected)
    assert (len(loader), loader.from_size, loader.bands) == (steps, from_size, 4)


def test_a_batch_larger_than_a_part() -> None:
    with pytest.raises(
        PrivacyError, match=r"expected_batch_size is 16.0, not in \(0, 15\] \(the size of each of 4 parts\)"
    ):
        loader_of(expected=16.0)


@pytest.mark.parametrize("bad", [0, -1, 2.0, True])
def test_bands_without_sense(bad: Any) -> None:
    with pytest.raises(PrivacyError, match=f"(?s)bands is {bad}.*give an integer, 1 or more"):
        loader_of(bands=bad)


def test_empty_parts_are_steps_without_examples() -> None:
    found = draws(loader_of(n=3, expected=None, sample_rate=1.0, bands=8, steps=16))
    assert sorted(itertools.chain(*found[:8])) == [0, 1, 2] and found[:8] == found[8:]


def test_states() -> None:
    loader = loader_of(steps=9)
    taken = [batch.data[0][batch.mask].tolist() for batch in itertools.islice(loader.batches(), 4)]
    state = loader.state_dict()
    wanted = draws(loader_of(steps=9))
    assert taken == wanted[:4]
    other = loader_of(steps=9, seed=7)
    other.load_state_dict(state)
    assert draws(other) == wanted[4:]
    for bands in (1, 2):
        with pytest.raises(PrivacyError, match=f"(?s)bands was 4 in the saved run and is {bands}.*with the same bands"):
            loader_of(bands=bands).load_state_dict(state)
    old = {k: v for k, v in state.items() if k != "bands"}  # of a loader before there were parts
    with pytest.raises(PrivacyError, match="bands was 1 in the saved run and is 4"):
        loader_of().load_state_dict(old)


def test_ranks_deal_each_draw_out() -> None:
    whole = draws(loader_of(steps=12))
    parts = [[loader_of(steps=12)._sampler.draw(0, t)[rank::2] for t in range(12)] for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == whole


def test_of_a_data_loader() -> None:
    plain = DataLoader(TensorDataset(torch.arange(60)), batch_size=5)
    loader = PoissonLoader.from_dataloader(plain, bands=3, seed=1)
    assert (loader.bands, loader.sample_rate, len(loader)) == (3, 0.25, 12)
