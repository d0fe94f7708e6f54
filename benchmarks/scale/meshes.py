"""One stage of a large Llama on one rank of a mesh of four dimensions, without content: memory, and FSDP2's bytes.

The mesh is data × tensor × pipeline × context. What lies on a rank runs for real, without content: the blocks of a
stage with heads and inner features cut over ``tp`` ranks, on the tokens of one of ``cp`` ranks, sharded by FSDP2 over
``dp``. The other ranks' keys and values are there with their size; what ``tp``, ``pp`` and ``cp`` send follows from
shapes, in :mod:`benchmarks.scale.mesh_model`.
"""

from __future__ import annotations

import unittest.mock
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks.scale.hollow import Hollow, fake_ranks
from benchmarks.scale.steps import adamw, as_on_a_gpu, compiler, no_talk
from dpcompile import DPOptimizer, dp_compile
from dpcompile.regions import backward as backwards

__all__ = ["MESHES", "MODELS", "WAYS", "Mesh", "Sizes", "size_cell", "size_stage"]

WAYS = ("plain", "plain_again", "ours", "ours_again")
HEAD = 128  # features of a head, in every Llama 3


@dataclass(frozen=True, slots=True)
class Sizes:
    """A Llama 3 (its model card): all of it is trained."""

    title: str
    width: int
    depth: int
    heads: int
    groups: int
    inside: int
    vocabulary: int
    context: int = 8192

    def block(self, tp: int) -> int:
        """Elements of a block on one of ``tp`` ranks."""
        attention = 2 * self.width * (self.heads + self.groups) * HEAD // tp
        return attention + 3 * self.width * self.inside // tp + 2 * self.width


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks: with examples of their own, that cut layers, stages, that cut tokens."""

    dp: int
    tp: int
    pp: int
    cp: int

    @property
    def ranks(self) -> int:
        """Of the whole mesh."""
        return self.dp * self.tp * self.pp * self.cp

    def __str__(self) -> str:
        return f"{self.dp} × {self.tp} × {self.pp} × {self.cp}"


MODELS = {
    "llama3-70b": Sizes("Llama-3-70B", 8192, 80, 64, 8, 28672, 128256),
    "llama3-405b": Sizes("Llama-3-405B", 16384, 126, 128, 8, 53248, 128256),
    "toy": Sizes("a toy", 256, 4, 2, 2, 512, 64, context=16),
}
MESHES = {
    "llama3-70b": (Mesh(16, 8, 4, 1), Mesh(8, 8, 4, 2), Mesh(32, 8, 4, 1), Mesh(32, 1, 4, 8)),
    "llama3-405b": (Mesh(4, 8, 16, 1), Mesh(2, 8, 16, 2), Mesh(8, 8, 16, 1), Mesh(8, 1, 16, 8)),
    "toy": (Mesh(2, 2, 2, 1), Mesh(2, 1, 2, 2)),
}


class Block(nn.Module):
    """What of a block lies on a rank."""

    def __init__(self, sizes: Sizes, mesh: Mesh) -> None:
        super().__init__()
        width, inside = sizes.width, sizes.inside // mesh.tp
        self.again, self.cp = sizes.heads // sizes.groups, mesh.cp
        queries, keys = sizes.heads * HEAD // mesh.tp, sizes.groups * HEAD // mesh.tp
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = _linear(width, queries), _linear(queries, width)
        self.k, self.v = _linear(width, keys), _linear(width, keys)
        self.gate, self.up, self.down = _linear(width, inside), _linear(width, inside), _linear(inside, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T / cp, width]`` to the same."""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (-1, HEAD)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (torch.cat([t] * self.cp, 2).repeat_interleave(self.again, 1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Stage(nn.Module):
    """The first one: the rank's part of the embedding, and as many blocks as in every other."""

    def __init__(self, sizes: Sizes, mesh: Mesh) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary // mesh.tp, sizes.width)
        self.blocks = nn.Sequential(*(Block(sizes, mesh) for _ in range(-(-sizes.depth // mesh.pp))))

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T / cp]`` to ``[B, T / cp, width]``."""
        return self.blocks(self.tokens(ids))


def _linear(inside: int, outside: int) -> nn.Linear:
    return nn.Linear(inside, outside, bias=False)


def size_stage(model: str, mesh: Mesh, way: str, batch: int = 1) -> dict[str, Any]:
    """Bytes on a rank of the first stage, of one micro-batch of the second step.

    Returns:
        ``parameters`` (elements on the ranks of one shard group together), ``fixed`` (live bytes between steps),
        ``forward`` (what one micro-batch holds after its forward), ``held`` (what it holds when the clip weights are
        made; without privacy nothing), ``peak`` (all live bytes, at most), ``gathered`` and ``reduced`` (bytes of
        FSDP2's collectives for one micro-batch, of the whole tensors).
    """
    sizes = MODELS[model]
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    torch.compiler.reset()
    with fake_ranks(mesh.dp):
        shards = init_device_mesh("cpu", (mesh.dp,))
        with Hollow() as hollow, as_on_a_gpu(), no_talk():
            return _size(hollow, sizes, mesh, way, batch, shards)


def size_cell(model: str, mesh: Sequence[int], way: str) -> dict[str, Any]:
    """:func:`size_stage`, of words and numbers."""
    return size_stage(model, Mesh(*mesh), way)


def _size(hollow: Hollow, sizes: Sizes, mesh: Mesh, way: str, batch: int, shards: Any) -> dict[str, Any]:
    memory, clip, held = hollow.memory, backwards.clip_group, list[int]()
    stage: Any = Stage(sizes, mesh)
    found = {"parameters": sum(p.numel() for p in stage.parameters())}
    trained, optimizer = _made(stage, way, batch, shards)
    del stage
    ids = torch.zeros(batch, sizes.context // mesh.cp, dtype=torch.int64)

    def noted(*args: Any, **kwargs: Any) -> Any:
        held.append(memory.live)
        return clip(*args, **kwargs)

    with unittest.mock.patch.object(backwards, "clip_group", noted):
        for _ in range(2):
            found["fixed"] = memory.live
            memory.mark()
            hollow.traffic.clear()
            losses = trained(ids).float().square().mean((1, 2))
            found["forward"] = memory.live - found["fixed"]
            losses.mean().backward()
            del losses
            found |= {"held": held[-1] - found["fixed"] if held else 0, "peak": memory.peak}
            found |= {"gathered": hollow.traffic["allgather_base"], "reduced": hollow.traffic["reduce_scatter_base"]}
            optimizer.step()
            optimizer.zero_grad()
    return found


def _made(stage: Any, way: str, batch: int, shards: Any) -> tuple[Any, Any]:
    """Parameters and sums in float32, products in bfloat16, as FSDP2 mixes them."""
    kind, _, again = way.partition("_")
    if kind == "plain":
        for block in stage.blocks:
            block.compile(backend=compiler, fullgraph=True)
    if again:
        stage.blocks = nn.Sequential(*(checkpoint_wrapper(block) for block in stage.blocks))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in stage.blocks:
        fully_shard(block, mesh=shards, mp_policy=policy)
    fully_shard(stage, mesh=shards, mp_policy=policy)
    if kind == "plain":
        return stage, adamw(stage)
    private = dp_compile(stage, backend="eager")
    return private, DPOptimizer(adamw(stage), private, noise_multiplier=1.0, expected_batch_size=batch, seed=1)
