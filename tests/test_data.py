"""PoissonLoader: the draws, the padding, the ordinary loop, and every refusal."""

from __future__ import annotations

import dataclasses
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

from dpcompile import data, optim, sampling
from dpcompile.data import PhysicalBatch, PoissonLoader
from dpcompile.errors import PrivacyError
from dpcompile.optim import DPOptimizer
from dpcompile.padding import zero_example
from dpcompile.privacy import PrivacyAccountant
from dpcompile.sampling import default_physical_batch_size, poisson_draw


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
        assert torch.equal(x != 0, batch.mask) and torch.equal(y != 0, batch.mask)
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


def test_zero_examples_keep_structure_and_no_value():
    array = np.full((2, 3), 7, dtype=np.int16)
    example = {
        "tensor": torch.full((2,), 3, dtype=torch.uint8),
        "array": array,
        "scalar": np.float32(2.5),
        "plain": [5, 2.5, True, 1j, "text", b"raw", None],
        "point": Point(1, torch.ones(2)),
        "record": Record(torch.ones(2, 2), 9),
    }
    zero = zero_example(example)
    assert zero["tensor"].dtype == torch.uint8 and zero["tensor"].tolist() == [0, 0]
    assert zero["array"].dtype == np.int16 and not zero["array"].any() and array.all()
    assert type(zero["scalar"]) is np.float32 and zero["scalar"] == 0
    assert zero["plain"] == [0, 0.0, False, 0j, "", b"", None]
    assert isinstance(zero["point"], Point) and zero["point"].x == 0 and not zero["point"].y.any()
    assert isinstance(zero["record"], Record) and zero["record"].label == 0 and not zero["record"].image.any()


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


def test_the_users_collation_sees_a_whole_physical_batch():
    def collate(examples):
        assert len(examples) == 6
        return torch.stack([x for x, _ in examples]), None

    loader = loader_of(collate_fn=collate, physical_batch_size=6)
    assert all(b.data[0].shape == (6,) and b.data[1] is None for b in loader.batches())


def test_a_padding_example_can_be_given():
    loader = loader_of(padding_example=(torch.tensor(-5.0), torch.tensor(0)), physical_batch_size=16)
    batch = next(loader.batches())
    assert (batch.data[0][~batch.mask] == -5).all() and (~batch.mask).any()


class Thing:
    pass


def test_an_example_without_an_evident_zero_is_refused():
    with pytest.raises(PrivacyError, match=r"part of type .*Thing\n.*padding_example"):
        PoissonLoader(Items([Thing()] * 3), expected_batch_size=1)


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


def backward(model: PrivateModel, x: torch.Tensor) -> None:
    """As the compiled model would: the masked sum, and the mask is used up."""
    mask, model.engine.mask = model.engine.mask, None
    assert mask is not None and mask.shape == x.shape
    model.engine.deliver(a=(x * mask).sum().view(1))


@pytest.mark.parametrize("physical", [3, 40])
@pytest.mark.parametrize("zero_first", [True, False])
def test_the_ordinary_loop_sums_each_logical_batch_once(physical, zero_first):
    model, optimizer, loader = trained(physical_batch_size=physical)
    updates = []
    optimizer.register_step_post_hook(lambda o, a, k: updates.append(gradient(model) * 8))
    for _ in range(2):
        for x, _ in loader:
            if zero_first:
                optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
            if not zero_first:
                optimizer.zero_grad()
    assert updates == pytest.approx([sum(d) for d in draws(loader_of(steps=10))])
    assert optimizer.logical_step == loader.step == 10
    assert model.engine.mask is None and optimizer.accumulating is False


def test_the_accountant_counts_draws_not_physical_batches():
    accountant = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.2)
    model, optimizer, loader = trained(sigma=1.0, accountant=accountant, physical_batch_size=2)
    for x, _ in loader:
        backward(model, x)
        optimizer.step()
        optimizer.zero_grad()
    assert accountant.steps == 5


def test_breaking_off_inside_a_draw_discards_it_and_goes_on_with_the_next():
    model, optimizer, loader = trained(physical_batch_size=2)
    for x, _ in loader:
        assert optimizer.accumulating
        backward(model, x)
        optimizer.step()
        break
    assert optimizer.logical_step == 0 and loader.step == 1 and not optimizer.accumulating
    with pytest.raises(PrivacyError, match="without a clipped backward"):
        optimizer.step()  # part of a draw is no Poisson sample
    before = optimizer.logical_step
    for x, _ in loader:
        backward(model, x)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.logical_step == before + 5 and loader.step == 6


def test_breaking_off_after_a_step_repeats_no_draw():
    model, optimizer, loader = trained(physical_batch_size=40)
    seen = []
    for _ in range(3):
        for i, (x, y) in enumerate(loader):
            seen.append(y[y > 0].tolist())
            backward(model, x)
            optimizer.step()
            optimizer.zero_grad()
            if i == 1:
                break
    assert seen == draws(loader_of(steps=6))


def test_a_draw_that_was_not_stepped_is_refused():
    model, optimizer, loader = trained(physical_batch_size=40)
    with pytest.raises(PrivacyError, match=r"not stepped after the last draw.*\n.*optimizer.discard"):
        for x, _ in loader:
            backward(model, x)
    for x, _ in loader:  # what was left is dropped
        backward(model, x)
        optimizer.discard()
    assert optimizer.logical_step == 0


def test_two_passes_at_once_are_refused():
    model, optimizer, loader = trained()
    older: Any = iter(loader)
    next(older)
    newer = iter(loader)
    next(newer)
    with pytest.raises(PrivacyError, match="another pass over the same loader has begun"):
        next(older)
    assert model.engine.mask is not None  # the older pass has not touched the newer one's mask
    older.close()
    assert model.engine.mask is not None


def test_iterating_without_attaching_is_refused():
    with pytest.raises(PrivacyError, match=r"not attached.*\n.*loader.attach\(model, optimizer\)"):
        iter(loader_of())


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
