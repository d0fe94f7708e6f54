"""What every rank of tests/regions/test_fsdp.py runs: ``torchrun tests/workers/sharded_worker.py DIRECTORY``.

Each check prints its name once it passed, on rank 0. Gradients are compared with those of one process on the union of
the ranks' batches, weights are left in the directory for the comparison between numbers of ranks.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from block_models import GPT, MLP, Around, Block, D, LoRA, T, V, ViT
from launching import run_checks
from sharded_noise import noise, replicas
from shared_models import Tied, twice
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

import dpcompile
from dpcompile import (
    AdaptiveClip,
    DPOptimizer,
    PoissonLoader,
    PrivacyAccountant,
    PrivacyError,
    UnsupportedGraphError,
)
from dpcompile.checkpoint import load_checkpoint, save_checkpoint
from dpcompile.clipping.groups import Bounds
from dpcompile.module import engine_of

dp_compile: Any = dpcompile.dp_compile
BATCH = 8
C = 0.5


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def shard(model: nn.Module, mesh: DeviceMesh, **options: Any) -> Any:
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for child in module:
                if next(child.parameters(), None) is not None:
                    fully_shard(child, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def step(model: Any, x: Tensor) -> None:
    model(x).float().square().flatten(1).sum(1).mean().backward()


def part(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def full(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}  # type: ignore[union-attr]


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name, value in wanted.items():
        error = (found[name] - value).norm() / value.norm().clamp_min(1e-6)
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def alone(
    model: nn.Module, x: Tensor, mask: Tensor | None = None, clipping: str = "flat", examples_per_user: int = 1
) -> tuple[dict[str, Tensor], Tensor]:
    """Clipped sums and norms of one process on the whole batch."""
    options: dict[str, Any] = {"clipping": clipping, "examples_per_user": examples_per_user}
    private = dp_compile(model, max_grad_norm=C, backend="eager", **options)
    if mask is not None:
        engine_of(private).set_mask(mask)
    step(private, x)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, private.grad_norms


def gpt() -> GPT:
    return GPT(3)


def checkpointed() -> GPT:
    model = GPT(3)
    apply_activation_checkpointing(model, checkpoint_wrapper, check_fn=lambda m: isinstance(m, Block))
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "GPT": (gpt, lambda: torch.randint(0, V, (BATCH, T))),
    "checkpointed GPT": (checkpointed, lambda: torch.randint(0, V, (BATCH, T))),
    "ViT": (ViT, lambda: torch.randn(BATCH, 3, 8, 8)),
    "LoRA": (LoRA, lambda: torch.randint(0, V, (BATCH, T))),
    "GPT, tied head": (Tied, lambda: torch.randint(0, V, (BATCH, T))),
    "a block twice": (lambda: Around(twice), lambda: torch.randn(BATCH, D)),
}


def gradients(name: str, mesh: DeviceMesh, private: Mapping[str, Any] = {}, **options: Any) -> None:
    make, example = MODELS[name]
    x = example()
    wanted, norms = alone(
        made(make), x, clipping=private.get("clipping", "flat"), examples_per_user=private.get("examples_per_user", 1)
    )
    model = dp_compile(shard(made(make), mesh, **options), max_grad_norm=C, backend="eager", **private)
    for _ in range(2):
        model.zero_grad()
        step(model, part(x))
        same(full(model), wanted)
        torch.testing.assert_close(model.grad_norms, part(norms), rtol=1e-5, atol=1e-6)
    for p in model.parameters():
        assert p.grad is None or (isinstance(p.grad, DTensor) and p.grad.placements == p.placements)


def padding_and_lost_examples(mesh: DeviceMesh) -> None:
    x = torch.randint(0, V, (BATCH, T))
    mask = torch.arange(BATCH) % 3 != 1
    wanted, _ = alone(made(gpt), x, mask)
    model = dp_compile(shard(made(gpt), mesh), max_grad_norm=C, backend="eager")
    engine_of(model).set_mask(part(mask))
    step(model, part(x))
    same(full(model), wanted)


def padding_of_users(mesh: DeviceMesh) -> None:
    x = torch.randint(0, V, (BATCH, T))
    mask = torch.arange(BATCH) % 4 < 3  # of the second user of each two one row
    wanted, _ = alone(made(gpt), x, mask, examples_per_user=2)
    model = dp_compile(shard(made(gpt), mesh), max_grad_norm=C, backend="eager", examples_per_user=2)
    engine_of(model).set_mask(part(mask))
    step(model, part(x))
    same(full(model), wanted)


def micro_batches(mesh: DeviceMesh) -> None:
    batches = [torch.randint(0, V, (BATCH, T)) for _ in range(2)]
    model = dp_compile(shard(made(gpt), mesh), max_grad_norm=C, backend="eager")
    total: dict[str, Tensor] = {}
    for x in batches:
        for name, grad in alone(made(gpt), x)[0].items():
            total[name] = total[name] + grad if name in total else grad
        step(model, part(x))
    same(full(model), total)


def optimizer_of(model: Any, **options: Any) -> DPOptimizer:
    inner = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    return DPOptimizer(inner, model, noise_multiplier=0.5, expected_batch_size=BATCH, seed=7, **options)


def weights_after(model: Any, optimizer: DPOptimizer, batches: list[Tensor], take: Callable[[Tensor], Tensor]) -> None:
    for x in batches:
        step(model, take(x))
        optimizer.step()
        optimizer.zero_grad()


def training(mesh: DeviceMesh, directory: Path) -> None:
    batches = [torch.randint(0, V, (BATCH, T)) for _ in range(5)]
    model = dp_compile(shard(made(gpt), mesh), max_grad_norm=C, backend="eager")
    weights_after(model, optimizer_of(model), batches, part)
    found = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
    single = made(gpt)
    private = dp_compile(single, max_grad_norm=C, backend="eager")
    weights_after(private, optimizer_of(private), batches, lambda x: x)
    for name, p in single.named_parameters():
        torch.testing.assert_close(found[name], p.detach(), rtol=1e-5, atol=1e-5, msg=name)
    if dist.get_rank() == 0:
        torch.save(found, directory / f"weights_{dist.get_world_size()}.pt")


def raises(kind: type[Exception], text: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except kind as error:
        assert text in str(error), error
        return
    raise AssertionError(f"nothing was refused: {text}")


def loading(mesh: DeviceMesh, directory: Path) -> None:
    """Draws of 2 examples on average, so that ranks are left without any; the weights do not depend on the ranks."""
    data = TensorDataset(torch.randint(0, V, (40, T)))
    model = dp_compile(shard(made(gpt), mesh), max_grad_norm=C, backend="eager")
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = DPOptimizer(inner, model, noise_multiplier=0.5, expected_batch_size=2, seed=7)
    ranks: dict[str, Any] = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    loader = PoissonLoader(data, expected_batch_size=2, physical_batch_size=2, steps=6, seed=3, **ranks)
    for (x,) in loader.attach(model, optimizer):
        step(model, x)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.logical_step == 6
    found = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
    if dist.get_rank() == 0:
        torch.save(found, directory / f"loaded_{dist.get_world_size()}.pt")


def checkpoints(mesh: DeviceMesh, directory: Path) -> None:
    """Two ranks save after three of six steps and go on; one and four ranks go on from there."""
    ranks: dict[str, Any] = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    data = TensorDataset(torch.randint(0, V, (40, T)))

    def run(seed: int) -> tuple[Any, DPOptimizer, PoissonLoader]:
        model = dp_compile(shard(made(gpt), mesh), max_grad_norm=C, backend="eager")
        accountant = PrivacyAccountant(noise_multiplier=0.5, sample_rate=6 / 40)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = DPOptimizer(
            inner, model, noise_multiplier=0.5, expected_batch_size=6, seed=seed, accountant=accountant
        )
        loader = PoissonLoader(data, expected_batch_size=6, physical_batch_size=4, steps=6, seed=seed, **ranks)
        return model, optimizer, loader.attach(model, optimizer)

    saving = dist.get_world_size() == 2
    model, optimizer, loader = run(7 if saving else 8)
    path = directory / "checkpoint"
    if not saving:
        load_checkpoint(path, model, optimizer, loader)
        assert (optimizer.logical_step, optimizer.seed, loader.step) == (3, 7, 3)
    for (x,) in loader:
        step(model, x)
        optimizer.step()
        optimizer.zero_grad()
        if saving and optimizer.logical_step == 3 and not path.exists() and not optimizer.accumulating:
            dist.barrier()
            save_checkpoint(path, model, optimizer, loader)
            dist.barrier()
    assert optimizer.logical_step == 6 and optimizer.accountant is not None
    fresh = PrivacyAccountant(noise_multiplier=0.5, sample_rate=6 / 40)
    for _ in range(6):
        fresh.step()
    assert optimizer.accountant.epsilon(1e-5) == fresh.epsilon(1e-5)
    raises(
        PrivacyError, "noise of the steps between would be used twice", lambda: load_checkpoint(path, model, optimizer)
    )
    found = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
    if dist.get_rank() == 0:
        torch.save(found, directory / f"resumed_{dist.get_world_size()}.pt")


def bounds_of_blocks(mesh: DeviceMesh, directory: Path) -> None:
    """Each block's C by its own quantile: a checkpoint after two of four steps, resumed on other ranks."""
    batches = [torch.randint(0, V, (BATCH, T)) for _ in range(4)]
    options: dict[str, Any] = {"max_grad_norm": C, "backend": "eager", "clipping": "per_block"}
    clip, path = AdaptiveClip(learning_rate=1.0), directory / "blocks"
    model = dp_compile(shard(made(gpt), mesh), **options)
    optimizer = optimizer_of(model, adaptive_clip=clip)
    if dist.get_world_size() == 2 and not path.exists():
        weights_after(model, optimizer, batches[:2], part)
        dist.barrier()
        save_checkpoint(path, model, optimizer)
        dist.barrier()
    else:
        load_checkpoint(path, model, optimizer)
    weights_after(model, optimizer, batches[2:], part)
    single = dp_compile(made(gpt), **options)
    alone = optimizer_of(single, adaptive_clip=clip)
    weights_after(single, alone, batches, lambda x: x)
    assert optimizer.engine.clip.now == alone.engine.clip.now
    assert len(set(alone.engine.clip.now.shares.values())) > 2
    found = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
    for name, p in single.named_parameters():
        torch.testing.assert_close(found[name], p.detach(), rtol=1e-5, atol=1e-5, msg=name)
    if dist.get_world_size() > 1:
        if dist.get_rank():  # C as a whole is the same
            shares = optimizer.engine.clip.now.shares
            optimizer.move_bounds(
                Bounds(optimizer.max_grad_norm, dict(zip(shares, [*shares.values()][::-1], strict=True)))
            )
        raises(PrivacyError, "or moved C or the noise otherwise", lambda: step(model, part(batches[0])))


def disagreement(mesh: DeviceMesh) -> None:
    rank, x = dist.get_rank(), part(torch.randint(0, V, (BATCH, T)))

    def one_step(**options: Any) -> DPOptimizer:
        model = dp_compile(shard(made(gpt), mesh), max_grad_norm=options.pop("C", C), backend="eager")
        arguments: dict[str, Any] = {"noise_multiplier": 0.5, "expected_batch_size": BATCH, "seed": 7, **options}
        optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, **arguments)
        step(model, x)
        optimizer.step()
        return optimizer

    drawn = one_step(seed=None).seed
    seeds: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seeds, drawn)
    assert len(set(seeds)) == 1
    raises(PrivacyError, "the ranks disagree about seed", lambda: one_step(seed=7 + rank))
    raises(PrivacyError, "the ranks disagree about noise_multiplier", lambda: one_step(noise_multiplier=0.5 + rank))
    raises(PrivacyError, "the ranks disagree about max_grad_norm", lambda: one_step(C=1.0 + rank))
    ranks: dict[str, Any] = {"rank": rank, "world_size": dist.get_world_size()}
    longer = TensorDataset(torch.zeros(40 + rank, 1))
    loader = PoissonLoader(longer, expected_batch_size=2, seed=3, steps=1, **ranks)
    sizes = ", ".join(str(40 + r) for r in range(dist.get_world_size()))
    raises(PrivacyError, f"dataset_size ({sizes})", lambda: next(loader.batches()))
    data = TensorDataset(torch.zeros(40, 1))
    for name, value in {"expected_batch_size": 2 + rank, "physical_batch_size": 4 + rank, "steps": 1 + rank}.items():
        other = PoissonLoader(
            data, **{"expected_batch_size": 2, "physical_batch_size": 4, "steps": 1, name: value}, **ranks
        )
        values = ", ".join(str(value - rank + r) for r in range(dist.get_world_size()))
        raises(PrivacyError, f"{name} ({values})", lambda other=other: next(other.batches()))
    some = PoissonLoader(data, expected_batch_size=2, seed=3 if rank else None, **ranks)  # no rank waits for another
    raises(PrivacyError, "the ranks disagree about seed", lambda: next(some.batches()))
    raises(PrivacyError, "the ranks disagree about seed", lambda: one_step(seed=7 if rank else None))
    model = dp_compile(shard(made(gpt), mesh), max_grad_norm=C, backend="eager")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, noise_multiplier=1.0, expected_batch_size=2
    )
    alone = PoissonLoader(longer, expected_batch_size=2)
    raises(PrivacyError, "each example would count several times", lambda: alone.attach(model, optimizer))


class Collectives(TorchDispatchMode):
    """Counts the collectives, and the bytes of the tensors given to them, at the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.seen[str(func)] += 1
            self.seen[f"{func} bytes"] += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def communication(name: str, mesh: DeviceMesh, **options: Any) -> None:
    """The collectives of the non-private step; in two passes every unit is gathered once more."""
    make, example = MODELS[name]
    x = part(example())
    plain = shard(made(make), mesh)
    for module in plain.modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    private = dp_compile(shard(made(make), mesh), max_grad_norm=C, backend="eager", **options)
    found = []
    for model in (plain, private):
        step(model, x)
        model.zero_grad()
        with Collectives() as counter:
            step(model, x)
        found.append(counter.seen)
    units = sum(hasattr(m, "unshard") for m in plain.modules())
    assert _number(found[0], "reduce_scatter") == _number(found[1], "reduce_scatter") == units, found
    assert _number(found[0], "allgather") == 2 * units - 1, found  # the model's own parameters stay gathered
    if "norm" not in options:
        assert found[0] == found[1], found
        return
    sent = [{op: n for op, n in seen.items() if "allgather" not in op} for seen in found]
    assert sent[0] == sent[1], found
    assert _number(found[1], "allgather") == 3 * units - 1, found


def _number(seen: Mapping[str, int], kind: str) -> int:
    return sum(n for op, n in seen.items() if kind in op and "bytes" not in op)


def graph_breaks(mesh: DeviceMesh) -> None:
    """Breaks in a block and in the model itself, with a tied head."""
    x = torch.randint(0, V, (BATCH, T))
    wanted, norms = alone_without_breaks(made(Broken), x)
    model = dp_compile(shard(made(Broken), mesh), max_grad_norm=C, backend="eager", regions="breaks")
    for _ in range(2):
        model.zero_grad()
        step(model, part(x))
        same(full(model), wanted)
        torch.testing.assert_close(model.grad_norms, part(norms), rtol=1e-5, atol=1e-6)
    whole = dp_compile(shard(made(Broken), mesh), backend="eager")
    raises(UnsupportedGraphError, "regions='breaks'", lambda: whole(part(x)))


def alone_without_breaks(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    model.broken = False  # type: ignore[assignment]
    for block in model.blocks:  # type: ignore[union-attr]
        block.broken = False
    return alone(model, x)


class BrokenBlock(Block):
    """A break behind the block."""

    broken = True

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = super().forward(x, causal)
        if self.broken:
            torch._dynamo.graph_break()
        return x * 2


class Broken(Tied):
    """A break behind the embedding, and in every block."""

    broken = True

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BrokenBlock() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        if self.broken:
            torch._dynamo.graph_break()
        for block in self.blocks:
            x = block(x, causal=True)
        return self.head(self.norm(x))


def inductor(mesh: DeviceMesh) -> None:
    for name in ("GPT", "GPT, tied head"):
        make, example = MODELS[name]
        x = example()
        wanted, _ = alone(made(make), x)
        model = dp_compile(shard(made(make), mesh), max_grad_norm=C)
        step(model, part(x))
        same(full(model), wanted)


def mixed_precision(mesh: DeviceMesh) -> None:
    """bfloat16 compute: each rank's norms are those of one process in bfloat16, sums are float32."""
    x = torch.randn(BATCH, D)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = dp_compile(shard(made(MLP), mesh, mp_policy=policy), max_grad_norm=C, backend="eager")
    step(model, part(x))
    plain = copy.deepcopy(made(MLP)).bfloat16()
    private = dp_compile(plain, max_grad_norm=C, backend="eager")
    step(private, x.bfloat16())
    torch.testing.assert_close(model.grad_norms, part(private.grad_norms), rtol=2e-2, atol=1e-2)
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32, name
        reference: Any = dict(plain.named_parameters())[name].grad
        wanted = reference.float()
        assert (p.grad.full_tensor() - wanted).norm() <= 3e-2 * wanted.norm(), name


def refused(mesh: DeviceMesh) -> None:
    x = part(torch.randn(BATCH, D))
    model = made(MLP)
    for layer in model.layers:  # type: ignore[union-attr]
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    private = dp_compile(model, backend="eager")
    raises(UnsupportedGraphError, "'head.weight' is outside FSDP", lambda: private(x))
    hooked = shard(made(MLP), mesh)
    hooked.layers[0].register_forward_hook(lambda *_: None)
    raises(UnsupportedGraphError, "has hooks around its forward", lambda: dp_compile(hooked, backend="eager")(x))
    whole = shard(made(MLP), mesh)
    raises(UnsupportedGraphError, "holds them in parts", lambda: dp_compile(whole, check=True))
    late = dp_compile(made(MLP), backend="eager")
    shard(engine_of(late).module, mesh)
    raises(UnsupportedGraphError, "made after dp_compile", lambda: late(x))
    twice = dp_compile(shard(made(MLP), mesh), backend="eager")
    loss = twice(x).sum()
    loss.backward(retain_graph=True)
    raises(PrivacyError, "a second backward through the same forward", lambda: loss.backward())
    foreign = dp_compile(shard(made(MLP), mesh), backend="eager")
    optimizer = optimizer_of(foreign)
    step(foreign, x)
    next(iter(foreign.parameters())).grad.to_local().mul_(2)  # type: ignore[union-attr]
    raises(PrivacyError, "did not come out of the clipped backward alone", optimizer.step)


def main() -> None:
    """Run the checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    checks: dict[str, Callable[[], None]] = {f"gradients of {n}": lambda n=n: gradients(n, mesh) for n in MODELS}
    checks |= {
        "two passes": lambda: gradients("GPT", mesh, {"norm": "two_pass"}),
        "two passes, checkpointed": lambda: gradients("checkpointed GPT", mesh, {"norm": "two_pass"}),
        "two passes, parameters kept": lambda: gradients(
            "GPT", mesh, {"norm": "two_pass"}, reshard_after_forward=False
        ),
        "two passes for a budget": lambda: gradients("GPT", mesh, {"memory_budget": 1}),
        "clipped by blocks": lambda: gradients("GPT", mesh, {"clipping": "per_block"}),
        "a block twice, by blocks": lambda: gradients("a block twice", mesh, {"clipping": "per_block"}),
        "a tied head, by layers": lambda: gradients("GPT, tied head", mesh, {"clipping": "per_layer"}),
        "clipped by layers": lambda: gradients("checkpointed GPT", mesh, {"clipping": "per_layer"}),
        "parameters kept after forward": lambda: gradients("GPT", mesh, reshard_after_forward=False),
        "padding": lambda: padding_and_lost_examples(mesh),
        "users": lambda: gradients("GPT", mesh, {"examples_per_user": 2}),
        "users, by blocks": lambda: gradients("GPT", mesh, {"examples_per_user": 2, "clipping": "per_block"}),
        "micro-batches": lambda: micro_batches(mesh),
        "training with noise": lambda: training(mesh, Path(sys.argv[1])),
        "loading": lambda: loading(mesh, Path(sys.argv[1])),
        "checkpoints": lambda: checkpoints(mesh, Path(sys.argv[1])),
        "bounds of blocks": lambda: bounds_of_blocks(mesh, Path(sys.argv[1])),
        "mixed precision": lambda: mixed_precision(mesh),
        "noise": lambda: noise(mesh, Path(sys.argv[1])),
        "refusals": lambda: refused(mesh),
        "graph breaks": lambda: graph_breaks(mesh),
    }
    if world < BATCH // 2:
        checks["padding of users"] = lambda: padding_of_users(mesh)
    if world > 1:
        checks |= {
            f"communication of {n}": lambda n=n: communication(n, mesh)
            for n in ("GPT", "checkpointed GPT", "ViT", "GPT, tied head")
        }
        checks["communication of two passes"] = lambda: communication("GPT", mesh, norm="two_pass")
        checks["communication of two checkpointed passes"] = lambda: communication(
            "checkpointed GPT", mesh, norm="two_pass"
        )
        checks["communication by blocks"] = lambda: communication("GPT", mesh, clipping="per_block")
        checks["disagreement"] = lambda: disagreement(mesh)
    if world == 2:
        checks["inductor"] = lambda: inductor(mesh)
    if world == 4:
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        checks["replicas of shards"] = lambda: gradients("GPT", both)
        checks["noise of replicas"] = lambda: replicas(both)
    run_checks(checks, sys.argv[2:])


if __name__ == "__main__":
    main()
