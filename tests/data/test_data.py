"""PoissonLoader: the draws, the padding, the ordinary loop, and every refusal."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from fakes import PrivateModel, engine_of
from scipy import stats
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from dpcompile.accounting.accountant import PrivacyAccountant
from dpcompile.data import loader as data
from dpcompile.data import sampling
from dpcompile.data.loader import PhysicalBatch, PoissonLoader
from dpcompile.data.sampling import default_physical_batch_size, poisson_draw
from dpcompile.errors import PrivacyError
from dpcompile.optim import optimizer as optim
from dpcompile.optim.optimizer import DPOptimizer


@pytest.fixture(autouse=True)
def fake_engine(monkeypatch):
    monkeypatch.setattr(optim, "engine_of", engine_of)
    monkeypatch.setattr(data, "engine_of", engine_of)


def numbers(n: int) -> TensorDataset:
    """Example i is (i + 1, label i + 1): zero is padding only."""
    return TensorDataset(torch.arange(1.0, n + 1), torch.arange(1, n + 1))


def loader_of(n: int = 40, expected: float = 8, **options) -> PoissonLoader:
    return PoissonLoader(numbers(n), expected_batch_size=expected, **{"seed": 0, **options})


def draws(loader: PoissonLoader) -> list[list[int]]:
    """The examples of each logical step of one pass."""
    steps, current = [], []
    for batch in loader.batches():
        current += batch.data[1][batch.mask].tolist()
        if batch.ends_step:
            steps.append(current)
            current = []
    return steps


# ---- the draws


@pytest.mark.parametrize("secure", [False, True])
def test_each_example_is_in_each_draw_independently_with_the_sample_rate(secure):
    size, rate, steps = 200, 0.13, 600
    member = torch.zeros(steps, size)
    for step in range(steps):
        member[step, poisson_draw(4, step=step, size=size, sample_rate=rate, secure=secure)] = 1
    deviation = math.sqrt(rate * (1 - rate))
    assert abs(member.mean().item() - rate) < 4 * deviation / math.sqrt(member.numel())
    per_example = (member.mean(0) - rate) * math.sqrt(steps) / deviation
    assert stats.kstest(per_example.numpy(), "norm").pvalue > 1e-3  # no position is favoured
    observed = torch.bincount(member.sum(1).to(torch.int64), minlength=size + 1)
    assert stats.binom(size, rate).var() * 0.8 < member.sum(1).var().item() < stats.binom(size, rate).var() * 1.2
    assert observed.argmax().item() in range(22, 31)
    for a, b in ((member[:, :-1], member[:, 1:]), (member[:-1], member[1:])):  # neighbours, and steps
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()) < 4 / math.sqrt(a.numel())


def test_the_gaps_are_exactly_those_of_coin_tosses():
    """The number of draws that start at index k is geometric."""
    firsts = [next(iter(poisson_draw(1, step=s, size=60, sample_rate=0.1)), 60) for s in range(3000)]
    observed = np.bincount(np.minimum(firsts, 20), minlength=21)
    expected = np.array([0.1 * 0.9**k for k in range(20)] + [0.9**20]) * 3000
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("rate", [1e-6, 0.3, 0.999, 1.0])
def test_a_draw_is_ascending_and_within_the_dataset(rate):
    drawn = poisson_draw(0, step=3, size=500, sample_rate=rate)
    assert drawn == sorted(set(drawn)) and set(drawn) <= set(range(500))
    assert len(drawn) == {1e-6: 0, 1.0: 500}.get(rate, len(drawn))


def test_how_many_gaps_are_drawn_at_a_time_changes_nothing(monkeypatch):
    expected = [poisson_draw(2, step=s, size=300, sample_rate=0.3) for s in range(4)]
    monkeypatch.setattr(sampling, "_at_a_time", lambda expected: 7)
    assert [poisson_draw(2, step=s, size=300, sample_rate=0.3) for s in range(4)] == expected


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize(("size", "rate"), [(600, 0.01), (1, 0.5), (40, 1e-6), (50, 0.999), (7, 1.0), (30000, 0.2)])
def test_draws_that_are_made_together_are_the_same(monkeypatch, size, rate, secure):
    """At every place among their neighbours; also where the numbers of one pass do not reach the end."""
    at_a_time = sampling._at_a_time
    for short in (False, True):
        monkeypatch.setattr(sampling, "_at_a_time", (lambda expected: 3) if short and size < 1000 else at_a_time)
        for steps in (range(70), range(5, 9), range(2**32 - 2, 2**32), range(3, 3)):
            steps = steps[:4] if size > 1000 else steps
            together = list(sampling.poisson_draws(7, steps=steps, size=size, sample_rate=rate, secure=secure))
            each = [poisson_draw(7, step=s, size=size, sample_rate=rate, secure=secure) for s in steps]
            assert together == each
    with pytest.raises(PrivacyError, match="logical step"):
        list(sampling.poisson_draws(7, steps=[2**32], size=9, sample_rate=0.5))


def test_draws_depend_on_seed_and_step_only():
    assert draws(loader_of()) == draws(loader_of(physical_batch_size=3)) == draws(loader_of(num_workers=0))
    assert draws(loader_of()) != draws(loader_of(seed=1))
    assert draws(loader_of()) != draws(loader_of(secure=True))
    assert loader_of(seed=None).seed != loader_of(seed=None).seed


def test_every_pass_draws_anew():
    loader = loader_of()
    first, second = draws(loader), draws(loader)
    assert len(loader) == len(first) == len(second) == 5 and loader.step == 10
    assert first != second and first + second == draws(loader_of(steps=10))


@pytest.mark.parametrize(("expected", "steps", "length"), [(8, None, 5), (7, None, 6), (40, None, 1), (7, 11, 11)])
def test_length_is_the_logical_steps_of_a_pass(expected, steps, length):
    loader = loader_of(expected=expected, steps=steps)
    assert len(loader) == len(draws(loader)) == length


# ---- physical batches


@pytest.mark.parametrize("physical", [1, 3, 8, 64])
def test_physical_batches_have_one_size_and_zeros_where_the_mask_is_false(physical):
    loader = loader_of(physical_batch_size=physical)
    ends = 0
    for batch in loader.batches():
        assert isinstance(batch, PhysicalBatch)
        x, y = batch.data
        assert x.shape == y.shape == batch.mask.shape == (physical,) and batch.mask.dtype == torch.bool
        assert torch.equal(x != 0, batch.mask) and torch.equal(x[batch.mask].long(), y[batch.mask])
        assert not batch.mask.any() or (y[~batch.mask] == y[batch.mask].min()).all()  # a number stays one of its kind
        ends += batch.ends_step
    assert ends == len(loader)


def test_an_empty_draw_is_a_step_of_padding():
    loader = loader_of(n=40, expected=0.01, steps=3, physical_batch_size=4)
    batches = list(loader.batches())
    assert [b.ends_step for b in batches] == [True] * 3
    assert not any(b.mask.any() for b in batches) and all(b.data[0].shape == (4,) for b in batches)


@pytest.mark.parametrize(("expected", "size"), [(1, 1), (4, 40), (64, 1437), (256, 60_000), (1024, 10**6), (50, 50)])
def test_the_default_physical_size_rarely_overflows(expected, size):
    physical = default_physical_batch_size(expected, size)
    assert physical <= size and (physical % 8 == 0 or physical == size)
    assert stats.binom.sf(physical, size, expected / size) < 0.04
    assert physical <= expected + 2 * math.sqrt(expected) + 8


Point = namedtuple("Point", "x y")


@dataclasses.dataclass
class Record:
    image: torch.Tensor
    label: int


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class Batched(Items):
    def __getitems__(self, indices):
        return [self.items[i] for i in indices]


@pytest.mark.parametrize("kind", [Items, Batched])
def test_the_batch_keeps_the_structure_of_the_dataset(kind):
    dataset = kind([{"x": torch.ones(2, 3), "meta": (i + 1, f"n{i}")} for i in range(20)])
    loader = PoissonLoader(dataset, expected_batch_size=5, physical_batch_size=8, seed=1)
    batch = next(loader.batches())
    assert batch.data["x"].shape == (8, 2, 3) and batch.data["meta"][0].shape == (8,)
    assert [name != "" for name in batch.data["meta"][1]] == batch.mask.tolist()


def test_the_users_collation_sees_drawn_examples_only():
    sizes = []

    def collate(examples):
        sizes.append(len(examples))
        assert all(x != 0 for x, _ in examples)
        return torch.stack([x for x, _ in examples]), None

    loader = loader_of(collate_fn=collate, physical_batch_size=6)
    batches = list(loader.batches())
    assert all(b.data[0].shape == (6,) and b.data[1] is None for b in batches)
    assert sizes[1] == sizes[0] + 1  # one more of the first, to see what grows
    assert [sizes[0], *sizes[2:]] == [int(b.mask.sum()) for b in batches]


def longest_first(examples):
    """As for pack_padded_sequence: sorted by length, padded to the longest."""
    examples = sorted(examples, key=len, reverse=True)
    return torch.nn.utils.rnn.pad_sequence(examples, batch_first=True), torch.tensor([len(x) for x in examples])


def test_a_collation_may_sort_and_lengths_of_padding_are_lengths():
    texts = Items([torch.full((1 + i % 7,), i + 1.0) for i in range(40)])
    loader = PoissonLoader(texts, expected_batch_size=8, physical_batch_size=5, seed=0, collate_fn=longest_first)
    seen = []
    for batch in loader.batches():
        x, lengths = batch.data
        assert len(x) == len(lengths) == 5 and (lengths > 0).all()
        assert torch.equal((x != 0).any(1), batch.mask)
        assert all((row[:n] == row[0]).all() for row, n in zip(x[batch.mask], lengths[batch.mask], strict=True))
        seen += x[batch.mask][:, 0].long().tolist()
    assert sorted(seen) == sorted(i for d in draws(loader_of()) for i in d)


def test_time_major_batches_are_filled_up_along_the_examples():
    texts = Items([torch.ones(4, 2) for _ in range(40)])
    along = lambda examples: torch.stack(examples, 1)  # noqa: E731
    loader = PoissonLoader(texts, expected_batch_size=4, physical_batch_size=9, seed=0, collate_fn=along)
    for batch in loader.batches():
        assert batch.data.shape == (4, 9, 2) and torch.equal((batch.data != 0).all(2).all(0), batch.mask)


def test_every_kind_of_container_is_filled_up():
    class Bag:
        def __init__(self, x):
            self.x = x

    def collate(examples):
        x = torch.stack([e[0] for e in examples])
        names = [str(i) for i in x.tolist()]
        return {"bag": Bag(x), "point": Point(x, x.numpy()), "record": Record(x, 3), "ids": names}

    batch = next(loader_of(collate_fn=collate, physical_batch_size=16).batches())
    data, real = batch.data, int(batch.mask.sum())
    assert 0 < real < 16 and type(data["bag"]) is Bag and isinstance(data["point"], Point)
    assert data["record"].label == 3 and isinstance(data["point"].y, np.ndarray)
    for x in (data["bag"].x, data["point"].x, torch.from_numpy(data["point"].y), data["record"].image):
        assert torch.equal(x != 0, batch.mask)
    assert [i != "" for i in data["ids"]] == batch.mask.tolist()


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (lambda e: torch.cat([torch.stack([x, x]) for x, _ in e]), r"returns \d+ rows for \d+ examples, and"),
        (lambda e: torch.stack([x for x, _ in e[:3]]), "nothing that collate_fn returns grows"),
        (lambda e: torch.zeros(len(e), len(e)), r"it has no row for each example\n.*one row for each example"),
        (lambda e: [x for x, _ in e], "returns another structure for one example more"),
        (
            lambda e: torch.nn.utils.rnn.pack_sequence([x.view(1) for x, _ in e]),
            r"a PackedSequence: .*\n.*return the padded tensor and the lengths",
        ),
    ],
)
def test_a_collation_without_a_row_for_each_example_is_refused(collate, message):
    with pytest.raises(PrivacyError, match=message):
        next(loader_of(collate_fn=collate).batches())


def test_a_collation_that_drops_rows_of_some_batches_is_refused():
    few = lambda e: torch.stack([x for x, _ in e if x < 30])  # noqa: E731
    with pytest.raises(PrivacyError, match=r"rows for \d+ examples"):
        list(loader_of(collate_fn=few).batches())


class Twice(Items):
    def __getitems__(self, indices):
        return [self.items[i] for i in indices for _ in range(2)]


def test_a_dataset_with_several_items_for_an_index_is_refused():
    with pytest.raises(PrivacyError, match=r"gave \d+ items for \d+ indices.*\n.*one item for each index"):
        next(PoissonLoader(Twice(torch.ones(9)), expected_batch_size=5, seed=0).batches())


def test_a_padding_example_can_be_given():
    loader = loader_of(padding_example=(torch.tensor(-5.0), torch.tensor(0)), physical_batch_size=16)
    batch = next(loader.batches())
    assert (batch.data[0][~batch.mask] == -5).all() and (~batch.mask).any()


def test_a_padding_example_is_filled_up_to_the_longest_and_may_not_be_longer():
    texts = Items([torch.full((3 + i % 4,), i + 1.0) for i in range(40)])
    options = {"expected_batch_size": 8, "physical_batch_size": 16, "seed": 0, "collate_fn": longest_first}
    batch = next(PoissonLoader(texts, padding_example=torch.full((2,), -1.0), **options).batches())
    x, lengths = batch.data
    filled = x[~batch.mask]
    assert (lengths[~batch.mask] == 2).all() and (filled[:, :2] == -1).all() and (filled[:, 2:] == 0).all()
    with pytest.raises(PrivacyError, match="does not fit into rows"):
        next(PoissonLoader(texts, padding_example=torch.ones(20), **options).batches())


class Noisy(Items):
    def __getitem__(self, i):
        return self.items[i], torch.rand(())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_give_the_same_batches_and_repeat_their_own_randomness(persistent):
    def run(workers: int):
        options = {"num_workers": workers, "persistent_workers": persistent} if workers else {}
        loader = PoissonLoader(Noisy(list(range(1, 31))), expected_batch_size=6, seed=3, **options)
        return [b for _ in range(2) for b in loader.batches()]

    serial, first, second = run(0), run(2), run(2)
    assert [b.data[0].tolist() for b in serial] == [b.data[0].tolist() for b in first]
    assert [b.ends_step for b in serial] == [b.ends_step for b in first]
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(serial, first, strict=True))
    assert all(torch.equal(a.data[1], b.data[1]) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_are_seeded_by_the_loader():
    def augmentation(seed: int, step: int) -> list[float]:
        loader = PoissonLoader(Noisy(list(range(4))), expected_batch_size=4, seed=seed, num_workers=1)
        loader.step = step
        return next(loader.batches()).data[1].tolist()

    runs = [augmentation(seed, step) for seed, step in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(run) for run in runs}) == 3 and augmentation(0, 1) == runs[1]


# ---- the ordinary loop


def trained(n: int = 40, expected: float = 8, sigma: float = 0.0, accountant=None, **options):
    model = PrivateModel(a=torch.zeros(1))
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = DPOptimizer(
        inner, model, noise_multiplier=sigma, expected_batch_size=expected, seed=0, accountant=accountant
    )
    return model, optimizer, loader_of(n, expected, **options).attach(model, optimizer)


def gradient(model: PrivateModel) -> float:
    assert model.a.grad is not None
    return model.a.grad.item()


def backward(model: PrivateModel, x: torch.Tensor, value: torch.Tensor | None = None) -> None:
    model.engine.backward(x, x if value is None else value)


def sums_of(model: PrivateModel, optimizer: DPOptimizer) -> list[float]:
    """Filled with the clipped sum of each step."""
    updates: list[float] = []
    optimizer.register_step_post_hook(lambda o, a, k: updates.append(gradient(model) * 8))
    return updates


EXPECTED = [sum(d) for d in draws(loader_of(steps=10))]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("physical", [3, 40])
@pytest.mark.parametrize("zero_first", [True, False])
def test_the_ordinary_loop_sums_each_logical_batch_once(physical, zero_first, whole):
    model, optimizer, loader = trained(physical_batch_size=physical)
    updates = sums_of(model, optimizer)
    for _ in range(2):
        batches = 0
        for x, _ in loader if whole else loader.parts():
            assert len(x) % physical == 0 and (whole or len(x) == physical)
            if zero_first:
                optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
            if not zero_first:
                optimizer.zero_grad()
            batches += 1
        assert batches == len(loader) or not whole
    assert updates == pytest.approx(EXPECTED)
    assert optimizer.logical_step == loader.step == 10 and optimizer.accumulating is False


@pytest.mark.parametrize("whole", [True, False])
def test_the_accountant_counts_draws_not_physical_batches(whole):
    accountant = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.2)
    model, optimizer, loader = trained(sigma=1.0, accountant=accountant, physical_batch_size=2)
    for x, _ in loader if whole else loader.parts():
        backward(model, x)
        optimizer.step()
        optimizer.zero_grad()
    assert accountant.steps == 5


def test_the_optimizer_says_before_and_after_a_backward_whether_a_step_waits():
    model, optimizer, loader = trained(physical_batch_size=3)
    said, ends = [], [b.ends_step for b in loader_of(physical_batch_size=3).batches()]
    for x, _ in loader.parts():
        before = optimizer.accumulating
        backward(model, x)
        optimizer.step()
        said.append((before, optimizer.accumulating))
        optimizer.zero_grad()
    assert said == [(not end, not end) for end in ends] and not all(ends)
    with pytest.raises(PrivacyError, match=r"accumulating was set on an optimizer that is attached.*\n.*batches\(\)"):
        optimizer.accumulating = True


def test_breaking_off_inside_a_draw_discards_it_and_goes_on_with_the_next():
    model, optimizer, loader = trained(physical_batch_size=2)
    updates = sums_of(model, optimizer)
    for x, _ in loader.parts():
        assert optimizer.accumulating
        backward(model, x)
        optimizer.step()
        break
    optimizer.step()  # part of a draw is no Poisson sample
    assert optimizer.logical_step == 0 and loader.step == 1
    for x, _ in loader.parts():
        backward(model, x)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.logical_step == 5 and loader.step == 6 and updates == pytest.approx(EXPECTED[1:6])


def test_breaking_off_after_a_step_repeats_no_draw():
    model, optimizer, loader = trained(physical_batch_size=40)
    seen = []
    for _ in range(3):
        for i, (x, y) in enumerate(loader):
            seen.append(y[x > 0].tolist())
            backward(model, x)
            optimizer.step()
            optimizer.zero_grad()
            if i == 1:
                break
    assert seen == draws(loader_of(steps=6))


def test_a_draw_that_was_not_stepped_is_refused():
    model, optimizer, loader = trained(physical_batch_size=40)
    with pytest.raises(PrivacyError, match=r"not stepped after the last draw(.*\n)+.*optimizer.discard"):
        for x, _ in loader:
            backward(model, x)
    for x, _ in loader:  # what was left is dropped
        backward(model, x)
        optimizer.discard()
    assert optimizer.logical_step == 0


def test_two_passes_at_once_are_refused():
    _, _, loader = trained()
    older: Any = iter(loader)
    next(older)
    newer = iter(loader)
    next(newer)
    with pytest.raises(PrivacyError, match="another pass over the same loader has begun"):
        next(older)


# ---- batches that are not used at once


def ahead(batches, depth: int = 1, copy=None):
    """A prefetcher: takes ``depth`` batches before the first is used."""
    waiting = []
    for x, y in batches:
        waiting.append((x if copy is None else copy(x), y))
        if len(waiting) > depth:
            yield waiting.pop(0)
    yield from waiting


@pytest.mark.parametrize("copy", [None, torch.clone, lambda x: x.view(-1, 1)[:, 0]], ids=["itself", "copy", "view"])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("physical", "whole"), [(40, True), (3, True), (3, False)])
def test_batches_taken_ahead_keep_their_masks(physical, whole, depth, copy):
    model, optimizer, loader = trained(physical_batch_size=physical)
    updates = sums_of(model, optimizer)
    for _ in range(2):
        for x, _ in ahead(loader if whole else loader.parts(), depth, copy):
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
    assert updates == pytest.approx(EXPECTED) and optimizer.logical_step == 10


def test_the_last_batches_of_a_pass_may_be_used_in_the_next():
    model, optimizer, loader = trained()
    updates = sums_of(model, optimizer)
    for x, _ in ahead(itertools.chain(loader, loader), 2):
        backward(model, x)
        optimizer.step()
        optimizer.zero_grad()
    assert updates == pytest.approx(EXPECTED)


def test_draws_may_be_used_in_another_order():
    model, optimizer, loader = trained()
    updates = sums_of(model, optimizer)
    batches = iter(loader)
    for first, second in zip(batches, batches, strict=False):
        for x, _ in (second, first):
            backward(model, x)
            optimizer.step()
            optimizer.zero_grad()
    assert updates == pytest.approx([EXPECTED[i] for i in (1, 0, 3, 2)])


@pytest.mark.parametrize("whole", [True, False])
def test_a_pass_taken_whole_before_its_use_is_refused(whole):
    _, _, loader = trained(physical_batch_size=3)
    with pytest.raises(PrivacyError, match=r"the whole pass, 5 draws, was taken out .*\n.*not over list\(loader\)"):
        list(loader if whole else loader.parts())


def test_one_draw_may_be_listed():
    model, optimizer, loader = trained(steps=1)
    updates = sums_of(model, optimizer)
    for x, _ in list(loader):
        backward(model, x)
        optimizer.step()
    assert updates == pytest.approx(EXPECTED[:1])


def test_a_batch_given_up_is_lost_and_the_next_is_right():
    model, optimizer, loader = trained()
    updates = sums_of(model, optimizer)
    for i, (x, _) in enumerate(loader):
        if i % 2:
            continue
        backward(model, x)
        optimizer.step()
        optimizer.zero_grad()
    assert updates == pytest.approx(EXPECTED[0:5:2])


@pytest.mark.parametrize("other", [lambda x: x, torch.clone], ids=["itself", "copy"])
def test_a_batch_is_used_once(other):
    model, optimizer, loader = trained()
    batches = ahead(loader)
    x, _ = next(batches)
    backward(model, x)
    optimizer.step()
    optimizer.zero_grad()
    message = r"a second backward on one batch of the loader(.*\n)+.*anew for every epoch"
    with pytest.raises(PrivacyError, match=message):
        backward(model, other(x))


def test_what_is_no_batch_of_the_loader_is_refused():
    model, optimizer, loader = trained()
    for x, _ in loader:
        backward(model, x)
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(PrivacyError, match=r"on what is no batch of the loader(.*\n)+.*iterate over the loader"):
        backward(model, torch.arange(8.0))


def test_a_batch_that_the_loop_changes_is_known_while_it_is_the_only_one():
    model, optimizer, loader = trained()
    updates = sums_of(model, optimizer)
    for x, _ in loader:
        backward(model, x * 2 - 1, x)
        optimizer.step()
        optimizer.zero_grad()
    assert updates == pytest.approx(EXPECTED[:5])
    with pytest.raises(PrivacyError, match=r"2 batches of the loader wait to be used, and this call's"):
        for x, _ in ahead(loader):
            backward(model, x * 2 - 1)


def test_rows_that_the_loop_reorders_keep_their_mask():
    model, optimizer, loader = trained(physical_batch_size=16)
    updates = sums_of(model, optimizer)
    for x, _ in loader:
        backward(model, x[torch.randperm(len(x))])
        optimizer.step()
        optimizer.zero_grad()
    assert updates == pytest.approx(EXPECTED[:5])


def test_rows_that_the_loop_changes_and_reorders_are_refused():
    model, _, loader = trained(physical_batch_size=24)
    x, _ = next(iter(loader))
    with pytest.raises(PrivacyError, match=r"the rows of the batch have moved .*\n.*reorder them in collate_fn"):
        backward(model, x.flip(0) * 2)


def test_some_of_the_rows_are_refused():
    model, _, loader = trained(physical_batch_size=16)
    x, _ = next(iter(loader))
    with pytest.raises(PrivacyError, match=r"has 16 rows, and the model was called with 4\n.*\n.*whole"):
        backward(model, x[:4])


def test_tensors_of_two_batches_are_refused():
    _, _, loader = trained()
    batches: Any = iter(loader)
    (x, _), (_, y) = next(batches), next(batches)
    with pytest.raises(PrivacyError, match="are those of several batches"):
        draws_of(loader).claim([(x, 0), (y, 0)])


def draws_of(loader: PoissonLoader):
    assert loader._attached is not None
    return loader._attached[2]


def test_empty_draws_are_alike_and_taken_in_order():
    model, optimizer, loader = trained(expected=0.01, steps=3, physical_batch_size=4)
    for x, _ in ahead(loader, 2, torch.clone):
        backward(model, x)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.logical_step == 3


def test_another_optimizer_than_the_attached_one_is_refused():
    model, optimizer, loader = trained()
    other = DPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, noise_multiplier=0.0, expected_batch_size=8)
    x, _ = next(iter(loader))
    backward(model, x)
    with pytest.raises(PrivacyError, match=r"attached to another DPOptimizer.*\n.*step the optimizer that"):
        other.step()
    optimizer.step()


def test_iterating_without_attaching_is_refused():
    with pytest.raises(PrivacyError, match=r"not attached.*\n.*loader.attach\(model, optimizer\)"):
        next(iter(loader_of()))


# ---- saving and resuming


def test_a_resumed_loader_finishes_the_pass_with_the_same_draws():
    whole = loader_of(physical_batch_size=40)
    expected = draws(whole) + draws(whole)
    interrupted = loader_of(physical_batch_size=40)
    for i, _ in enumerate(interrupted.batches()):
        if i == 1:
            break
    resumed = loader_of(seed=None, physical_batch_size=40)
    resumed.load_state_dict(interrupted.state_dict())
    assert resumed.step == 2
    rest, next_pass = draws(resumed), draws(resumed)
    assert (len(rest), len(next_pass)) == (3, 5) and rest + next_pass == expected[2:]


def test_a_state_saved_at_the_end_of_a_pass_resumes_with_a_whole_one():
    loader, resumed = loader_of(), loader_of(seed=None)
    draws(loader)
    resumed.load_state_dict(loader.state_dict())
    assert len(draws(resumed)) == 5 and resumed.step == 10


def test_an_earlier_state_of_the_same_seed_is_refused():
    loader = loader_of()
    early = loader.state_dict()
    draws(loader)
    with pytest.raises(PrivacyError, match="stands at logical step 0, this loader at 5 of the same seed"):
        loader.load_state_dict(early)
    loader.load_state_dict(loader_of(seed=1).state_dict())
    assert loader.step == 0 and draws(loader) == draws(loader_of(seed=1))


@pytest.mark.parametrize(
    ("other", "name"),
    [({"n": 41}, "dataset_size"), ({"expected": 9}, "expected_batch_size"), ({"secure": True}, "secure")],
)
def test_a_state_of_other_draws_is_refused(other, name):
    with pytest.raises(PrivacyError, match=rf"{name} was .* in the saved run and is .* here"):
        loader_of(**other).load_state_dict(loader_of().state_dict())


def test_a_second_loader_with_the_same_draws_on_the_same_model_is_refused():
    model, optimizer, loader = trained()
    for x, _ in loader:
        backward(model, x)
        optimizer.step()
        optimizer.zero_grad()
    again = loader_of().attach(model, optimizer)
    with pytest.raises(PrivacyError, match=r"trained on draws 0 to 4 of the same seed already.*\n.*load the"):
        iter(again)
    next(iter(loader_of(seed=1).attach(model, optimizer)))
    again.load_state_dict(loader.state_dict())
    next(iter(again.attach(model, optimizer)))


# ---- from a DataLoader


@pytest.mark.parametrize("shuffle", [True, False])
def test_it_takes_over_a_dataloader(shuffle):
    def collate(examples):
        return default_collate(examples)

    plain = DataLoader(numbers(40), batch_size=8, shuffle=shuffle, collate_fn=collate, drop_last=True)
    loader = PoissonLoader.from_dataloader(plain, seed=0)
    assert loader.expected_batch_size == 8 and loader.dataset is plain.dataset
    assert draws(loader) == draws(loader_of())
    smaller = PoissonLoader.from_dataloader(plain, expected_batch_size=4, physical_batch_size=5, seed=0)
    assert (smaller.expected_batch_size, smaller.physical_batch_size, len(smaller)) == (4, 5, 10)


class OwnSampler(RandomSampler):
    pass


class OwnBatches:
    def __iter__(self):
        return iter([[0, 1]])

    def __len__(self):
        return 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sampler": WeightedRandomSampler([1.0] * 40, 40)}, "WeightedRandomSampler"),
        ({"sampler": SubsetRandomSampler(range(10))}, "SubsetRandomSampler"),
        ({"sampler": RandomSampler(numbers(40), replacement=True)}, "RandomSampler"),
        ({"sampler": RandomSampler(numbers(40), num_samples=7)}, "RandomSampler"),
        ({"sampler": OwnSampler(numbers(40))}, "OwnSampler"),
        ({"batch_sampler": OwnBatches()}, "OwnBatches"),
        ({"batch_size": None}, "SequentialSampler"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_loader_that_samples_otherwise_is_refused(options, named):
    with pytest.raises(PrivacyError, match=rf"sampler is {named}: it does not sample as the accountant assumes"):
        PoissonLoader.from_dataloader(DataLoader(numbers(40), **options))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_iterable_datasets_are_refused():
    with pytest.raises(PrivacyError, match="dataset Stream has no __len__.*\n.*map-style"):
        PoissonLoader(Stream(), expected_batch_size=1)
    with pytest.raises(PrivacyError, match="dataset Stream has no __len__"):
        PoissonLoader.from_dataloader(DataLoader(Stream()))


# ---- refusals


@pytest.mark.parametrize("expected", [0, -1, math.inf, math.nan, 41])
def test_expected_batch_sizes_without_sense_are_refused(expected):
    with pytest.raises(PrivacyError, match=r"expected_batch_size is .*, not in \(0, 40\]"):
        loader_of(expected=expected)


@pytest.mark.parametrize("name", ["physical_batch_size", "steps"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True])
def test_counts_without_sense_are_refused(name, value):
    with pytest.raises(PrivacyError, match=f"{name} is {value}"):
        loader_of(**{name: value})


def test_an_empty_dataset_is_refused():
    with pytest.raises(PrivacyError, match="the dataset is empty"):
        PoissonLoader(Items([]), expected_batch_size=1)


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(PrivacyError, match="the seed"):
        loader_of(seed=2**64)


def test_an_optimizer_that_does_not_fit_is_refused():
    model, optimizer, loader = trained()
    with pytest.raises(PrivacyError, match="the optimizer is a SGD, which adds no noise"):
        loader.attach(model, optimizer.optimizer)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="made for another model"):
        loader.attach(PrivateModel(a=torch.zeros(1)), optimizer)
    with pytest.raises(PrivacyError, match="draws 9 examples on average, the optimizer divides by 8"):
        loader_of(expected=9).attach(model, optimizer)
    with pytest.raises(PrivacyError, match="not a dpcompile model"):
        loader.attach(torch.nn.Linear(1, 1), optimizer)


def test_an_accountant_of_another_sample_rate_is_refused():
    accountant = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1)
    with pytest.raises(PrivacyError, match=r"samples at rate 0.2, the accountant assumes 0.1"):
        trained(sigma=1.0, accountant=accountant)


# ---- rates that were fixed without looking at the size


@pytest.mark.parametrize(
    ("given", "rate", "expected", "steps", "from_size"),
    [
        ({"expected_batch_size": 8}, 0.2, 8, 5, True),
        ({"expected_batch_size": 6}, 0.15, 6, 7, True),
        ({"sample_rate": 0.25}, 0.25, 10.0, 4, True),
        ({"sample_rate": 0.3, "expected_batch_size": 9}, 0.3, 9, 4, False),
        ({"sample_rate": 0.3, "expected_batch_size": 9, "steps": 2}, 0.3, 9, 2, False),
        ({"sample_rate": 0.5, "expected_batch_size": 1000}, 0.5, 1000, 2, False),
    ],
)
def test_rate_batch_size_and_steps_come_from_the_size_only_where_they_are_not_given(
    given: dict[str, Any], rate: float, expected: float, steps: int, from_size: bool
) -> None:
    loader = PoissonLoader(numbers(40), seed=0, **given)
    assert (loader.sample_rate, loader.expected_batch_size) == (pytest.approx(rate), pytest.approx(expected))
    assert (len(loader), loader.from_size) == (steps, from_size)
    drawn = [i for step in range(200) for i in poisson_draw(0, step=step, size=40, sample_rate=rate)]
    assert abs(len(drawn) / 8000 - rate) < 0.03
    assert [i - 1 for i in draws(loader)[0]] == poisson_draw(0, step=0, size=40, sample_rate=rate)


def test_rates_without_sense_are_refused() -> None:
    for odd in (0, -0.1, 1.5, math.nan, "0.1", True):
        with pytest.raises(PrivacyError, match=r"sample_rate is .*, not in \(0, 1\]"):
            PoissonLoader(numbers(40), sample_rate=odd)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match=r"neither expected_batch_size nor sample_rate.*\n.*expected_batch_size="):
        PoissonLoader(numbers(40))
    with pytest.raises(PrivacyError, match=r"expected_batch_size is inf, not in \(0, inf\)|expected_batch_size is inf"):
        PoissonLoader(numbers(40), sample_rate=0.1, expected_batch_size=math.inf)


def test_add_remove_needs_a_rate_that_does_not_come_from_the_size() -> None:
    def counting(rate: float) -> PrivacyAccountant:
        return PrivacyAccountant(noise_multiplier=1.0, sample_rate=rate, relation="add_remove")

    refused = r"(?s)comes from the size of the dataset.*sample_rate= and expected_batch_size=.*relation='zero_out'"
    with pytest.raises(PrivacyError, match=refused):
        trained(sigma=1.0, accountant=counting(0.2))
    model, optimizer, loader = trained(sigma=1.0, accountant=counting(0.2), sample_rate=0.2)
    assert not loader.from_size
    with pytest.raises(PrivacyError, match=r"for relation 'zero_out', in place of one for 'add_remove'"):
        optimizer.accountant = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.2)


def test_a_run_is_resumed_at_the_same_rate() -> None:
    saved = PoissonLoader(numbers(40), sample_rate=0.2, expected_batch_size=8, seed=0).state_dict()
    with pytest.raises(
        PrivacyError, match=r"(?s)sample_rate was 0.2 in the saved run and is 0.25 here.*same sample_rate"
    ):
        PoissonLoader(numbers(40), sample_rate=0.25, expected_batch_size=8, seed=0).load_state_dict(saved)
    loader_of().load_state_dict(saved)
    del saved["sample_rate"]  # as states of earlier versions
    loader_of().load_state_dict(saved)
    with pytest.raises(PrivacyError, match=r"sample_rate was nonsense"):
        loader_of().load_state_dict({**saved, "sample_rate": "nonsense"})
