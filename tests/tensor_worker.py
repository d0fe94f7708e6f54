"""What every rank of tests/test_tensor_parallel.py runs: ``torchrun tests/tensor_worker.py DIRECTORY [CHECK ..]``.

On two ranks tensor parallelism alone, on four with FSDP2, two by two. Each check prints its name once it passed, on
rank 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_worker import Collectives, made, raises
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

import dpcompile
from dpcompile import DPOptimizer, PoissonLoader, PrivacyError, UnsupportedGraphError
from dpcompile.checkpoint import load_checkpoint, save_checkpoint
from dpcompile.runtime import engine_of

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
        torch.testing.assert_close(model.grad_norms, part(private.grad_norms, mesh), rtol=1e-5, atol=1e-6)
    for p in model.parameters():
        assert not isinstance(p, DTensor) or (isinstance(p.grad, DTensor) and p.grad.placements == p.placements)


def main() -> None:
    """Run the checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    alone = world == 2
    mesh = init_device_mesh("cpu", (2,)) if alone else init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    checks: dict[str, Callable[[], None]] = {f"gradients of {n}": lambda n=n: gradients(n, mesh) for n in MODELS}
    checks["clipping by layer"] = lambda: gradients("GPT", mesh, clipping="per_layer")
    checks["inductor"] = lambda: gradients("MLP", mesh, backend="inductor")
    if alone:
        checks["regions"] = lambda: gradients("GPT", mesh, regions="blocks")
    wanted = sys.argv[2:]
    for name, check in checks.items():
        if not wanted or any(w in name for w in wanted):
            torch.manual_seed(2)
            check()
            torch._dynamo.reset()
            if dist.get_rank() == 0:
                print(f"passed: {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
