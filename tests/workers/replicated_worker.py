"""What every rank of tests/runtime/test_replicas.py runs: ``torchrun tests/workers/replicated_worker.py``.

Replicas under DistributedDataParallel, under FSDP2 on a mesh that only replicates, and shards that rest on the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from block_models import MLP, D, T, V
from launching import run_checks
from sharded_worker import (
    BATCH,
    MODELS,
    C,
    Collectives,
    alone,
    dp_compile,
    full,
    gpt,
    made,
    optimizer_of,
    part,
    raises,
    same,
    shard,
    step,
    weights_after,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from dpcompile import (
    AdaptiveClip,
    DPOptimizer,
    PoissonLoader,
    PrivacyError,
    UnsupportedGraphError,
    compile_step,
    make_private,
)
from dpcompile.checkpoint import load_checkpoint, save_checkpoint
from dpcompile.distributed.ranks import from_first


def replicated(make: Callable[[], nn.Module], **options: Any) -> Any:
    options = {"max_grad_norm": C, "backend": "eager", **options}
    ddp = {k: options.pop(k) for k in ("find_unused_parameters", "gradient_as_bucket_view") if k in options}
    return DistributedDataParallel(dp_compile(made(make), **options), **ddp)


def own(model: Any) -> dict[str, Tensor]:
    return {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}


def gradients(name: str, **options: Any) -> None:
    make, example = MODELS[name]
    x = example()
    wanted, norms = alone(made(make), x)
    model = replicated(make, **options)
    for _ in range(3):  # DistributedDataParallel makes its buckets anew after the first
        model.zero_grad()
        step(model, part(x))
        same(own(model), wanted)
        torch.testing.assert_close(model.module.grad_norms, part(norms), rtol=1e-5, atol=1e-6)


def agree(model: Any) -> None:
    """All replicas are the same, bit for bit."""
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in (q.detach() for q in model.parameters())]
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights)).hexdigest()
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    assert len(set(digests)) == 1


def training(**options: Any) -> None:
    batches = [torch.randint(0, V, (BATCH, T)) for _ in range(5)]
    single = made(gpt)
    private = dp_compile(single, max_grad_norm=C, backend="eager")
    weights_after(private, optimizer_of(private), batches, lambda x: x)
    model = replicated(gpt, **options)
    weights_after(model, optimizer_of(model), batches, part)
    agree(model)
    for (name, p), q in zip(single.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-5, msg=name)


def quantile(clipping: str = "flat") -> None:
    """C moves by the votes of all ranks' examples, of replicas and of shards, and of micro-batches under no_sync()."""
    batches = [torch.randint(0, V, (BATCH, T)) for _ in range(4)]
    clip = AdaptiveClip(learning_rate=1.0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options: dict[str, Any] = {"backend": "eager", "clipping": clipping}
    sharded = dp_compile(shard(made(gpt), mesh), max_grad_norm=C, **options)
    for model in (replicated(gpt, clipping=clipping), sharded):
        optimizer = optimizer_of(model, adaptive_clip=clip)
        single = dp_compile(made(gpt), max_grad_norm=C, **options)
        alone = optimizer_of(single, adaptive_clip=clip)
        bounds = {C}
        for x in batches:
            weights_after(single, alone, [x], lambda x: x)
            with model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext():
                optimizer.accumulating = True
                step(model, part(x)[:1])
                optimizer.step()
                optimizer.accumulating = False
            weights_after(model, optimizer, [part(x)[1:]], lambda x: x)
            assert optimizer.engine.clip.now == alone.engine.clip.now
            bounds.add(alone.max_grad_norm)
        assert clipping == "flat" or len(set(alone.engine.clip.now.shares.values())) > 2
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, optimizer.engine.clip.now)
        assert all(bounds == everywhere[0] for bounds in everywhere)
        assert len(bounds) == 5
        agree(model)


def micro_batches() -> None:
    """Under no_sync sums wait; one all-reduce has them all, and what was reduced before is not added again."""
    batches = [torch.randint(0, V, (BATCH, T)) for _ in range(4)]
    total: dict[str, Tensor] = {}
    for x in batches:
        for name, grad in alone(made(gpt), x)[0].items():
            total[name] = total[name] + grad if name in total else grad
    model = replicated(gpt)
    optimizer = optimizer_of(model)
    with Collectives() as counter:
        step(model, part(batches[0]))
    assert counter.seen["c10d.allreduce_.default"] == 2, counter.seen  # the second: the place in training
    before = {n: g.clone() for n, g in own(model).items()}
    with model.no_sync(), Collectives() as counter:
        step(model, part(batches[1]))
        step(model, part(batches[2]))
    assert not counter.seen
    same(own(model), before)
    raises(PrivacyError, "ran under no_sync()", optimizer.step)
    step(model, part(batches[3]))
    same(own(model), total)
    optimizer.step()
    optimizer.zero_grad()
    with model.no_sync():
        step(model, part(batches[0]))
    optimizer.zero_grad()  # drops what was held back
    step(model, part(batches[1]))
    same(own(model), alone(made_like(model), batches[1])[0])


def deep() -> nn.Module:
    inside = (nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64))
    return nn.Sequential(*inside, nn.LayerNorm(64), nn.Linear(64, 3))


def parts() -> None:
    """A batch in parts, for the memory: one reduction of all of them."""
    x = torch.randn(32 * dist.get_world_size(), 50, 64)
    wanted, norms = alone(made(deep), x)
    model = replicated(deep, memory_budget=0.97)
    step(model, part(x))
    model.zero_grad()
    with Collectives() as counter:
        step(model, part(x))
    assert model.module.plan.parts > 1 and counter.seen["c10d.allreduce_.default"] == 1, counter.seen
    same(own(model), wanted)
    torch.testing.assert_close(model.module.grad_norms, part(norms), rtol=1e-5, atol=1e-6)


def made_private() -> None:
    """make_private shares the seed and deals the examples out, for replicas and for shards."""
    data = torch.utils.data.DataLoader(TensorDataset(torch.randint(0, V, (40, T))), batch_size=4)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for model in (replicated(gpt), shard(made(gpt), mesh)):
        options = {} if isinstance(model, DistributedDataParallel) else {"max_grad_norm": C, "backend": "eager"}
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        private, optimizer, loader = make_private(model, inner, data, noise_multiplier=0.5, **options)
        for (x,) in loader:
            step(private, x)
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.logical_step == 10


def capped() -> None:
    """Truncated draws: one process and many keep the same examples, and every rank takes as many physical batches."""
    dataset = TensorDataset(torch.randint(0, V, (40, T)))
    mesh, given = init_device_mesh("cpu", (dist.get_world_size(),)), {"noise_multiplier": 0.5, "seed": 4}

    def train(model: Any, whole: bool, **options: Any) -> Any:
        inner, data = torch.optim.SGD(model.parameters(), lr=0.1), torch.utils.data.DataLoader(dataset, batch_size=8)
        private, optimizer, loader = make_private(model, inner, data, **given, max_batch_size=9, **options)
        sizes = []
        for (x,) in loader if whole else loader.parts():
            sizes.append(len(x))
            step(private, x)
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.logical_step == 5 and optimizer.accountant is not None
        assert optimizer.accountant.history == [(0.5, (0.2, 40, 9), 5)]
        return loader, set(sizes), len(sizes)

    single = made(gpt)
    train(single, True, max_grad_norm=C, backend="eager")
    for model in (replicated(gpt), shard(made(gpt), mesh)):
        options = {} if isinstance(model, DistributedDataParallel) else {"max_grad_norm": C, "backend": "eager"}
        whole = isinstance(model, DistributedDataParallel)
        loader, sizes, count = train(model, whole, physical_batch_size=2, **options)
        parts = -(-9 // (2 * dist.get_world_size()))
        assert (sizes, count) == (({2 * parts}, 5) if whole else ({2}, 5 * parts)) and loader.truncation == (40, 9)
        agree(model)
        for (name, p), q in zip(single.named_parameters(), model.parameters(), strict=True):
            here = q.full_tensor() if isinstance(q, DTensor) else q
            torch.testing.assert_close(here, p, rtol=1e-5, atol=1e-5, msg=name)


def by_step() -> None:
    """Batch size and noise by the step: one process and many train alike, and ranks have the same functions."""
    dataset = TensorDataset(torch.randint(0, V, (40, T)))
    mesh, given = init_device_mesh("cpu", (dist.get_world_size(),)), {"noise_multiplier": 0.5, "seed": 4}

    def train(model: Any, size: Any = lambda t: 1.0 + t, noise: Any = lambda t: 1 / (1 + t)) -> None:
        options = {} if isinstance(model, DistributedDataParallel) else {"max_grad_norm": C, "backend": "eager"}
        inner, data = torch.optim.SGD(model.parameters(), lr=0.1), torch.utils.data.DataLoader(dataset, batch_size=4)
        private, optimizer, loader = make_private(
            model, inner, data, **given, batch_size_schedule=size, noise_schedule=noise, **options
        )
        for (x,) in loader:
            step(private, x)
            optimizer.step()
            optimizer.zero_grad()
        assert len(loader) == optimizer.logical_step == 4 and optimizer.accountant is not None
        assert optimizer.accountant.history == [(0.5 / (1 + t), 4 * (1 + t) / 40, 1) for t in range(4)]

    single = made(gpt)
    train(single)
    for model in (replicated(gpt), shard(made(gpt), mesh)):
        train(model)
        agree(model)
        for (name, p), q in zip(single.named_parameters(), model.parameters(), strict=True):
            here = q.full_tensor() if isinstance(q, DTensor) else q
            torch.testing.assert_close(here, p, rtol=1e-5, atol=1e-5, msg=name)
    own = 1.0 + dist.get_rank() / 8
    raises(PrivacyError, "expected_batch_size", lambda: train(replicated(gpt), lambda t: 1.0 + own * t))
    other = "or moved C or the noise otherwise"
    raises(PrivacyError, other, lambda: train(replicated(gpt), noise=lambda t: 1 / (1 + own * t)))


def apart() -> None:
    """A rank that skips a batch, or moves C or sigma alone: all ranks are told, and none hangs."""
    data = torch.utils.data.DataLoader(TensorDataset(torch.randn(40, D)), batch_size=4)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for before in ("forward", "step", "C", "sigma"):
        for model in (replicated(MLP), shard(made(MLP), mesh)):
            options = {} if isinstance(model, DistributedDataParallel) else {"max_grad_norm": C, "backend": "eager"}
            inner = torch.optim.SGD(model.parameters(), lr=0.1)
            private, optimizer, loader = make_private(model, inner, data, noise_multiplier=0.5, **options)

            def train(
                private: Any = private, optimizer: Any = optimizer, loader: Any = loader, before: str = before
            ) -> None:
                for i, (x,) in enumerate(loader):
                    alone = i == 3 and dist.get_rank() == 1
                    if alone and before == "C":
                        optimizer.max_grad_norm *= 2
                    if alone and before == "sigma":
                        optimizer.move_noise_multiplier(0.7)
                    skips = alone and before in ("forward", "step")
                    if skips and before == "forward":
                        continue
                    step(private, x)
                    if skips:
                        optimizer.zero_grad()
                        continue
                    optimizer.step()
                    optimizer.zero_grad()

            raises(PrivacyError, "the ranks are at different steps or draws", train)
            assert optimizer.logical_step in (3, 4)


def made_like(model: Any) -> nn.Module:
    twin = made(gpt)
    twin.load_state_dict(model.module.state_dict())
    return twin


def loading(groups: Any = None, **of_user: int) -> None:
    """Draws of 2 examples, or users, on average over up to 4 ranks, in micro-batches of 2."""
    data = TensorDataset(torch.randint(0, V, (40, T)))

    def run(model: Any, **ranks: Any) -> list[Tensor]:
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = DPOptimizer(inner, model, noise_multiplier=0.5, expected_batch_size=2, seed=7)
        options: dict[str, Any] = {"expected_batch_size": 2, "physical_batch_size": 2, "steps": 6, "seed": 3}
        loader = PoissonLoader(data, groups=groups, **options, **of_user, **ranks)
        for (x,) in loader.attach(model, optimizer):
            step(model, x)
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.logical_step == 6
        return [p.detach() for p in model.parameters()]

    single = run(dp_compile(made(gpt), max_grad_norm=C, backend="eager", **of_user))
    found = run(replicated(gpt, **of_user), rank=dist.get_rank(), world_size=dist.get_world_size())
    for p, q in zip(single, found, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-5)


class Branching(nn.Module):
    """The first rank reaches one layer, the others two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, 3), nn.Linear(D, 3)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x) * self.scale
        return out if dist.get_rank() == 0 else out + self.second(x)


def unused_parameters() -> None:
    x = torch.randn(BATCH, D)
    model = replicated(Branching)
    step(model, part(x))
    total: dict[str, Tensor] = {}
    for rank, rows in enumerate(x.chunk(dist.get_world_size())):
        single = made(Branching)

        def forward(model: nn.Module, x: Tensor) -> Tensor:
            return (model.first(x) if rank == 0 else model.first(x) + model.second(x)).square().sum()  # type: ignore[operator] # noqa: B023

        for row in rows:
            names, params = zip(*single.named_parameters(), strict=True)
            grads = torch.autograd.grad(forward(single, row[None]), params, allow_unused=True)
            kept = [g if g is not None else torch.zeros_like(p) for g, p in zip(grads, params, strict=True)]
            weight = (C / torch.stack([g.square().sum() for g in kept]).sum().sqrt()).clamp_max(1)
            for name, g in zip(names, kept, strict=True):
                total[name] = total.get(name, 0) + weight * g
    same(own(model), total)


def refused() -> None:
    x = torch.randn(BATCH, D)
    with_rank: dict[str, Any] = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    raises(
        UnsupportedGraphError,
        "is, or holds, a DistributedDataParallel",
        lambda: dp_compile(DistributedDataParallel(MLP())),
    )
    raises(
        UnsupportedGraphError,
        "is, or holds, a FullyShardedDataParallel",
        lambda: dp_compile(FullyShardedDataParallel(MLP(), device_id=torch.device("cpu"))),
    )
    raises(UnsupportedGraphError, "is, or holds, a DataParallel", lambda: dp_compile(nn.DataParallel(MLP())))

    model = replicated(MLP)
    step(model, x)
    raises(PrivacyError, "without the DistributedDataParallel around it", lambda: model.module(x))
    with torch.no_grad():
        model.module(x)
    optimizer = optimizer_of(model)
    raises(
        UnsupportedGraphError,
        "replicated by DistributedDataParallel",
        lambda: compile_step(model, nn.functional.mse_loss, optimizer),
    )

    static = DistributedDataParallel(dp_compile(made(MLP), backend="eager"), static_graph=True)
    raises(UnsupportedGraphError, "with static_graph=True", lambda: static(x))
    hooked = replicated(MLP)
    hooked.register_comm_hook(None, lambda state, bucket: None)
    raises(UnsupportedGraphError, "a communication hook", lambda: hooked(x))

    data = TensorDataset(torch.randn(40, D))
    plain = dp_compile(made(MLP), max_grad_norm=C, backend="eager")
    loader = PoissonLoader(data, expected_batch_size=BATCH, seed=3, **with_rank)
    raises(PrivacyError, "nothing adds up the ranks' gradients", lambda: loader.attach(plain, optimizer_of(plain)))
    lone = PoissonLoader(data, expected_batch_size=BATCH, seed=3)
    raises(PrivacyError, "each example would count several times", lambda: lone.attach(model, optimizer))
    raises(
        PrivacyError,
        "the ranks take the parts",
        lambda: next(
            PoissonLoader(data, expected_batch_size=BATCH, seed=3, rank=0, world_size=dist.get_world_size()).batches()
        ),
    )

    late = replicated(MLP)  # the optimizer is not told of the replicas, and draws a seed of its own on every rank
    inner = torch.optim.SGD(late.parameters(), lr=0.1)
    told = DPOptimizer(inner, late.module, noise_multiplier=0.5, expected_batch_size=BATCH)
    step(late, part(x))
    raises(PrivacyError, "the ranks disagree about seed", told.step)


def some_ranks() -> None:
    """Pairs of ranks that add up among themselves only."""
    x = torch.randn(BATCH, D)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("apart", "pair"))["pair"]
    options: dict[str, Any] = {"max_grad_norm": C, "backend": "eager"}
    half = DistributedDataParallel(dp_compile(made(MLP), **options), process_group=mesh.get_group())
    raises(UnsupportedGraphError, "DistributedDataParallel over 2 of 4 ranks", lambda: half(x))
    shards = dp_compile(fully_shard(made(MLP), mesh=mesh), **options)
    raises(UnsupportedGraphError, "over 2 of 4 ranks", lambda: shards(x))


def copies(fully: bool) -> None:
    """FSDP2's own replication: a mesh whose shards are whole."""
    world = dist.get_world_size()
    x = torch.randint(0, V, (BATCH, T))
    wanted, _ = alone(made(gpt), x)
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard"))
    if fully:
        model = shard(made(gpt), mesh)
    else:
        from torch.distributed._composable.replicate_with_fsdp import replicate

        model = made(gpt)
        for block in model.blocks:  # type: ignore[union-attr]
            replicate(block, mesh=mesh["replicate"])
        replicate(model, mesh=mesh["replicate"])
    private = dp_compile(model, max_grad_norm=C, backend="eager")
    optimizer = optimizer_of(private)
    step(private, part(x))
    same(full(private), wanted)
    optimizer.step()
    single = made(gpt)
    plain = dp_compile(single, max_grad_norm=C, backend="eager")
    weights_after(plain, optimizer_of(plain), [x], lambda x: x)
    for (name, p), q in zip(single.named_parameters(), private.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p, rtol=1e-5, atol=1e-5, msg=name)


def checkpoints() -> None:
    """Replicas save, replicas and shards go on; both come to the weights of the run that did not stop."""
    batches = [torch.randint(0, V, (BATCH, T)) for _ in range(4)]
    path = Path(from_first(tempfile.mkdtemp())) / "step_2"
    model = replicated(gpt)
    optimizer = optimizer_of(model)
    weights_after(model, optimizer, batches[:2], part)
    save_checkpoint(path, model, optimizer)
    weights_after(model, optimizer, batches[2:], part)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shards = dp_compile(shard(made(gpt), mesh), max_grad_norm=C, backend="eager")
    for other in (replicated(gpt), shards):
        resumed = optimizer_of(other)
        load_checkpoint(path, other, resumed)
        assert resumed.logical_step == 2
        weights_after(other, resumed, batches[2:], part)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            found = q.full_tensor() if isinstance(q, DTensor) else q
            torch.testing.assert_close(found, p, rtol=1e-5, atol=1e-5)
    if dist.get_rank() == 0:
        shutil.rmtree(path.parent)


def offloaded() -> None:
    batches = [torch.randint(0, V, (BATCH, T)) for _ in range(3)]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = shard(made(gpt), mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    private = dp_compile(model, max_grad_norm=C, backend="eager")
    weights_after(private, optimizer_of(private), batches, part)
    single = made(gpt)
    plain = dp_compile(single, max_grad_norm=C, backend="eager")
    weights_after(plain, optimizer_of(plain), batches, lambda x: x)
    for (name, p), q in zip(single.named_parameters(), private.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p, rtol=1e-5, atol=1e-5, msg=name)


def main() -> None:
    """Run the checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    checks: dict[str, Callable[[], None]] = {f"gradients of {n}": lambda n=n: gradients(n) for n in MODELS}
    checks |= {
        "regions": lambda: gradients("GPT", regions="blocks"),
        "regions with a tied head": lambda: gradients("GPT, tied head", regions="blocks"),
        "unused parameters looked for": lambda: gradients("GPT", find_unused_parameters=True),
        "gradients in buckets": lambda: gradients("GPT", gradient_as_bucket_view=True),
        "training with noise": training,
        "C by a quantile": quantile,
        "C of each layer by a quantile": lambda: quantile("per_layer"),
        "micro-batches": micro_batches,
        "loading": loading,
        "loading of users": lambda: loading([i % 17 for i in range(40)], examples_per_user=2),
        "unused parameters": unused_parameters,
        "make_private": made_private,
        "a cap on draws": capped,
        "numbers by the step": by_step,
        "a rank that skips": apart,
        "parts": parts,
        "refusals": refused,
        "mesh of replicas": lambda: copies(fully=True),
        "replicate": lambda: copies(fully=False),
        "offloaded": offloaded,
        "checkpoints": checkpoints,
    }
    if dist.get_world_size() == 2:
        checks["inductor"] = lambda: gradients("ViT", backend="inductor")
    if dist.get_world_size() == 4:
        checks["some ranks"] = some_ranks
    run_checks(checks, sys.argv[1:])


if __name__ == "__main__":
    main()
