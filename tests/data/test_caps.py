"""Truncated draws: which examples are kept, how many physical batches a step has, states, ranks, refusals."""

from __future__ import annotations

import collections
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from fakes import PrivateModel, engine_of
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.data import loader as data
from dpcompile.data.loader import PoissonLoader
from dpcompile.data.sampling import default_physical_batch_size, kept, poisson_draw
from dpcompile.errors import PrivacyError
from dpcompile.noise.counter import Stream
from dpcompile.noise.normal import uniform, uniform_at
from dpcompile.optim import optimizer as optim
from dpcompile.optim.optimizer import DPOptimizer

N, BATCH = 40, 8


@pytest.fixture(autouse=True)
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "engine_of", engine_of)
    monkeypatch.setattr(data, "engine_of", engine_of)


def loader_of(cap: int | None = 10, n: int = N, expected: float = BATCH, **options: Any) -> PoissonLoader:
    dataset = TensorDataset(torch.arange(1.0, n + 1))
    return PoissonLoader(dataset, expected_batch_size=expected, max_batch_size=cap, **{"seed": 0, **options})


def draws(loader: PoissonLoader) -> list[list[int]]:
    found, current = [], []
    for batch in loader.batches():
        current += (batch.data[0][batch.mask] - 1).long().tolist()
        if batch.ends_step:
            found.append(current)
            current = []
    return found


# ---- which are kept


@pytest.mark.parametrize("secure", [False, True])
def test_each_is_kept_as_often_as_the_others(secure: bool) -> None:
    """With q E[min(1, cap / (1 + Bin(N - 1, q)))], and a draw has as many as the law of min(Bin(N, q), cap)."""
    n, q, cap, steps = 30, 0.3, 8, 4000
    member = torch.zeros(steps, n)
    for step in range(steps):
        drawn = poisson_draw(3, step=step, size=n, sample_rate=q, secure=secure)
        found = kept(drawn, cap, seed=3, step=step, secure=secure)
        assert found == sorted(set(found)) and set(found) <= set(drawn) and len(found) == min(len(drawn), cap)
        member[step, found] = 1
    others = np.arange(n)
    rate = float((stats.binom.pmf(others, n - 1, q) * q * np.minimum(1, cap / (others + 1))).sum())
    z = (member.mean(0) - rate) * math.sqrt(steps / (rate * (1 - rate)))
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert abs(float(member.mean()) - rate) < 4 * math.sqrt(rate * (1 - rate) / member.numel())
    sizes = torch.bincount(member.sum(1).long(), minlength=cap + 1)
    wanted = np.append(stats.binom.pmf(range(cap), n, q), stats.binom.sf(cap - 1, n, q)) * steps
    assert stats.chisquare(np.append(sizes[:2].sum(), sizes[2:]), np.append(wanted[:2].sum(), wanted[2:])).pvalue > 1e-3


def test_the_subset_is_uniform_and_does_not_depend_on_the_draw() -> None:
    """All ten pairs of five, for draws of low and of high indices, and of those the next step."""
    for drawn in ([0, 1, 2, 3, 4], [5, 90, 91, 10**9, 10**12]):
        pairs = collections.Counter(tuple(kept(drawn, 2, seed=1, step=s)) for s in range(2500))
        assert set(pairs) == set(itertools.combinations(drawn, 2))
        assert stats.chisquare(list(pairs.values())).pvalue > 1e-3
    steps = range(2500)
    first = [0 in kept([0, 1, 2, 3, 4], 2, seed=1, step=s) for s in steps]
    drawn_by = [poisson_draw(1, step=s, size=40, sample_rate=0.2) for s in steps]  # of the same seed
    for other in (first[1:], [0 in drawn for drawn in drawn_by], list(map(len, drawn_by))):
        assert abs(float(np.corrcoef(first[: len(other)], other)[0, 1])) < 4 / math.sqrt(2500)


@pytest.mark.parametrize("secure", [False, True])
def test_one_less_drawn_lets_one_in_and_moves_no_other(secure: bool) -> None:
    for step in range(50):
        drawn = poisson_draw(2, step=step, size=60, sample_rate=0.3, secure=secure)
        before = set(kept(drawn, 9, seed=2, step=step, secure=secure))
        for out in drawn:
            after = set(kept([i for i in drawn if i != out], 9, seed=2, step=step, secure=secure))
            assert before - {out} <= after and len(after - before) == (out in before and len(drawn) > 9)


def test_numbers_at_places_are_those_in_a_row() -> None:
    places = torch.tensor([7, 0, 3, 3, 100, 41])
    for secure in (False, True):
        row = uniform(9, step=4, stream=Stream.TRUNCATION, numel=101, secure=secure)
        assert torch.equal(uniform_at(9, step=4, stream=Stream.TRUNCATION, places=places, secure=secure), row[places])
        assert not torch.equal(row, uniform(9, step=4, stream=Stream.SAMPLING, numel=101, secure=secure))
    far = uniform(9, step=4, stream=Stream.TRUNCATION, numel=3, start=2**40)
    assert torch.equal(uniform_at(9, step=4, stream=Stream.TRUNCATION, places=torch.arange(2**40, 2**40 + 3)), far)
    with pytest.raises(PrivacyError, match="uniform numbers cannot come from stream"):
        uniform_at(9, step=4, stream=Stream.GRADIENT, places=places)
    with pytest.raises(PrivacyError, match="logical step"):
        uniform_at(9, step=2**32, stream=Stream.PARTS, places=places)


def test_draws_are_those_without_a_cap_cut_down() -> None:
    whole, capped = draws(loader_of(None, steps=40)), draws(loader_of(steps=40))
    assert capped == [kept(drawn, 10, seed=0, step=step) for step, drawn in enumerate(whole)] != whole
    assert max(map(len, capped)) == 10 < max(map(len, whole))
    assert draws(loader_of(N, steps=40)) == whole
    assert draws(loader_of(steps=40, physical_batch_size=3)) == capped != draws(loader_of(steps=40, seed=1))
    assert draws(loader_of(steps=40, secure=True)) != capped


# ---- physical batches


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("cap", "physical", "world"), [(10, 4, 1), (10, 16, 1), (10, 1, 1), (11, 2, 3), (12, 3, 2), (90, 7, 1)]
)
def test_every_step_has_as_many_physical_batches(cap: int, physical: int, world: int, whole: bool) -> None:
    """Of draws that are empty as of those that are full, on all ranks, which deal each draw out."""
    count = math.ceil(cap / (world * physical))
    parts: list[list[list[int]]] = []
    for rank in range(world):
        sampler = loader_of(cap, physical_batch_size=physical)._sampler
        sampler.rank, sampler.world_size, sampler.sample_rate = rank, world, 0.1
        sampler.cover(range(60), whole=whole)
        requests = list(sampler)
        assert len(requests) == 60 * (1 if whole else count)
        assert {r.size for r in requests} == {physical * count if whole else physical}
        assert {r.parts for r in requests} == {1 if whole else count}
        assert all(len(r.indices) <= r.size for r in requests)
        steps = [[i for r in requests if r.step == step for i in r.indices] for step in range(60)]
        parts.append(steps)
    wanted = [kept(poisson_draw(0, step=s, size=N, sample_rate=0.1), cap, seed=0, step=s) for s in range(60)]
    assert [sorted(itertools.chain(*of_ranks)) for of_ranks in zip(*parts, strict=True)] == wanted
    assert min(map(len, wanted)) == 0


def test_what_was_told_to_an_accountant_stays() -> None:
    loader = loader_of(10)
    for name in ("max_batch_size", "sample_rate"):
        with pytest.raises(AttributeError):
            setattr(loader, name, 1)
    assert loader.truncation == (N, 10)


def test_padding_alone() -> None:
    """Physical batches behind the examples of a small draw hold padding, and end the step."""
    loader = loader_of(10, expected=0.2, steps=6, physical_batch_size=4)
    batches = list(loader.batches())
    assert [b.ends_step for b in batches] == [False, False, True] * 6
    assert all(b.data[0].shape == (4,) and torch.equal(b.data[0] != 0, b.mask) for b in batches)
    assert not any(b.mask.any() for b in batches if b.ends_step)


def test_the_default_physical_size() -> None:
    usual = default_physical_batch_size(64, 1437)
    assert [default_physical_batch_size(64, 1437, cap) for cap in (usual, usual - 1, usual * 3 // 2)] == [
        usual,
        usual - 1,
        usual * 3 // 2,
    ]
    assert default_physical_batch_size(64, 1437, usual * 3) == usual * 3 // 2
    assert default_physical_batch_size(64, 1437, usual * 3 // 2 + 1) == (usual * 3 // 2 + 2) // 2
    assert loader_of(12).physical_batch_size == 12 and loader_of(4).physical_batch_size == 4
    assert loader_of(12, physical_batch_size=5).physical_batch_size == 5


# ---- the loop, with sums that are given


class Run:
    def __init__(self, loader: PoissonLoader, truncation: Any = "its own") -> None:
        self.model, self.loader = PrivateModel(1.0, a=torch.zeros(1)), loader
        truncation = loader.truncation if truncation == "its own" else truncation
        self.accountant = PrivacyAccountant(noise_multiplier=2.0, sample_rate=0.2, truncation=truncation)
        self.optimizer = DPOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=1.0), self.model, noise_multiplier=2.0,
            expected_batch_size=BATCH, seed=5, accountant=self.accountant,
        )  # fmt: skip

    def train(self, batches: Any) -> list[float]:
        found = []
        for (x,) in batches:
            self.model.engine.backward(x, x)
            before = self.model.a.item()
            self.optimizer.step()
            self.optimizer.zero_grad()
            found.append(before - self.model.a.item())
        return found


@pytest.mark.parametrize("whole", [True, False])
def test_a_step_counts_its_kept_examples_once(whole: bool) -> None:
    loader = loader_of(steps=12, physical_batch_size=3)
    run = Run(loader)
    loader.attach(run.model, run.optimizer)
    steps = run.train(loader if whole else loader.parts())
    wanted = [sum(i + 1.0 for i in drawn) / BATCH for drawn in draws(loader_of(steps=12))]
    moves = [s for s in steps if s] if not whole else steps
    assert len(moves) == run.optimizer.logical_step == run.accountant.steps == 12
    noise = [m - w for m, w in zip(moves, wanted, strict=True)]
    assert max(map(abs, noise)) < 5 * 2.0 / BATCH  # sums are hundreds
    assert run.accountant.history == [(2.0, (0.2, N, 10), 12)]


@pytest.mark.parametrize(
    ("cap", "truncation", "message"),
    [
        (10, None, "keeps at most 10 of a draw from 40 examples, the accountant assumes all of a draw"),
        (None, (40, 10), "keeps all of a draw, the accountant assumes at most 10 of a draw from 40 examples"),
        (10, (40, 11), "at most 10 of a draw from 40 examples, the accountant assumes at most 11"),
        (10, (41, 10), "at most 10 of a draw from 40 examples, the accountant assumes at most 10 of a draw from 41"),
    ],
)
def test_an_accountant_of_another_cap_is_refused(cap: Any, truncation: Any, message: str) -> None:
    loader = loader_of(cap)
    run = Run(loader, truncation)
    with pytest.raises(PrivacyError, match=f"(?s){message}.*with truncation=loader.truncation"):
        loader.attach(run.model, run.optimizer)
    right = Run(loader, loader.truncation)  # what the remedy says
    loader.attach(right.model, right.optimizer)


def test_another_accountant_in_the_place_of_one() -> None:
    run = Run(loader_of())
    other = PrivacyAccountant(noise_multiplier=2.0, sample_rate=0.2)
    with pytest.raises(PrivacyError, match=r"(?s)counts all of a draw, in place of .* 10 of .*truncation=\(40, 10\)"):
        run.optimizer.accountant = other
    run.optimizer.accountant = PrivacyAccountant(noise_multiplier=2.0, sample_rate=0.2, truncation=(40, 10))


def test_a_cap_of_ones_own_accountant_that_is_none_is_refused() -> None:
    loader = loader_of()
    run = Run(loader)

    class Own(PrivacyAccountant):
        truncation = property(lambda self: (40, 2.5))  # type: ignore[assignment]

    with pytest.raises(PrivacyError, match="truncation is"):
        run.optimizer.accountant = Own(noise_multiplier=2.0, sample_rate=0.2)


class Plain:
    """An accountant of the user's own, that counts caps: in lists, as JSON gives them back."""

    relation, truncation = "zero_out", (40, 10)
    noise_multiplier, sample_rate = 2.0, 0.2

    def __init__(self) -> None:
        self.history: list[Any] = []

    @property
    def steps(self) -> int:
        return sum(n for _, _, n in self.history)

    def step(self, n: int = 1, *, event: Any = None) -> None:
        rate = [event.sampling_probability, event.dataset_size, event.truncated_batch_size]
        self.history.append([event.noise_multiplier, rate, n])

    def move_noise_multiplier(self, value: float) -> None:
        raise NotImplementedError

    def epsilon(self, delta: float) -> float:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: Any) -> None:
        self.history = list(state_dict["history"])


def test_an_accountant_of_ones_own_that_knows_of_caps() -> None:
    loader = loader_of(steps=3)
    run = Run(loader)
    run.optimizer.accountant = own = Plain()  # type: ignore[assignment]
    loader.attach(run.model, run.optimizer)
    run.train(loader)
    assert own.history == [[2.0, [0.2, 40, 10], 1]] * 3
    counted = PrivacyAccountant(noise_multiplier=2.0, sample_rate=0.2, truncation=(40, 10))
    counted.load_state_dict(own.state_dict())
    assert counted.history == [(2.0, (0.2, 40, 10), 1)] * 3


# ---- states and refusals


def test_states() -> None:
    loader = loader_of(steps=9, physical_batch_size=5)
    taken = [b.data[0][b.mask] for b in itertools.islice(loader.batches(), 8)]
    state = loader.state_dict()
    assert len(taken) == 8 and state["step"] == 4 and state["max_batch_size"] == 10
    other = loader_of(steps=9, seed=7)
    other.load_state_dict(state)
    assert draws(other) == draws(loader_of(steps=9))[4:]
    for cap in (None, 11):
        with pytest.raises(PrivacyError, match=f"(?s)max_batch_size was 10 .* and is {cap} here.*the same max_batch"):
            loader_of(cap, steps=9).load_state_dict(state)
    old = {k: v for k, v in state.items() if k != "max_batch_size"}  # of a loader before there were caps
    with pytest.raises(PrivacyError, match="max_batch_size was None in the saved run and is 10"):
        loader_of(steps=9).load_state_dict(old)
    loader_of(None, steps=9).load_state_dict(old)


@pytest.mark.parametrize("cap", [0, -1, 2.0, True, "8"])
def test_caps_without_sense_are_refused(cap: Any) -> None:
    with pytest.raises(PrivacyError, match="(?s)max_batch_size is .*an integer, 1 or more"):
        loader_of(cap)


def test_what_a_loader_cannot_do_is_refused() -> None:
    with pytest.raises(PrivacyError, match="(?s)'auto', and a loader does not know .* give make_private a DataLoader"):
        loader_of("auto")  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="(?s)max_batch_size 10, and draws from 2 parts .*leave out max_batch_size"):
        loader_of(bands=2)


def test_of_a_data_loader() -> None:
    plain = DataLoader(TensorDataset(torch.arange(60)), batch_size=5)
    loader = PoissonLoader.from_dataloader(plain, max_batch_size=9)
    assert loader.truncation == (60, 9) and "max_batch_size=9" in repr(loader)
    assert loader_of(None).truncation is None and "max_batch_size" not in repr(loader_of(None))
