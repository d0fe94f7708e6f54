"""What every rank of test_pipeline.py runs: ``torchrun tests/workers/pipeline_worker.py DIRECTORY [CHECK ..]``.

Each check prints its name once it passed, on rank 0.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launching import run_checks
from sharded_worker import Collectives, raises
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import schedules
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dpcompile
from dpcompile import DPCompileError, DPOptimizer, PoissonLoader, PrivacyError
from dpcompile._torch.pipelining import orders_of
from dpcompile.checkpoint import load_checkpoint, save_checkpoint
from dpcompile.data.loader import PhysicalBatch
from dpcompile.distributed.norm_sums import NormSums
from dpcompile.module import engine_of, set_mask
from dpcompile.noise.normal import gaussian
from dpcompile.planning.pipeline_orders import Action, gpipe, one_forward_one_backward
from dpcompile.planning.pipeline_time import StageCosts, predicted_run

dp_compile: Any = dpcompile.dp_compile
B, T, D, V, C, CHUNKS, BLOCKS = 8, 3, 6, 5, 0.3, 4, 4
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")


class Block(nn.Module):
    """On the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + torch.tanh(self.linear(self.norm(x)))


class Wide(nn.Module):
    """Two layers that tensor parallelism cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """An embedding, blocks with the names that they have in the whole model, a head; a stage has some of these."""

    block: type[nn.Module] = Block

    def __init__(self, first: int = 0, end: int = BLOCKS) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.tokens = nn.Embedding(V, D)
        self.blocks = nn.ModuleDict({str(i): type(self).block() for i in range(BLOCKS)})
        self.head = nn.Linear(D, V)
        if first:
            del self.tokens
        if end < BLOCKS:
            del self.head
        self.blocks = nn.ModuleDict({n: b for n, b in self.blocks.items() if first <= int(n) < end})

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.tokens(x) if hasattr(self, "tokens") else x
        for block in self.blocks.values():
            x = block(x)
        return self.head(x) if hasattr(self, "head") else x


class Cut(Model):
    """With wide blocks."""

    block = Wide


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Pipeline:
    """The stages of this rank, their optimizers, and the schedule."""

    def __init__(
        self,
        schedule: str = "GPipe",
        wrap: Callable[[nn.Module], Any] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = loss_of,
        make: Callable[[int, int], nn.Module] = Model,
        sigma: float = 0.0,
        adam: bool = False,
        group: Any = None,
        chunks: int = CHUNKS,
        **options: Any,
    ) -> None:
        given = True if group is None else group
        options = {"max_grad_norm": C, "backend": "eager", "pipeline": given, **options}
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        several = schedule not in ("GPipe", "1F1B")
        n = ranks * (1 + several)
        self.numbers = [rank, *([n - 1 - rank if schedule in V_SHAPED else rank + ranks] if several else [])]
        self.first, self.last = 0 in self.numbers, n - 1 in self.numbers
        each = BLOCKS // n
        wrap = wrap or partial(dp_compile, **options)
        self.parts = [wrap(make(i * each, (i + 1) * each)) for i in self.numbers]
        cpu = torch.device("cpu")
        self.stages = [
            pipelining.PipelineStage(p, i, n, cpu, group=group) for p, i in zip(self.parts, self.numbers, strict=True)
        ]
        kind = getattr(schedules, f"Schedule{schedule}")
        self.schedule = kind(self.stages if several else self.stages[0], chunks, loss_fn=loss)
        self.name, self.chunks, self.count, self.place = schedule, chunks, n, rank
        self.sigma, self.adam = sigma, adam
        self.optimizers: list[DPOptimizer] = []

    def optimize(self, expected: float = B) -> Pipeline:
        self.optimizers = [optimizer_of(p, self.sigma, adam=self.adam, expected=expected) for p in self.parts]
        return self

    def run(self, x: Tensor, y: Tensor) -> None:
        """The schedule, once."""
        given = (x,) if self.first else ()
        self.schedule.step(*given, **({"target": y, "losses": []} if self.last else {}))

    def step(self, x: Tensor, y: Tensor) -> None:
        self.run(x, y)
        for optimizer in self.optimizers:
            optimizer.step()

    def clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def check_held(self) -> None:
        """No more micro-batches were held at a time than the schedule's order says."""
        orders = {"GPipe": gpipe, "1F1B": one_forward_one_backward}.get(self.name)
        if orders is None:
            found = orders_of(self.schedule)
            assert isinstance(found, list)
            order = [[Action(*action) for action in actions] for actions in found]
        else:
            order = orders(self.count, self.chunks)
        run = predicted_run(order, self.count, [StageCosts(1, 1, 1)] * self.count)
        stage = engine_of(self.parts[0]).stage
        assert stage is not None and stage.rank is not None
        assert stage.rank.held == 0 and stage.rank.most_held == run.held[self.place], (stage.rank.most_held, run)

    def named(self) -> dict[str, nn.Parameter]:
        return {n: p for part in self.parts for n, p in part.named_parameters()}


def optimizer_of(model: Any, sigma: float, *, adam: bool, expected: float = B, **options: Any) -> DPOptimizer:
    kind: Any = torch.optim.AdamW if adam else torch.optim.SGD
    numbers = {"noise_multiplier": sigma, "expected_batch_size": expected, "seed": 7, **options}
    return DPOptimizer(kind(model.parameters(), lr=0.1), model, **numbers)


def batch(rows: int = B) -> tuple[Tensor, Tensor]:
    return torch.randint(0, V, (rows, T)), torch.randint(0, V, (rows, T))


def oracle(
    x: Tensor, y: Tensor, users: int = 1, make: Callable[[], nn.Module] = Model
) -> tuple[Tensor, dict[str, Tensor]]:
    """Norms and clipped sums by one backward per example, or user, of the whole model."""
    model, norms, sums = make(), [], {}
    for rows_x, rows_y in zip(x.split(users), y.split(users), strict=True):
        model.zero_grad()
        (loss_of(model(rows_x), rows_y) * (users if users > 1 else 1)).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        norm = torch.stack([g.double().square().sum() for g in grads.values()]).sum().sqrt()
        norms.append(norm)
        weight = (C / norm).clamp_max(1.0).float()
        for n, g in grads.items():
            sums[n] = sums.get(n, 0) + weight * g
    return torch.stack(norms).float(), sums


def check_sums(
    pipeline: Pipeline,
    x: Tensor,
    y: Tensor,
    *,
    real: Tensor | None = None,
    users: int = 1,
    make: Callable[[], nn.Module] = Model,
) -> None:
    """Without noise ``p.grad`` is the clipped sum over the expected batch size."""
    keep = slice(None) if real is None else real
    norms, sums = oracle(x[keep], y[keep], users, make)
    named = pipeline.named()
    for part in pipeline.parts:
        torch.testing.assert_close(part.grad_norms, norms, rtol=1e-5, atol=1e-6)
    for n, p in named.items():
        assert p.grad is not None
        torch.testing.assert_close(p.grad * B, sums[n], rtol=1e-5, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")


def gradients(schedule: str, **options: Any) -> None:
    x, y = batch()
    pipeline = Pipeline(schedule, **options).optimize()
    pipeline.step(x, y)
    check_sums(pipeline, x, y)
    assert not any(stage.waiting for p in pipeline.parts if (stage := engine_of(p).stage) is not None)


def users() -> None:
    for rows in (B, 2 * B):  # one in each micro-batch, and two
        x, y = batch(rows)
        pipeline = Pipeline(examples_per_user=2).optimize()
        pipeline.step(x, y)
        check_sums(pipeline, x, y, users=2)


def padding() -> None:
    """Rows that are padding count in no stage, whatever their loss is."""
    x, y = batch()
    real = torch.arange(B) % 3 > 0

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        own = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)
        return (own * torch.where(targets[:, 0] == V - 1, torch.inf, 1.0)).mean()

    y[:, 0] = y[:, 0].clamp_max(V - 2)
    y[~real, 0] = V - 1
    pipeline = Pipeline(loss=loss).optimize()
    for part in pipeline.parts:
        set_mask(part, real)
    pipeline.step(x, y)
    check_sums(pipeline, x, y, real=real)


class Rooted(Model):
    """The last stage has a parameter whose gradient is infinite for sequences that begin with the last token."""

    def __init__(self, first: int = 0, end: int = BLOCKS) -> None:
        super().__init__(first, end)
        if first == 0:
            self.tokens.weight.data[V - 1, 0] = 100.0
        if end == BLOCKS:
            self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = super().forward(x)
        return (
            out + torch.where(x[:, 0, 0] > 50, self.bias, self.bias + 1).sqrt()[:, None, None]
            if hasattr(self, "bias")
            else out
        )


def not_finite() -> None:
    """A gradient that is infinite in the last stage alone has weight 0 in all."""
    x, y = batch()
    x[:, 0] = x[:, 0].clamp_max(V - 2)
    x[3, 0] = V - 1
    found = []
    for keep in (torch.ones(B, dtype=torch.bool), torch.arange(B) != 3):
        pipeline = Pipeline(make=Rooted).optimize()
        for part in pipeline.parts:
            set_mask(part, keep)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            pipeline.step(x, y)
        found.append({n: p.grad for n, p in pipeline.named().items()})
        assert pipeline.parts[0].grad_norms.isfinite().sum() == B - 1
    for n, grad in found[0].items():
        assert grad is not None and grad.any() and torch.equal(grad, found[1][n]), n


def alone(steps: int, sigma: float, *, adam: bool, data: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Weights of the whole model, trained on every rank by itself."""
    model = dp_compile(Model(), max_grad_norm=C, backend="eager")
    optimizer = optimizer_of(model, sigma, adam=adam)
    for x, y in data[:steps]:
        loss_of(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(pipeline: Pipeline, weights: dict[str, Tensor]) -> None:
    for n, p in pipeline.named().items():
        torch.testing.assert_close(p.detach(), weights[n], rtol=1e-5, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


def training(schedule: str, steps: int = 5) -> None:
    """Weights after noisy steps are those of one rank, and few micro-batches were held."""
    data = [batch() for _ in range(steps)]
    pipeline = Pipeline(schedule, sigma=0.5, adam=True, chunks=B).optimize()
    for x, y in data:
        pipeline.step(x, y)
        pipeline.check_held()
        pipeline.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two optimizers of one seed
        same(pipeline, alone(steps, 0.5, adam=True, data=data))


def placed(mesh: DeviceMesh, kind: str, first: int, end: int, make: Callable[[int, int], Model] = Cut) -> nn.Module:
    """A stage that FSDP2 shards ("dp"), that tensor parallelism cuts ("tp"), or both."""
    model = make(first, end)
    for block in model.blocks.values():
        if kind != "dp":
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if kind != "tp":
            fully_shard(block, mesh=mesh["dp"])
    if kind != "tp":
        fully_shard(model, mesh=mesh["dp"])
    return model


def two_by_two(
    kind: str, schedule: str, place: Callable[..., nn.Module] = placed, **options: Any
) -> tuple[Pipeline, Callable[..., None]]:
    """A pipeline of two ranks, by two; and a step of it on a batch of all ranks."""
    if kind == "both":  # on four ranks: FSDP2 over one
        mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("pp", "dp", "tp"))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", kind))
    mine, make = mesh.get_local_rank(1), partial(place, mesh, kind)
    pipeline = Pipeline(schedule, make=make, group=mesh["pp"].get_group(), sigma=0.5, adam=True, **options)
    pipeline.optimize(2 * B)

    def step(x: Tensor, y: Tensor) -> None:
        pipeline.step(*((x.chunk(2)[mine], y.chunk(2)[mine]) if kind == "dp" else (x, y)))
        pipeline.check_held()
        pipeline.clear()

    return pipeline, step


def whole_model(
    make: Callable[[], nn.Module] = Cut, **options: Any
) -> tuple[Any, DPOptimizer, Callable[[Tensor, Tensor], None]]:
    """On every rank by itself."""
    model = dp_compile(make(), max_grad_norm=C, backend="eager", **options)
    optimizer = optimizer_of(model, 0.5, adam=True, expected=2 * B)

    def step(x: Tensor, y: Tensor) -> None:
        loss_of(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def compare(pipeline: Pipeline, model: Any) -> None:
    expected = dict(model.named_parameters())
    for n, p in pipeline.named().items():
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        torch.testing.assert_close(whole, expected[n], rtol=1e-5, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


def meshed(kind: str, schedule: str, **options: Any) -> None:
    """Two by two: stages that FSDP2 shards, or that tensor parallelism cuts; noisy steps are those of one rank."""
    data = [batch(2 * B) for _ in range(3)]
    pipeline, step = two_by_two(kind, schedule, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _, alone_step = whole_model(**options)
        for x, y in data:
            step(x, y)
            alone_step(x, y)
    compare(pipeline, model)


def meshed_checkpoints(kind: str, directory: Path) -> None:
    """Saved on two by two; it goes on there, as a pipeline over all ranks, and on one rank, to the same weights."""
    directory, data = directory / kind, [batch(2 * B) for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _, alone_step = whole_model()
        for x, y in data:
            alone_step(x, y)
        first, step = two_by_two(kind, "1F1B")
        for x, y in data[:2]:
            step(x, y)
        save_checkpoint(directory, first.parts[0], first.optimizers[0])
        second, step = two_by_two(kind, "1F1B")
        load_checkpoint(directory, second.parts[0], second.optimizers[0])
        longer = Pipeline("1F1B", make=Cut, sigma=0.5, adam=True).optimize(2 * B)
        load_checkpoint(directory, longer.parts[0], longer.optimizers[0])
        whole, optimizer, whole_step = whole_model()
        load_checkpoint(directory, whole, optimizer)
        for x, y in data[2:]:
            step(x, y)
            longer.step(x, y)
            longer.clear()
            whole_step(x, y)
    compare(second, model)
    compare(longer, model)
    compare(second, whole)


def messages() -> None:
    """Ranks of which one began another batch between: every step is refused on both, and nothing is delivered."""
    group: Any = dist.new_group([0, 1])
    pipeline = Pipeline("1F1B", group=group).optimize()
    if dist.get_rank():
        NormSums.of(group, torch.device("cpu")).begin(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN: all weights are 0
        for _ in range(2):
            pipeline.run(*batch())
            raises(PrivacyError, "norms of other micro-batches", pipeline.optimizers[0].step)
            pipeline.clear()
    assert all(p.grad is None for p in pipeline.named().values())


def in_turn() -> None:
    """Two pipelines on one group, whose batches and steps alternate: each gets its own norms."""
    pipelines, data = [Pipeline("1F1B").optimize() for _ in range(2)], [batch(), batch()]
    for pipeline, (x, y) in zip(pipelines, data, strict=True):
        pipeline.run(x, y)
    for pipeline, (x, y) in zip(pipelines[::-1], data[::-1], strict=True):
        pipeline.optimizers[0].step()
        check_sums(pipeline, x, y)


class Copied(Model):
    """The head is a copy of the embedding."""

    def __init__(self, first: int = 0, end: int = BLOCKS) -> None:
        super().__init__(first, end)
        if end == BLOCKS:
            self.head.weight.data.copy_(Model().tokens.weight)


class FrozenCopies(Copied):
    """Neither is trained."""

    def __init__(self, first: int = 0, end: int = BLOCKS) -> None:
        super().__init__(first, end)
        for name, p in self.named_parameters():
            p.requires_grad_(name not in ("tokens.weight", "head.weight"))


def copies() -> None:
    """Of one parameter on the first and the last rank: refused on both, at the first step, unless said to be two."""
    pipeline = Pipeline("1F1B", make=Copied).optimize()
    refused("are equal bit by bit", pipeline)
    if dist.get_rank():
        pipeline.parts[0].head.weight.data[0, 0] += 1e-3
    for optimizer in pipeline.optimizers:
        optimizer.step()
    for untied in (True, dist.get_rank() == 0):  # both stages say so, or the first alone
        x, y = batch()
        two = Pipeline("1F1B", make=Copied, untied=untied).optimize()
        two.step(x, y)
        check_sums(two, x, y, make=Copied)
    frozen = Pipeline("1F1B", make=FrozenCopies).optimize()
    frozen.step(*batch())
    plain = Pipeline("1F1B", make=Copied).optimize()
    plain.run(*batch())
    assert all(p.grad is None for p in plain.named().values())  # nothing that a loop could add up over ranks


def automatic() -> None:
    """Weights C / norm, of the norm over all stages, also as a function of the norms."""
    for clipping in ("automatic", lambda norms: C / (norms + 0.01)):
        data = [batch() for _ in range(2)]
        pipeline = Pipeline("1F1B", clipping=clipping, sigma=0.5).optimize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = dp_compile(Model(), max_grad_norm=C, backend="eager", clipping=clipping)
            optimizer = optimizer_of(model, 0.5, adam=False)
            for x, y in data:
                pipeline.step(x, y)
                pipeline.clear()
                loss_of(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        same(pipeline, {n: p.detach() for n, p in model.named_parameters()})


def noise_once() -> None:
    """A parameter's noise is that of its place in the whole model, and nothing else is added."""
    x, y = batch()
    sigma = 1e3
    pipeline = Pipeline("Interleaved1F1B", sigma=sigma).optimize()
    pipeline.step(x, y)
    places = {n: i for i, (n, _) in enumerate(Model().named_parameters())}
    _, sums = oracle(x, y)
    for n, p in pipeline.named().items():
        noise = gaussian(7, step=0, parameter=places[n], numel=p.numel()).view_as(p)
        assert p.grad is not None
        torch.testing.assert_close(p.grad, (sums[n] + sigma * C * noise) / B, rtol=1e-5, atol=1e-4)


def loading(directory: Path) -> None:
    """Draws of a loader, in batches of one size, on every rank; a run that is resumed; the same on one rank."""
    del directory
    data = TensorDataset(*batch(40))
    numbers: dict[str, Any] = {"expected_batch_size": B, "physical_batch_size": B, "steps": 6, "seed": 3}

    def through(loader: PoissonLoader, step: Callable[[Tensor, Tensor], None], optimizer: DPOptimizer) -> None:
        for x, y in loader.parts():
            step(x, y)
            optimizer.step()
            optimizer.zero_grad()

    pipeline = Pipeline("1F1B", sigma=0.5).optimize()
    (part,), (optimizer,) = pipeline.parts, pipeline.optimizers
    through(PoissonLoader(data, **numbers).attach(part, optimizer), pipeline.run, optimizer)
    model = dp_compile(Model(), max_grad_norm=C, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = optimizer_of(model, 0.5, adam=False)

        def step(x: Tensor, y: Tensor) -> None:
            loss_of(model(x), y).backward()

        through(PoissonLoader(data, **numbers).attach(model, own), step, own)
    assert optimizer.logical_step == own.logical_step == 6
    same(pipeline, {n: p.detach() for n, p in model.named_parameters()})


def masks_by_hand() -> None:
    """Two stages on a rank, masks set for each, and a draw in several batches."""
    data = TensorDataset(*batch(40))
    numbers: dict[str, Any] = {"expected_batch_size": 2 * B, "physical_batch_size": B, "steps": 3, "seed": 3}
    pipeline = Pipeline("Interleaved1F1B", sigma=0.5).optimize(2 * B)

    def train(run: Callable[[Tensor, Tensor], None], parts: Sequence[Any], optimizers: Sequence[DPOptimizer]) -> None:
        for drawn in PoissonLoader(data, **numbers).batches():
            assert isinstance(drawn, PhysicalBatch)
            for part, optimizer in zip(parts, optimizers, strict=True):
                set_mask(part, drawn.mask)
                optimizer.accumulating = not drawn.ends_step
            run(*drawn.data)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    train(pipeline.run, pipeline.parts, pipeline.optimizers)
    model = dp_compile(Model(), max_grad_norm=C, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = [optimizer_of(model, 0.5, adam=False, expected=2 * B)]
        train(lambda x, y: loss_of(model(x), y).backward(), [model], own)
    same(pipeline, {n: p.detach() for n, p in model.named_parameters()})


class Renumbered(Model):
    """Names of the blocks of a stage begin at 0, as those of a ModuleList do."""

    def __init__(self, first: int = 0, end: int = BLOCKS) -> None:
        super().__init__(first, end)
        self.blocks = nn.ModuleDict({str(i): block for i, block in enumerate(self.blocks.values())})


def checkpoints(directory: Path) -> None:
    """A run that was saved and loaded comes to the weights of the one that went on; names are those of the model."""
    same_names = Pipeline(make=Renumbered).optimize()
    for attempt in (save_checkpoint, load_checkpoint):
        message = "is in several stages of the pipeline"
        raises(DPCompileError, message, partial(attempt, directory, same_names.parts[0], same_names.optimizers[0]))
    data = [batch() for _ in range(4)]
    weights = alone(4, 0.5, adam=True, data=data)
    first = Pipeline(sigma=0.5, adam=True).optimize()
    for x, y in data[:2]:
        first.step(x, y)
        first.clear()
    save_checkpoint(directory / "run", first.parts[0], first.optimizers[0])
    second = Pipeline(sigma=0.5, adam=True).optimize()
    load_checkpoint(directory / "run", second.parts[0], second.optimizers[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x, y in data[2:]:
            second.step(x, y)
            second.clear()
    same(second, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = dp_compile(Model(), max_grad_norm=C, backend="eager")
        optimizer = optimizer_of(whole, 0.5, adam=True)
        load_checkpoint(directory / "run", whole, optimizer)
        for x, y in data[2:]:
            loss_of(whole(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for n, p in whole.named_parameters():
        torch.testing.assert_close(p.detach(), weights[n], rtol=1e-5, atol=1e-5)


def evaluation() -> None:
    """``eval`` between steps takes no part, and what it returns has no backward."""
    data = [batch() for _ in range(2)]
    pipeline = Pipeline(sigma=0.5, adam=True).optimize()
    for x, y in data:
        given = (x,) if pipeline.first else ()
        out = pipeline.schedule.eval(*given, **({"target": y, "losses": []} if pipeline.last else {}))
        assert out is None or not out.requires_grad
        pipeline.step(x, y)
        pipeline.clear()
    same(pipeline, alone(2, 0.5, adam=True, data=data))


def communication() -> None:
    """Beside the plain step: a number an example and two more, to the first stage and back; and 112 bytes."""
    x, y = batch()
    found = []
    for pipeline in (Pipeline(wrap=lambda m: m), Pipeline().optimize()):
        for _ in range(2):
            with Collectives() as counter:
                pipeline.step(x, y)
            pipeline.clear()
        found.append(counter.seen)
    more = found[1] - found[0]
    assert not found[0] - found[1], found
    assert {n: k for n, k in more.items() if k} == {
        "c10d.send.default": CHUNKS,
        "c10d.send.default bytes": 8 * B + 16 * CHUNKS,
        "c10d.recv_.default": CHUNKS,
        "c10d.recv_.default bytes": 8 * B + 16 * CHUNKS,
        "c10d.allreduce_.default": 1,
        "c10d.allreduce_.default bytes": 8 * 14,
    }, more


def dropped() -> None:
    """A batch that is given up on all ranks leaves nothing behind."""
    data = [batch() for _ in range(2)]
    pipeline = Pipeline(sigma=0.5, adam=True).optimize()
    pipeline.run(*data[0])
    pipeline.clear()
    pipeline.run(*data[0])
    for optimizer in pipeline.optimizers:
        optimizer.discard()
    raises(PrivacyError, "without a clipped backward", pipeline.optimizers[0].step)
    for x, y in data:
        pipeline.step(x, y)
        pipeline.clear()
    same(pipeline, alone(2, 0.5, adam=True, data=data))


def differing() -> None:
    """Ranks that differ: all of them raise, none waits."""
    mine = dist.get_rank()
    pipeline = Pipeline().optimize()
    set_mask(pipeline.parts[0], torch.arange(B) != mine)
    refused("they differ in rows or padding", pipeline)
    refused("max_grad_norm (0.5, 1.0)", Pipeline(max_grad_norm=0.5 + 0.5 * mine).optimize())
    refused("loss_reduction ('mean', 'sum')", Pipeline(loss_reduction=("mean", "sum")[mine]).optimize())
    for options, told in (({"seed": mine}, "seed"), ({"noise_multiplier": 0.5 + mine}, "noise_multiplier")):
        pipeline = Pipeline()
        pipeline.optimizers = [optimizer_of(pipeline.parts[0], 0.5, adam=False, **options)]
        refused(f"the ranks disagree about {told}", pipeline)
    pipeline = Pipeline().optimize()
    pipeline.step(*batch())
    pipeline.clear()
    engine_of(pipeline.parts[0]).steps = mine
    refused("they differ in the logical step", pipeline)
    one = Pipeline().optimize()
    one.run(*batch())
    if mine:
        engine_stage = engine_of(one.parts[0]).stage
        assert engine_stage is not None
        next(iter(engine_stage.waiting.values())).done = False
    raises(
        PrivacyError, "another rank of the pipeline refused" if not mine else "had no backward", one.optimizers[0].step
    )


def other_draws() -> None:
    """Loaders of other seeds are refused before anything is drawn; a rank that skips a batch, at the next step."""
    data = TensorDataset(*batch(40))
    pipeline = Pipeline().optimize()
    (part,), (optimizer,) = pipeline.parts, pipeline.optimizers
    numbers: dict[str, Any] = {"expected_batch_size": B, "physical_batch_size": 5 * B, "steps": 6, "seed": 3}
    loader = PoissonLoader(data, **numbers).attach(part, optimizer)
    drawn = iter(loader.parts())
    if dist.get_rank():
        next(drawn)
        optimizer.discard()
    pipeline.run(*next(drawn))
    raises(PrivacyError, "they differ in the draw of the loader", optimizer.step)


def refused(text: str, pipeline: Pipeline) -> None:
    raises(PrivacyError, text, lambda: pipeline.step(*batch()))


class Failing(Model):
    """Raises in its second micro-batch."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if x.is_floating_point() and not torch.compiler.is_compiling():
            raise OSError("an accident")
        return super().forward(x)


def accident() -> None:
    """A rank that raises ends all."""
    Pipeline(make=Failing).optimize().step(*batch())


def late_accident() -> None:
    """The last rank raises in its third micro-batch, when norms of earlier ones are on their way."""
    losses: list[Tensor] = []

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        losses.append(loss_of(logits, targets))
        if len(losses) == 5:
            raise OSError("an accident")
        return losses[-1]

    Pipeline("1F1B", chunks=B, loss=loss).optimize().step(*batch())


def killed() -> None:
    """The first rank dies before its fifth forward: that ends all."""
    pipeline = Pipeline("1F1B", chunks=B).optimize()
    run = pipeline.stages[0].forward_one_chunk

    def dying(chunk: int, *args: Any, **kwargs: Any) -> Any:
        if chunk == 4 and pipeline.first:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(chunk, *args, **kwargs)

    pipeline.stages[0].forward_one_chunk = dying  # type: ignore[method-assign]
    pipeline.step(*batch())


SCHEDULES = ("1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
MORE = ("LoopedBFS", "DualPipeV")
MESHES = {"dp": "FSDP2", "tp": "tensor parallelism", "both": "FSDP2 over TP"}


def main() -> None:
    """Run the checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    directory, wanted = Path(sys.argv[1]), sys.argv[2:]
    checks: dict[str, Callable[[], None]] = {
        "gradients": lambda: gradients("GPipe"),
        "regions": lambda: gradients("Interleaved1F1B" if dist.get_world_size() < 4 else "GPipe", regions="blocks"),
        "inductor": lambda: gradients("GPipe", backend="inductor"),
        **{f"schedule {s}": partial(training, s, 2 if s in MORE else 5) for s in (*SCHEDULES, *MORE)},
        "users": users,
        "padding": padding,
        "not finite": not_finite,
        "noise once": noise_once,
        "loading": lambda: loading(directory),
        "masks by hand": masks_by_hand,
        "own checkpoints": lambda: checkpoints(directory),
        "evaluation": evaluation,
        "communication": communication,
        "dropped": dropped,
        "differing": differing,
        "other draws": other_draws,
        "messages of another batch": messages,
        "copies": copies,
        "in turn": in_turn,
        "automatic": automatic,
    }
    if dist.get_world_size() > 2:  # as many blocks as stages
        for kind, name in MESHES.items():
            checks |= {
                f"{name} and stages": partial(meshed, kind, "1F1B"),
                f"{name} and two stages each": partial(meshed, kind, "Interleaved1F1B"),
                f"zero bubble, {name} and stages": partial(meshed, kind, "ZBVZeroBubble"),
                f"users, {name} and stages": partial(meshed, kind, "1F1B", examples_per_user=2),
                f"automatic, {name} and stages": partial(meshed, kind, "1F1B", clipping="automatic"),
                f"checkpoints of {name} and stages": partial(meshed_checkpoints, kind, directory),
            }
        checks = {n: c for n, c in checks.items() if n in ("gradients", "loading", "own checkpoints") or "stages" in n}
    failing = {"accident": accident, "late accident": late_accident, "killed": killed}
    if wanted[:1] and wanted[0] in failing:
        checks, wanted = {wanted[0]: failing[wanted[0]]}, []
    run_checks(checks, wanted)


if __name__ == "__main__":
    main()
