"""What every rank of test_tensor_parallel.py runs: ``torchrun tests/workers/tensor_worker.py DIRECTORY [CHECK ..]``.

On two ranks tensor parallelism alone, on four with FSDP2, two by two. Each check prints its name once it passed, on
rank 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from correlated_worker import KINDS, STEPS, train
from launching import run_checks
from sharded_worker import Collectives, made, raises
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpcompile
from dpcompile import AdaptiveClip, DPOptimizer, PoissonLoader, PrivacyError, UnsupportedGraphError, make_private
from dpcompile.checkpoint import load_checkpoint, save_checkpoint
from dpcompile.kernels import rates
from dpcompile.module import engine_of

dp_compile: Any = dpcompile.dp_compile
B, T, D, V, C = 8, 3, 8, 11, 0.5


class MLP(nn.Module):
    """A norm, a column-parallel and a row-parallel layer, on the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    """Four heads, causal; how many lie here follows from the projections."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=i != 1) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        z = self.norm(x)
        q, k, v = (p(z).unflatten(-1, (-1, 2)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.mlp(self.attention(x))


class GPT(nn.Module):
    """Whole embeddings, two blocks, and a head that is cut along the vocabulary and returns whole logits."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(V, D), nn.Parameter(torch.randn(T, D))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        h = self.tok(x) + self.pos
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class Repeated(nn.Module):
    """Two blocks, of which one is called twice: cut parameters and whole ones in two regions."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MLP() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        first, second = self.blocks
        return second(first(first(x)))


STYLES: dict[str, Callable[[], Any]] = {
    "up": ColwiseParallel, "down": RowwiseParallel, "q": ColwiseParallel, "k": ColwiseParallel, "v": ColwiseParallel,
    "o": RowwiseParallel, "head": lambda: ColwiseParallel(output_layouts=Replicate()),
}  # fmt: skip


def cut(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Every layer that has a style is cut over ``mesh``."""
    plan = {n: STYLES[last]() for n, _ in model.named_modules() if (last := n.rpartition(".")[2]) in STYLES}
    return parallelize_module(model, mesh, plan)


def placed(make: Callable[[], nn.Module], mesh: DeviceMesh) -> Any:
    """Cut over the mesh, or over its second dimension and sharded over the first."""
    if mesh.ndim == 1:
        return cut(made(make), mesh)
    model = cut(made(make), mesh["tp"])
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def part(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """What this rank's group is given."""
    return x if mesh.ndim == 1 else x.chunk(mesh.size(0))[mesh.get_local_rank(0)]


def step(model: Any, x: Tensor) -> None:
    model(x).float().square().flatten(1).sum(1).mean().backward()


def communicated(model: nn.Module, x: Tensor) -> dict[str, int]:
    """The collectives of a step that is not the first, and the bytes given to them."""
    step(model, x)
    model.zero_grad()
    with Collectives() as counter:
        step(model, x)
    return {k: n for k, n in counter.seen.items() if "wait_tensor" not in k and "wrap_tensor" not in k}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name, value in wanted.items():
        error = (found[name] - value).norm() / value.norm().clamp_min(1e-6)
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "MLP": (MLP, lambda: torch.randn(B, T, D)),
    "attention": (Attention, lambda: torch.randn(B, T, D)),
    "GPT": (GPT, lambda: torch.randint(0, V, (B, T))),
    "a block twice": (Repeated, lambda: torch.randn(B, T, D)),
}


def gradients(name: str, mesh: DeviceMesh, backend: str = "eager", **options: Any) -> None:
    make, example = MODELS[name]
    x = example()
    single = made(make)
    private = dp_compile(single, max_grad_norm=C, backend="eager", **{**options, "regions": None})
    model = dp_compile(placed(make, mesh), max_grad_norm=C, backend=backend, **options)
    mask = torch.arange(B) % 4 != 1
    for masked in (False, True):
        for m in (single, model):
            m.zero_grad()
        if masked:
            engine_of(private).set_mask(mask)
            engine_of(model).set_mask(part(mask, mesh))
        step(private, x)
        step(model, part(x, mesh))
        same(gradients_of(model), gradients_of(single))
        norms, wanted = engine_of(model).row_norms, part(engine_of(private).row_norms, mesh)
        torch.testing.assert_close(norms, wanted, rtol=1e-5, atol=1e-6)
        counted = part(mask, mesh).view(-1, options.get("examples_per_user", 1)).any(1)
        assert len(model.grad_norms) == (int(counted.sum()) if masked else len(norms))
    for p in model.parameters():
        assert not isinstance(p, DTensor) or (isinstance(p.grad, DTensor) and p.grad.placements == p.placements)


def frozen(mesh: DeviceMesh) -> None:
    """Some layers frozen, cut ones and whole ones."""

    def freeze(model: Any) -> Any:
        for name, p in model.named_parameters():
            p.requires_grad_(not any(part in name for part in ("up.weight", "o.bias", "norm.weight", "tok")))
        return model

    x = torch.randint(0, V, (B, T))
    single = freeze(made(GPT))
    private = dp_compile(single, max_grad_norm=C, backend="eager")
    model = dp_compile(placed(lambda: freeze(GPT()), mesh), max_grad_norm=C, backend="eager")
    step(private, x)
    step(model, part(x, mesh))
    same(gradients_of(model), gradients_of(single))


def one_example(mesh: DeviceMesh) -> None:
    x = torch.randn(mesh.size(0) if mesh.ndim == 2 else 1, T, D)
    single = made(MLP)
    private = dp_compile(single, max_grad_norm=C, backend="eager")
    model = dp_compile(placed(MLP, mesh), max_grad_norm=C, backend="eager")
    step(private, x)
    step(model, part(x, mesh))
    torch.testing.assert_close(model.grad_norms, part(private.grad_norms, mesh), rtol=1e-5, atol=1e-6)
    same(gradients_of(model), gradients_of(single))


def cut_embedding(mesh: DeviceMesh) -> None:
    """An embedding of which every rank holds other rows."""

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tok, self.mlp = nn.Embedding(12, D), MLP()

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.tok(x))

    x = torch.randint(0, 12, (B, T))
    single = made(Lookup)
    model: Any = made(Lookup)
    cut(model, mesh)
    parallelize_module(model, mesh, {"tok": RowwiseParallel(input_layouts=Replicate())})
    private = dp_compile(single, max_grad_norm=C, backend="eager")
    model = dp_compile(model, max_grad_norm=C, backend="eager")
    step(private, x)
    step(model, x)
    torch.testing.assert_close(model.grad_norms, private.grad_norms, rtol=1e-5, atol=1e-6)
    same(gradients_of(model), gradients_of(single))


def optimizer_of(model: Any, **options: Any) -> DPOptimizer:
    inner = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    return DPOptimizer(inner, model, noise_multiplier=0.5, expected_batch_size=B, seed=7, **options)


def training(mesh: DeviceMesh, few: int = 4, clipping: str = "flat", **options: Any) -> None:
    """Weights after steps with noise, and C where it moves, are those of one process; copies stay copies."""
    batches = [torch.randint(0, V, (B, T)) for _ in range(few)]
    single = made(GPT)
    private = dp_compile(single, max_grad_norm=C, backend="eager", clipping=clipping)
    model = dp_compile(placed(GPT, mesh), max_grad_norm=C, backend="eager", clipping=clipping)
    optimizers = [(private, optimizer_of(private, **options)), (model, optimizer_of(model, **options))]
    for x in batches:
        for trained, optimizer in optimizers:
            step(trained, part(x, mesh) if trained is model else x)
            optimizer.step()
            optimizer.zero_grad()
        assert optimizers[0][1].engine.clip.now == optimizers[1][1].engine.clip.now
    same_weights(model, single, 1e-5)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, {n: whole(p.detach()) for n, p in model.named_parameters()})
    for found in everywhere:
        for name, value in found.items():
            assert torch.equal(value, everywhere[0][name]), name


def correlated(mesh: DeviceMesh, kind: str) -> None:
    """Noise that is correlated over the steps: weights are those of one process."""
    of_loader, options, _ = KINDS[kind]
    group = (0, 1) if mesh.ndim == 1 else (mesh.get_local_rank(0), mesh.size(0))
    found = []
    for model, rank, groups in ((made(GPT), 0, 1), (placed(GPT, mesh), *group)):
        data = TensorDataset(torch.randint(0, V, (40, T), generator=torch.Generator().manual_seed(5)))
        loader = PoissonLoader(
            data, expected_batch_size=4, steps=STEPS, seed=3, rank=rank, world_size=groups, **of_loader
        )  # fmt: skip
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        private = dp_compile(model, max_grad_norm=C, backend="eager")
        found.append(train(*make_private(private, inner, loader, noise_multiplier=0.5, seed=7, **options)))
    alone, cut = found
    for name, value in alone.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-4, atol=1e-4, msg=name)


def other_rates(mesh: DeviceMesh) -> None:
    """Ranks that measured other speeds plan and compute alike nevertheless: copies of a parameter stay copies."""
    typical = rates.rates_for(torch.device("cpu"))
    slower = replace(typical, large=typical.large / (2 - dist.get_rank() % 2), batched=typical.batched / 10)
    here = slower if dist.get_rank() % 2 else replace(slower, batched=1e15, traffic=1e8)
    own, rates._rates = rates._rates, lambda kind, setting: here  # type: ignore[assignment]
    rates._ADOPTED.clear()
    try:
        training(mesh, 2)
        assert rates.rates_for(torch.device("cpu")) != slower
    finally:
        rates._rates = own
        rates._ADOPTED.clear()


def same_on_all_ranks(model: nn.Module) -> None:
    """The weights, bit by bit."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, {n: whole(p.detach()) for n, p in model.named_parameters()})
    for found in everywhere:
        assert all(torch.equal(value, everywhere[0][name]) for name, value in found.items())


def same_weights(model: Any, single: nn.Module, tolerance: float) -> None:
    wanted = dict(single.named_parameters())
    for name, p in model.named_parameters():
        found = whole(p.detach())
        torch.testing.assert_close(found, wanted[name].detach(), rtol=tolerance, atol=tolerance, msg=name)


def loading(mesh: DeviceMesh) -> None:
    """The groups of ranks share a logical batch out; the ranks of a group take the same part."""
    data = torch.utils.data.TensorDataset(torch.randint(0, V, (40, T)))
    group = (0, 1) if mesh.ndim == 1 else (mesh.get_local_rank(0), mesh.size(0))
    trained = []
    for model, rank, groups in ((made(GPT), 0, 1), (placed(GPT, mesh), *group)):
        private = dp_compile(model, max_grad_norm=C, backend="eager")
        inner = torch.optim.SGD(private.parameters(), lr=0.1, momentum=0.9)
        optimizer = DPOptimizer(inner, private, noise_multiplier=0.5, expected_batch_size=3, seed=7)
        options: dict[str, Any] = {"expected_batch_size": 3, "physical_batch_size": 2, "steps": 3, "seed": 3}
        loader = PoissonLoader(data, rank=rank, world_size=groups, **options)
        for (x,) in loader.attach(private, optimizer):
            step(private, x)
            optimizer.step()
            optimizer.zero_grad()
        trained.append((private, optimizer))
    same_weights(trained[1][0], trained[0][0], 1e-5)
    all_ranks = PoissonLoader(data, expected_batch_size=3, rank=dist.get_rank(), world_size=dist.get_world_size())
    raises(PrivacyError, "each example would count several times", lambda: all_ranks.attach(*trained[1]))


def checkpoints(mesh: DeviceMesh, directory: Path) -> None:
    """A run that is saved and resumed comes to the weights of the run that goes on."""
    batches = [torch.randint(0, V, (B, T)) for _ in range(3)]

    def run(seed: int) -> tuple[Any, DPOptimizer]:
        model = dp_compile(placed(GPT, mesh), max_grad_norm=C, backend="eager")
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, DPOptimizer(inner, model, noise_multiplier=0.5, expected_batch_size=B, seed=seed)

    def train(model: Any, optimizer: DPOptimizer, chosen: list[Tensor]) -> None:
        for x in chosen:
            step(model, part(x, mesh))
            optimizer.step()
            optimizer.zero_grad()

    path = directory / f"checkpoint_{dist.get_world_size()}"
    model, optimizer = run(7)
    train(model, optimizer, batches[:2])
    save_checkpoint(path, model, optimizer)
    train(model, optimizer, batches[2:])
    resumed, second = run(8)
    load_checkpoint(path, resumed, second)
    assert (second.logical_step, second.seed) == (2, 7)
    train(resumed, second, batches[2:])
    wanted = {n: whole(p.detach()) for n, p in model.named_parameters()}
    for name, p in resumed.named_parameters():
        torch.testing.assert_close(whole(p.detach()), wanted[name], rtol=0, atol=1e-7, msg=name)


def communication(mesh: DeviceMesh) -> None:
    """What the plain step sends, and one all-reduce of squared norms."""
    x = part(torch.randint(0, V, (B, T)), mesh)
    plain = placed(GPT, mesh)
    for module in plain.modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    private = dp_compile(placed(GPT, mesh), max_grad_norm=C, backend="eager")
    found = [communicated(model, x) for model in (plain, private)]
    more = {k: n - found[0].get(k, 0) for k, n in found[1].items() if n != found[0].get(k, 0)}
    rows = 2 * len(x) + 8  # norms of cut and of whole parameters, and a fingerprint of the batch
    assert more == {"c10d.allreduce_.default": 1, "c10d.allreduce_.default bytes": 8 * rows}, (more, found)
    assert found[0].keys() <= found[1].keys(), found


def refused(mesh: DeviceMesh) -> None:
    x = torch.randn(B, T, D)

    def private(model: Any, **options: Any) -> Any:
        return dp_compile(model, max_grad_norm=C, backend="eager", **options)

    def refuses(model: Any, message: str, given: Tensor = x, kind: Any = UnsupportedGraphError) -> None:
        raises(kind, message, lambda: step(private(model), given))

    logits = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 12))
    refuses(parallelize_module(logits, mesh, {"1": ColwiseParallel()}), "output 0 of the model is another one")
    refuses(cut(made(Scaled), mesh), "holds parameter 'scale' whole, and its gradient is another one on each")
    refuses(cut(made(ByRank), mesh), "is not given the same on all")
    refuses(cut(made(ByBuffer), mesh), "offset is not the same on all")
    refuses(cut(made(Dropping), mesh), "draws random numbers")
    uneven = nn.Sequential(nn.Linear(D, 9))
    parallelize_module(uneven, mesh, {"0": ColwiseParallel(output_layouts=Replicate())})
    raises(UnsupportedGraphError, "does not divide by the 2 ranks", lambda: private(uneven))
    raises(UnsupportedGraphError, "tensor parallelism holds parts", lambda: private(cut(made(MLP), mesh), check=True))
    breaks = cut(made(MLP), mesh)
    raises(UnsupportedGraphError, "'breaks' under tensor parallelism", lambda: private(breaks, regions="breaks"))
    raises(
        UnsupportedGraphError,
        "has two backward passes, and under tensor parallelism there is one",
        lambda: private(cut(made(MLP), mesh), norm="two_pass"),
    )
    model = cut(made(MLP), mesh)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    data = DataLoader(TensorDataset(torch.randn(8, T, D)), batch_size=4)
    raises(
        PrivacyError,
        "2 ranks are 1 groups of tensor parallelism",
        lambda: make_private(model, sgd, data, noise_multiplier=1.0, max_grad_norm=C, backend="eager"),
    )
    foreign = cut(made(Summing), mesh)
    refuses(foreign, "with ranks that are not those of tensor parallelism")
    refuses(made(Summing), "exchanges values between ranks")
    pair = made(MLP)
    both = distribute_tensor(pair.up.weight.detach(), mesh, [Shard(0)])  # type: ignore[union-attr]
    pair.up.weight = nn.Parameter(both)  # type: ignore[union-attr]
    raises(UnsupportedGraphError, "mixed torch.Tensor and DTensor", lambda: step(private(pair), x))
    apart = cut(made(MLP), mesh)
    refuses(apart, "were given different examples", x + dist.get_rank(), PrivacyError)
    other = cut(made(MLP), mesh)
    other.norm.weight.data += dist.get_rank()  # type: ignore[operator,union-attr]
    refuses(other, "hold other values of parameter 'norm.weight'", kind=PrivacyError)
    losses = private(cut(made(MLP), mesh))
    weighted = lambda: (losses(x) * (1 + dist.get_rank())).square().flatten(1).sum(1).mean().backward()  # noqa: E731
    raises(PrivacyError, "have other gradients on other ranks", weighted)
    late = private(made(MLP))
    cut(engine_of(late).module, mesh)
    raises(UnsupportedGraphError, "made after dp_compile", lambda: late(x))


def refused_on_two_dimensions(mesh: DeviceMesh) -> None:
    alone = cut(made(MLP), mesh["tp"])
    raises(UnsupportedGraphError, "over 2 of 4 ranks", lambda: dp_compile(alone, backend="eager"))
    doubled = dp_compile(Doubled(mesh), max_grad_norm=C, backend="eager")  # along both dimensions the batch is shared
    x = part(torch.randn(B, T, D), mesh)
    raises(PrivacyError, "were given different examples, or different padding", lambda: step(doubled, x))


class Doubled(nn.Module):
    """A weight on both dimensions of a mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight = nn.Parameter(distribute_tensor(torch.eye(D), mesh, [Replicate(), Replicate()]))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x @ self.weight.to_local()  # type: ignore[attr-defined]


class Scaled(MLP):
    """A plain parameter on what lies on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2 * D))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + self.down(self.scale * F.gelu(self.up(self.norm(x))))


class ByRank(MLP):
    """Every rank takes another part of whole activations."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.rank = nn.Parameter(torch.ones(D // 2)), dist.get_rank()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = super().forward(x)
        return y.repeat(1, 1, 2)[..., self.rank : self.rank + D // 2] * self.scale


class ByBuffer(MLP):
    """A buffer that is another one on every rank."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D))
        self.register_buffer("offset", torch.full((D,), 1.0 + dist.get_rank()))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return super().forward(x) * self.offset * self.scale


class Dropping(MLP):
    """Dropout on whole activations."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.dropout(super().forward(F.dropout(x)))


class Summing(MLP):
    """Adds up activations over a group of ranks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.group: Any = [dist.new_group([i]) for i in range(2)][dist.get_rank()]

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return super().forward(x) + funcol.all_reduce(x, "sum", self.group)


def main() -> None:
    """Run the checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    alone = world == 2
    mesh = init_device_mesh("cpu", (2,)) if alone else init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    regions = {"a block twice": {"regions": "blocks"}} if alone else {}  # FSDP2's units are regions anyhow
    checks: dict[str, Callable[[], None]] = {
        f"gradients of {n}": lambda n=n: gradients(n, mesh, **regions.get(n, {})) for n in MODELS
    }
    checks["a block twice, by layer"] = lambda: gradients(
        "a block twice", mesh, clipping="per_layer", **regions.get("a block twice", {})
    )
    checks["clipping by layer"] = lambda: gradients("GPT", mesh, clipping="per_layer")
    checks["users"] = lambda: gradients("GPT", mesh, examples_per_user=2)
    checks["inductor"] = lambda: gradients("MLP", mesh, backend="inductor")
    checks["frozen parameters"] = lambda: frozen(mesh)
    checks["one example"] = lambda: one_example(mesh)
    checks["training with noise"] = lambda: training(mesh)
    checks["C by a quantile"] = lambda: training(mesh, adaptive_clip=AdaptiveClip(learning_rate=1.0))
    checks["C of each layer by a quantile"] = lambda: training(
        mesh, clipping="per_layer", adaptive_clip=AdaptiveClip(learning_rate=1.0)
    )
    checks["other rates"] = lambda: other_rates(mesh)
    checks["secure noise"] = lambda: training(mesh, 2, secure=True)
    checks["loading"] = lambda: loading(mesh)
    checks["checkpoints"] = lambda: checkpoints(mesh, Path(sys.argv[1]))
    checks["communication"] = lambda: communication(mesh)
    if "correlated" in sys.argv:  # on demand alone
        checks = {f"correlated by {kind}": lambda kind=kind: correlated(mesh, kind) for kind in ("bands", "buffers")}
    if alone:
        checks["regions"] = lambda: gradients("GPT", mesh, regions="blocks")
        checks["cut embedding"] = lambda: cut_embedding(mesh)
        checks["refusals"] = lambda: refused(mesh)
    else:
        checks["refusals"] = lambda: refused_on_two_dimensions(mesh)
    run_checks(checks, sys.argv[2:])


if __name__ == "__main__":
    main()
