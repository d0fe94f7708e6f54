"""What a private loader is made of, and collation for users: what their messages say to do, tried."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from private_steps import backward
from remedies import Right, data, equals, plain, private, refused, sgd, stepped, trains
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset, default_collate

from dpcompile import DPOptimizer, PoissonLoader, dp_compile, make_private

SIZE: dict[str, Any] = {"expected_batch_size": 8}


def over(model: Any, parameters: Any) -> DPOptimizer:
    return DPOptimizer(sgd(parameters), model, noise_multiplier=1.0, expected_batch_size=8)


@refused("To try it: batch size 16, steps=400; plan_privacy compares others.", warns=True, slow=True)
def test_batches_that_are_larger_than_they_need_be(told: int) -> Right:
    torch.manual_seed(2)
    rows = TensorDataset(torch.randn(1000, 5), torch.randint(0, 3, (1000,)))
    model = plain()
    model, optimizer, loader = make_private(
        model, sgd(model), DataLoader(rows, batch_size=16 if told else 500), target_epsilon=0.2,
        target_delta=1e-5, steps=400, backend="eager", accountant="rdp",
    )  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    for x, y in itertools.islice(loader, 2):
        backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()
    return stepped(model, optimizer, before, 2)


@refused("they are a function of seed= of make_private or PoissonLoader, and secret", warns=True, slow=True)
def test_a_generator_for_the_draws(told: int) -> Right:
    def draws() -> list[Tensor]:
        options: Any = {} if told else {"generator": torch.Generator().manual_seed(5)}
        _, _, loader = private(data(**options), seed=5)
        return [batch.data[0] for batch in loader.batches()]

    return equals(all(map(torch.equal, draws(), draws())), True)


@refused(
    "give PoissonLoader rank=torch.distributed.get_rank() and world_size=torch.distributed.get_world_size()",
)
def test_parts_of_a_draw_for_ranks_that_are_not_there(told: int) -> Right:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model: Any = dp_compile(plain(), backend="eager")
        replica = nn.parallel.DistributedDataParallel(model)
        optimizer = over(replica, model)
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size() if told else 2
        loader = PoissonLoader(data().dataset, **SIZE, rank=rank, world_size=ranks)
        return trains(replica, optimizer, loader.attach(replica, optimizer))
    finally:
        torch.distributed.destroy_process_group()


@refused(
    "wrap the model, DistributedDataParallel(dp_compile(model)), and give that to DPOptimizer and attach; or call "
    "fully_shard before dp_compile; or leave out rank and world_size to train on each rank by itself"
)
def test_parts_of_a_draw_for_a_model_alone(told: int) -> Right:
    """As told last; tests/workers/replicated_worker.py and sharded_worker.py do the others, on several ranks."""
    model: Any = dp_compile(plain(), backend="eager")
    optimizer = over(model, model)
    world: Any = {} if told else {"rank": 0, "world_size": 2}
    loader = PoissonLoader(data().dataset, **SIZE, **world)
    return trains(model, optimizer, loader.attach(model, optimizer))


OWNERS = [i // 2 for i in range(24)]


class Words(torch.utils.data.Dataset[Any]):
    """Sequences of several lengths."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Any:
        return torch.randn(2 + i % 3, 5, generator=torch.Generator().manual_seed(i)), i % 3


def of_users(collate_fn: Any, dataset: Any = None, loss: Any = None, model: Any = None) -> Right:
    source: Any = DataLoader(data().dataset if dataset is None else dataset, batch_size=4, collate_fn=collate_fn)
    return trains(*private(source, model, groups=OWNERS, examples_per_user=2), loss=loss)


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum(1)


@refused(
    "let collate_fn keep the order of the examples, make each row of its example alone, and fill up with one number; "
    "sort, augment and mix in the dataset or in the model",
    ways=2,
)
def test_rows_of_users_that_are_sorted(told: int) -> Right:
    def by_length(items: list[Any]) -> Any:
        items = items if told else sorted(items, key=lambda item: -len(item[0]))
        return pad_sequence([x for x, _ in items], batch_first=True), torch.tensor([y for _, y in items])

    class Sorted(Words):
        """Examples that are sorted before they are drawn."""

        def __getitem__(self, i: int) -> Any:
            return super().__getitem__(i % 3 * 8 + i // 3)

    return of_users(by_length, Sorted() if told == 2 else Words(), model=Mean())


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(1, keepdim=True))


@refused("compute it in the model, where what mixes is refused, or of public data, once for all", ways=2)
def test_a_mean_of_users_beside_their_rows(told: int) -> Right:
    def with_mean(items: list[Any]) -> Any:
        x, y = default_collate(items)
        return (x, y) if told == 1 else (x, y, torch.full((5,), 0.25) if told else x.mean(0))

    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return of_users(with_mean, loss=loss, model=Centred() if told == 1 else None)


@refused("return one row for each example")
def test_a_collation_that_leaves_examples_out(told: int) -> Right:
    def chosen(items: list[Any]) -> Any:
        return default_collate(items if told else [item for item in items if item[0][0] < 1.4])

    return trains(*private(data(collate_fn=chosen), seed=1), passes=3)


@refused("give a finite number")
def test_a_batch_without_end(told: int) -> Right:
    loader = PoissonLoader(data().dataset, sample_rate=1 / 3, expected_batch_size=8.0 if told else math.inf)
    return trains(*private(loader))


@refused("leave max_batch_size out, or let the batch size take 32 values at most", ways=2)
def test_a_cap_and_many_batch_sizes(told: int) -> Right:
    loader = PoissonLoader(
        data().dataset,
        expected_batch_size=lambda step: 6.0 + (step // 6 if told == 2 else step) / 40,
        steps=40,
        max_batch_size=None if told == 1 else 20,
    )
    return equals(len(loader), 40)


@refused("give an integer, 1 or more: so many rows of a batch are each user's")
def test_no_rows_for_a_user(told: int) -> Right:
    loader = PoissonLoader(data().dataset, expected_batch_size=4, groups=OWNERS, examples_per_user=2 if told else 0)
    model: Any = dp_compile(plain(), backend="eager", examples_per_user=2)
    optimizer = DPOptimizer(sgd(model), model, noise_multiplier=1.0, expected_batch_size=4)
    return trains(model, optimizer, loader.attach(model, optimizer))
