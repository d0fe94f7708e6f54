"""Several optimizers, mechanisms of one's own, ranks: what the messages of an optimizer say to do, tried."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from private_steps import parts, steps
from remedies import Right, data, equals, plain, private, refused, sgd, trains
from torch import nn
from torch._C._distributed_c10d import HashStore

from dpcompile import DPOptimizer, dp_compile, make_private
from dpcompile.noise.exact import ExactMechanism
from dpcompile.noise.mechanism import GaussianMechanism

NUMBERS: dict[str, Any] = {"noise_multiplier": 1.0, "expected_batch_size": 8}


@contextmanager
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@refused("add it to the one that it is for: optimizer.optimizer.parts[i].add_param_group(...)")
def test_a_group_for_several_optimizers(told: int) -> Right:
    ordinary: Any = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    ordinary[1].requires_grad_(False)
    model: Any = dp_compile(ordinary, backend="eager")
    inner = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[2].parameters())]
    optimizer = DPOptimizer(inner, model, **NUMBERS)
    steps(model, optimizer)
    model[1].requires_grad_(True)
    group = {"params": list(model[1].parameters())}
    if told:
        optimizer.optimizer.parts[0].add_param_group(group)  # type: ignore[attr-defined]
    else:
        optimizer.add_param_group(group)
    return steps(model, optimizer)


class Own:
    """The Gaussian mechanism under another name."""

    def __init__(self, whole: bool) -> None:
        self.noise_multiplier, self.max_grad_norm, self.expected_batch_size = 1.0, 1.0, 8.0
        self.seed, self.secure = 7, False
        if whole:
            self.bands = 1

    def release(self, release: Any) -> None:
        self._inner.release(release)

    def event(self, sample_rate: float) -> Any:
        return self._inner.event(sample_rate)

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.seed = state["seed"]

    @property
    def _inner(self) -> GaussianMechanism:
        return GaussianMechanism(1.0, 1.0, 8.0, self.seed)


@refused(
    "give it what dpcompile.noise.mechanism.Mechanism names (bands: 1, if its noise is independent from step to step)"
)
def test_a_mechanism_that_lacks_something(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    return steps(model, DPOptimizer(sgd(model), model, mechanism=Own(told == 1)))


@refused("leave it in one group")
def test_a_parameter_of_two_optimizers(told: int) -> Right:
    model: Any = dp_compile(plain(), backend="eager")
    inner = [sgd(model), torch.optim.SGD([model.bias], lr=0.1)][: 1 if told else 2]
    return steps(model, DPOptimizer(inner, model, **NUMBERS))


@refused("Right to repeat an experiment; to publish both, leave seed out", warns=True)
def test_two_optimizers_of_one_seed(told: int) -> Right:
    seeds = (None, None) if told else (921, 921)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="two DPOptimizers of one seed")
        first = parts(seed=seeds[0])
        steps(*first)
        return steps(*parts(seed=seeds[1]))


@refused(
    "else go on with make_private(..., accountant=before.accountant, noise_multiplier=before.noise_multiplier)",
    warns=True,
    slow=True,
)
def test_a_second_run_of_one_model(told: int) -> Right:
    ordinary = plain()
    model, optimizer, loader = private(model=ordinary)
    trains(model, optimizer, loader)
    counted: Any = optimizer.accountant if told else "rdp"
    sigma = optimizer.noise_multiplier
    again: Any = make_private(model, sgd(model), data(), accountant=counted, noise_multiplier=sigma)
    model, optimizer, loader = again
    for x, y in loader:
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return equals((optimizer.logical_step, optimizer.accountant.steps), (3, 6))


@refused(
    "use DistributedDataParallel around dp_compile(model), whose sums are then of integers; or leave exact=True out",
    ways=2,
)
def test_exact_noise_for_a_sharded_model(told: int) -> Right:
    from torch.distributed.fsdp import fully_shard

    with one_rank():
        ordinary: Any = plain() if told == 1 else fully_shard(plain())
        model: Any = dp_compile(ordinary, backend="eager")
        seen = nn.parallel.DistributedDataParallel(model) if told == 1 else model
        optimizer = DPOptimizer(sgd(model), seen, exact=told < 2, **NUMBERS)
        return steps(seen, optimizer)


@refused("make a DPOptimizer with it")
def test_an_exact_mechanism_in_anothers_place(told: int) -> Right:
    model, optimizer = parts()
    mechanism = ExactMechanism(1.0, 1.0, 8, 7)
    if told:
        return steps(model, DPOptimizer(sgd(model), model, mechanism=mechanism))
    optimizer.mechanism = mechanism
    return steps(model, optimizer)


@refused("leave mechanism, exact, bands and adaptive_clip out", slow=True)
def test_a_stage_with_exact_noise(told: int) -> Right:
    from pipeline_worker import Pipeline, batch

    with one_rank():
        pipeline = Pipeline("Interleaved1F1B")
        exact: Any = {} if told else {"exact": True}
        pipeline.optimizers = [DPOptimizer(sgd(part), part, **NUMBERS, **exact) for part in pipeline.parts]
        before = [p.detach().clone() for part in pipeline.parts for p in part.parameters()]
        pipeline.step(*batch())
        after = [p for part in pipeline.parts for p in part.parameters()]
        return equals([torch.equal(p, q) for p, q in zip(before, after, strict=True)], [False] * len(before))
