"""``advise`` and ``audit``: what their messages say to do, tried."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from remedies import Right, about, data, equals, plain, private, refused, right, sgd
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import peak_allocated
from dpcompile import DPOptimizer, PoissonLoader, advise, audit, dp_compile

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))


def advised(**options: Any) -> Right:
    advice = advise(**{"dataset_size": 24, "target_epsilon": 2.0, "epochs": 2, "accountant": "rdp", **options})
    return about(advice.noise_multiplier)


@refused("give model= too, or leave them out", ways=2, slow=True)
def test_memory_for_no_model(told: int) -> Right:
    options: Any = ({"memory": 2**30}, {"memory": 2**30, "model": plain()}, {})[told]
    return advised(**options)


@refused("give a number of bytes, above 0, or leave it out", ways=2, slow=True)
def test_no_memory(told: int) -> Right:
    memory = (0, 2**30, None)[told]
    return advised(model=plain(), inputs=X, memory=memory)


@refused("unfreeze what is to be trained")
def test_advice_for_a_frozen_model(told: int) -> Right:
    return advised(model=plain().requires_grad_(told == 1))


@refused("give an integer, 1 or more")
def test_advice_for_half_an_epoch(told: int) -> Right:
    return advised(epochs=1 if told else 0.5)


@refused("give 'adam' or 'sgd'", ways=2, slow=True)
def test_advice_for_another_optimizer(told: int) -> Right:
    return advised(optimizer=("lion", "adam", "sgd")[told])


@refused("give the arguments of one call of the model in training, examples along dimension 0", slow=True)
def test_inputs_without_examples(told: int) -> Right:
    return advised(model=plain(), inputs=X if told else torch.zeros(0, 5))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(64, 64), nn.Tanh())))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Deep(nn.Module):
    def __init__(self, told: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.checkpoints = told == 3
        self.blocks[:-1].requires_grad_(told != 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return x


@refused(
    "give more memory=, train fewer parameters (LoRA), or compile in regions with checkpointing (regions='blocks')",
    ways=3,
    slow=True,
)
def test_memory_for_less_than_an_example(told: int) -> Right:
    memory = 2**24 if told == 1 else 3 * 2**20
    model, x = Deep(told), torch.randn(1, 256, 64)
    if told < 3:
        return advised(model=model, inputs=x, memory=memory)
    state = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    compiled = dp_compile(model, regions="blocks", backend="eager", verify=False)
    right(compiled, x, tolerance=1e-4)
    model.zero_grad()
    peak = peak_allocated(lambda: compiled(x).square().sum().backward())
    assert state + peak < 0.9 * memory
    return about(peak)


RUN: dict[str, Any] = {"canaries": 20, "steps": 1, "seed": 1}


def losses(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def audited(given: Any = None, loss: Any = losses, **options: Any) -> Right:
    model, optimizer, loader = private() if given is None else given
    report = audit(model, optimizer, loader, loss, **{**RUN, **options})
    assert report.proved is None or report.epsilon <= report.proved
    return equals(report.contradicted, False)


@refused("use 'dirac', 'spread' or 'data'", ways=3, slow=True)
def test_canaries_of_no_kind(told: int) -> Right:
    kind: Any = ("pixel", "dirac", "spread", "data")[told]
    return audited(private(model=nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))), kind=kind)


@refused("take 20 or more; hundreds, to bound an epsilon above 1", ways=2, slow=True)
def test_too_few_canaries(told: int) -> Right:
    return audited(canaries=(19, 20, 300)[told])


@refused("0.95 is a common choice")
def test_a_confidence_of_one(told: int) -> Right:
    return audited(confidence=0.95 if told else 1.0)


@refused("take fewer canaries, or kind='dirac', which gives them a parameter of their own", ways=2)
def test_more_canaries_than_elements(told: int) -> Right:
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    return audited(private(model=model), kind="dirac" if told == 2 else "spread", canaries=30 if told == 1 else 31)


@refused("take fewer canaries, or kind='dirac', which makes its own", ways=2)
def test_more_canaries_than_rows(told: int) -> Right:
    return audited(kind="dirac" if told == 2 else "data", canaries=24 if told == 1 else 25)


@refused("audit a model of a few blocks with the same options, on one rank or under DistributedDataParallel", ways=2)
def test_an_audit_of_a_sharded_model(told: int) -> Right:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        ordinary: Any = plain()
        model: Any = dp_compile(ordinary if told else fully_shard(ordinary), backend="eager")
        seen = nn.parallel.DistributedDataParallel(model) if told == 2 else model
        optimizer = DPOptimizer(sgd(model), seen, noise_multiplier=1.0, expected_batch_size=8)
        loader = PoissonLoader(data().dataset, expected_batch_size=8).attach(seen, optimizer)
        return audited((seen, optimizer, loader))
    finally:
        torch.distributed.destroy_process_group()


@refused("audit before training")
def test_an_audit_after_correlated_noise(told: int) -> Right:
    model, optimizer, loader = private(bands=2)
    if told:
        return audited((model, optimizer, loader))
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return audited((model, optimizer, loader))


@refused("give in_dims with one entry per positional argument, or take kind='data'", ways=2)
def test_an_audit_with_dimensions_by_name(told: int) -> Right:
    dims: Any = (0,) if told == 1 else {"input": 0}
    return audited(private(in_dims=dims), kind="data" if told == 2 else "dirac")


@refused("call the model that the loss is given")
def test_a_loss_that_calls_another_model(told: int) -> Right:
    given = private()

    def loss(model: Any, batch: Any) -> Tensor:
        return losses(model if told else plain(), batch)

    return audited(given, loss)


@refused("give loss(model, batch) that returns one value per example (reduction='none')")
def test_a_mean_loss(told: int) -> Right:
    return audited(loss=lambda model, batch: losses(model, batch) if told else losses(model, batch).mean())
