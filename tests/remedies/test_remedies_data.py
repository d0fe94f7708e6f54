"""Loaders, draws and users: what their messages say to do, tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from poisson_parts import SIZE, attached, parts, poisson
from remedies import Right, data, equals, private, refused, stepped, trains
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

from dpcompile import PoissonLoader, PrivacyAccountant


@refused("pass a DataLoader with torch's default sampler (shuffle=True or False) or a PoissonLoader")
def test_a_weighted_sampler(told: int) -> Right:
    options: Any = {"shuffle": True} if told else {"sampler": WeightedRandomSampler([1.0] * 24, 24)}
    return trains(*private(data(**options)))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from data().dataset  # type: ignore[misc]


@refused("take a map-style dataset (with __getitem__ and __len__)")
def test_a_dataset_without_a_length(told: int) -> Right:
    return attached(PoissonLoader(data().dataset if told else Stream(), **SIZE))


@refused("give a dataset with at least one example")
def test_an_empty_dataset(told: int) -> Right:
    size = 24 if told else 0
    return attached(PoissonLoader(TensorDataset(torch.randn(size, 5), torch.zeros(size, dtype=torch.long)), **SIZE))


@refused("give an integer, 1 or more", slow=True)
def test_a_physical_batch_of_none(told: int) -> Right:
    return trains(*private(physical_batch_size=4 if told else 0))


@refused("give make_private a DataLoader and max_batch_size='auto', or give the loader a number", ways=2, slow=True)
def test_a_cap_that_a_loader_cannot_choose(told: int) -> Right:
    cap: Any = 12 if told == 2 else "auto"
    if told == 1:
        return trains(*private(max_batch_size=cap, accountant="pld"))
    loader = poisson(max_batch_size=cap)
    return trains(*private(loader, accountant="pld"))


@refused("give max_batch_size a number, or leave it out", ways=2, slow=True)
def test_a_chosen_cap_and_noise_by_the_step(told: int) -> Right:
    cap: Any = ("auto", 12, None)[told]
    return trains(*private(max_batch_size=cap, noise_schedule=lambda t: 1.0 + t / 9, accountant="pld"))


@refused("give max_batch_size the number that accountant.truncation has, or accountant='pld'", ways=2, slow=True)
def test_a_chosen_cap_and_an_accountant(told: int) -> Right:
    counts = PrivacyAccountant(noise_multiplier=1.0, sample_rate=8 / 24, truncation=(24, 12))
    accountant: Any = "pld" if told == 2 else counts
    return trains(*private(accountant=accountant, max_batch_size=12 if told == 1 else "auto"))


@refused("give max_batch_size a number")
def test_a_chosen_cap_without_noise(told: int) -> Right:
    return trains(*private(noise_multiplier=0.0, max_batch_size=12 if told else "auto", accountant="pld"))


@refused("leave out max_batch_size, or take bands=1", ways=2, slow=True)
def test_a_cap_and_bands(told: int) -> Right:
    return trains(*private(max_batch_size=None if told == 1 else 12, bands=1 if told == 2 else 2, accountant="pld"))


@refused(
    "give groups, whose each example of the dataset is, and examples_per_user, how many rows a user has in a "
    "batch; or neither, where every example is drawn by itself",
    ways=2,
    slow=True,
)
def test_groups_without_how_many(told: int) -> Right:
    groups: Any = None if told == 2 else [i // 2 for i in range(24)]
    return trains(*private(groups=groups, examples_per_user=2 if told == 1 else None))


def with_groups(groups: Any, k: int = 2, size: int = 24) -> Right:
    return trains(*private(data(size, batch_size=4), groups=groups, examples_per_user=k))


OWNERS = [i // 2 for i in range(24)]


@refused("give for every example of the dataset, in its order, whose it is: a number or a name")
def test_groups_of_fewer_examples(told: int) -> Right:
    return with_groups(OWNERS if told else OWNERS[:20])


@refused("say how many rows of a batch, one after the other, are one user's; 1: every row is an example")
def test_half_a_row_for_each_user(told: int) -> Right:
    k: Any = 2 if told else 2.5
    return with_groups(OWNERS, k)


@refused("leave such examples out of the dataset, or give each a user of its own", ways=2)
def test_an_example_of_nobody(told: int) -> Right:
    owners: list[Any] = [str(i % 9) for i in range(23)] + [None]
    return with_groups(owners[:23], size=23) if told == 1 else with_groups([*owners[:23], "own"] if told else owners)


@refused("give numbers or names, not both", ways=2)
def test_numbers_and_names_of_users(told: int) -> Right:
    owners: list[Any] = [i % 8 if told == 1 or (i % 3 and not told) else str(i % 8) for i in range(24)]
    return with_groups(owners, size=24)


@refused(
    "give dp_compile and PoissonLoader the same examples_per_user (1 without groups), or groups and "
    "examples_per_user to make_private",
    ways=3,
    slow=True,
)
def test_users_and_a_model_of_examples(told: int) -> Right:
    if told == 3:
        return with_groups(OWNERS)
    model, optimizer = parts(**({"examples_per_user": 2} if told == 1 else {}))
    loader = poisson(**({} if told == 2 else {"groups": OWNERS, "examples_per_user": 2}))
    return trains(model, optimizer, loader.attach(model, optimizer))


@refused("wrap it in a DPOptimizer and attach that")
def test_a_loader_and_a_plain_optimizer(told: int) -> Right:
    model, optimizer = parts()
    loader = poisson().attach(model, optimizer if told else optimizer.optimizer)
    return trains(model, optimizer, loader)


@refused("make the DPOptimizer with the model that is trained")
def test_a_loader_and_the_optimizer_of_another_model(told: int) -> Right:
    model, optimizer = parts()
    loader = poisson().attach(model, optimizer if told else parts()[1])
    return trains(model, optimizer, loader)


@refused("give both the same expected_batch_size", slow=True)
def test_a_loader_of_another_batch_size(told: int) -> Right:
    return attached(poisson(expected_batch_size=8 if told else 6))


@refused("give rank=torch.distributed.get_rank() and world_size=torch.distributed.get_world_size()", slow=True)
def test_a_rank_that_is_none(told: int) -> Right:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        world = {"rank": torch.distributed.get_rank(), "world_size": torch.distributed.get_world_size()}
        return attached(poisson(**(world if told else {"rank": 1, "world_size": 1})))
    finally:
        torch.distributed.destroy_process_group()


def resumed_loader(fault: Any, told: int, **saved: Any) -> Right:
    first = poisson(seed=3, **saved)
    state = first.state_dict()
    again = poisson(**({"seed": 3, **saved} if told else {"seed": 3, **saved, **fault}))
    again.load_state_dict(state)
    return attached(again)


@refused("make the PoissonLoader with the same expected_batch_size")
def test_resuming_with_another_batch_size(told: int) -> Right:
    return resumed_loader({"expected_batch_size": 6}, told)


@refused("make the PoissonLoader with the same sample_rate")
def test_resuming_with_another_rate(told: int) -> Right:
    return resumed_loader({"sample_rate": 0.2}, told, sample_rate=0.3)


@refused("make the PoissonLoader with the same expected_batch_size and sample_rate")
def test_resuming_with_another_batch_size_by_the_step(told: int) -> Right:
    first = poisson(seed=3, expected_batch_size=lambda t: 6.0 + t)
    again = poisson(seed=3, expected_batch_size=(lambda t: 6.0 + t) if told else (lambda t: 7.0 + t))
    again.load_state_dict(first.state_dict())
    return trains(*private(again))


@refused("make the PoissonLoader with the same dataset and groups")
def test_resuming_with_other_users(told: int) -> Right:
    users = {"groups": OWNERS, "examples_per_user": 2}
    first = poisson(seed=3, **users)
    again = poisson(seed=3, **users if told else {**users, "groups": OWNERS[::-1][:22] + [0, 5]})
    again.load_state_dict(first.state_dict())
    model, optimizer = parts(examples_per_user=2)
    return trains(model, optimizer, again.attach(model, optimizer))


@refused("resume from the latest state, or make a new PoissonLoader with another seed", ways=2, slow=True)
def test_resuming_from_an_earlier_state(told: int) -> Right:
    first = poisson(seed=3)
    earlier = first.state_dict()
    list(first.batches())
    again = first if told < 2 else poisson(seed=4)
    again.load_state_dict(first.state_dict() if told == 1 else earlier)
    return attached(again)


@refused("leave the seed out or give another one; to go on with a run, load the loader's state_dict", ways=2, slow=True)
def test_a_seed_that_was_used(told: int) -> Right:
    model, optimizer, loader = private(poisson(seed=5))
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    second = poisson(seed=(5, None, 5)[told])
    if told == 2:
        second.load_state_dict(loader.state_dict())
    return trains(model, optimizer, second.attach(model, optimizer))


@refused("call loader.attach(model, optimizer), as make_private does, or iterate over loader.batches()", ways=2)
def test_a_loader_that_is_not_attached(told: int) -> Right:
    loader = poisson()
    if told == 1:
        return attached(loader)
    return equals(sum(1 for _ in (loader.batches() if told else loader)), 3)


def losses(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


@refused(
    "iterate over the loader itself, not over list(loader); a prefetcher may be some batches ahead; to look "
    "at draws without training iterate over loader.batches()",
    ways=2,
)
def test_a_whole_pass_taken_at_once(told: int) -> Right:
    model, optimizer, loader = private()
    if told == 2:
        return equals(len(list(loader.batches())), 3)
    before = [p.detach().clone() for p in model.parameters()]
    for x, y in loader if told else list(loader):
        losses(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return stepped(model, optimizer, before, 3)


@refused("finish one loop before starting the next", slow=True)
def test_a_pass_within_a_pass(told: int) -> Right:
    model, optimizer, loader = private()
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        for i, (x, y) in enumerate(loader):
            losses(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if i == 0 and not told:
                next(iter(loader))
    return stepped(model, optimizer, before, 6)


@refused("leave groups out, or make the PoissonLoader with them", ways=2, slow=True)
def test_groups_and_a_loader_that_is_made(told: int) -> Right:
    users = {"groups": OWNERS, "examples_per_user": 2}
    loader = poisson(expected_batch_size=4, **users if told == 2 else {})
    return trains(*private(loader, groups=None if told else OWNERS, examples_per_user=2 if told == 2 else None))


@refused("leave it out, or make the PoissonLoader with it", ways=2, slow=True)
def test_a_cap_and_a_loader_that_is_made(told: int) -> Right:
    loader = poisson(**{"max_batch_size": 12} if told == 2 else {})
    return trains(*private(loader, max_batch_size=None if told == 1 else 12, accountant="pld"))


@refused(
    "leave it out, and make the PoissonLoader with a function of the step as expected_batch_size", ways=2, slow=True
)
def test_batch_sizes_by_the_step_and_a_loader_that_is_made(told: int) -> Right:
    loader = poisson(expected_batch_size=(lambda t: 6.0 + t) if told == 2 else 8)
    return trains(*private(loader, batch_size_schedule=None if told else lambda t: 1.0 + t))


@refused(
    "leave the copies out (weigh the losses of rare classes instead, by constants), or name their owner: groups=, with "
    "copies of a row in one group, and examples_per_user=",
    ways=2,
)
def test_rows_that_are_there_twice(told: int) -> Right:
    rows = [*range(20), 3, 3, 5] if told != 1 else list(range(20))
    owners = {"groups": rows, "examples_per_user": 3} if told == 2 else {}
    loader = DataLoader(Subset(data().dataset, rows), batch_size=8)
    return trains(*private(loader, **owners))
