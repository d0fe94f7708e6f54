"""One training step of a large model without content, by several ways of training: memory and communication."""

from __future__ import annotations

import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.scale.hollow import Hollow, fake_ranks
from benchmarks.scale.models import CASES, Large
from dpcompile import DPOptimizer, dp_compile
from dpcompile.graph.compile import compile_joint
from dpcompile.kernels import gaussian as native
from dpcompile.noise import normal as noise
from dpcompile.optim import common

__all__ = ["WAYS", "Way", "adamw", "as_on_a_gpu", "compiler", "no_talk", "size"]


def compiler(graph: Any, inputs: Any) -> Any:
    """A backend that decomposes and partitions as Inductor does, and runs the graphs as they are."""
    return compile_joint(graph, inputs, backend="eager", transform=lambda joint: None, key="")


@dataclass(frozen=True, slots=True)
class Way:
    """A way to train.

    Attributes:
        title: in tables.
        sharded: with FSDP2, a unit per block and one for the rest; otherwise every rank holds everything.
        private: with clipping and noise.
        prepare: makes a trainer from case, model and mesh (None without sharding).
    """

    title: str
    sharded: bool
    private: bool
    prepare: Callable[[Large, nn.Module, Any], Trainer]


@dataclass(slots=True)
class Trainer:
    """What takes steps.

    Attributes:
        model: to call.
        optimizer: to step.
        backward: of the losses of the examples ``[B]``.
    """

    model: Any
    optimizer: Any
    backward: Callable[[Tensor], None] = lambda losses: losses.mean().backward()


def size(case: str, way: str, ranks: int, depth: int | None = None, batch: int | None = None) -> dict[str, Any]:
    """Bytes on rank 0, and collectives, of the second step; the first makes the optimizer's state.

    Returns:
        ``parameters``, ``trainable`` (numbers of elements in the whole model), ``init``, ``forward``, ``backward``
        and ``step`` (live bytes after each), ``backward_peak`` (of forward and backward together), ``step_peak``,
        ``calls`` and ``bytes`` of the collectives of forward and backward, by name.
    """
    large = CASES[case]
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    torch.compiler.reset()
    with fake_ranks(ranks):
        mesh = init_device_mesh("cpu", (ranks,))
        with Hollow() as hollow, as_on_a_gpu(), no_talk():
            return _size(large, WAYS[way], hollow, mesh, depth or large.depth, batch or large.batch)


def _size(large: Large, way: Way, hollow: Hollow, mesh: Any, depth: int, batch: int) -> dict[str, Any]:
    memory = hollow.memory
    model = large.make(depth)
    own = list(model.parameters())
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in own),
        "trainable": sum(p.numel() for p in own if p.requires_grad),
        "depth": depth,
        "batch": batch,
    }
    del own
    trainer = way.prepare(large, model, mesh if way.sharded else None)
    del model
    inputs, targets = large.data(batch, large.context)
    found["init"] = memory.live
    for _ in range(2):
        memory.mark()
        hollow.collectives.clear()
        hollow.traffic.clear()
        losses = large.loss(trainer.model(inputs), targets)
        found["forward"] = memory.live
        trainer.backward(losses)
        del losses
        found |= {"backward": memory.live, "backward_peak": memory.peak}
        found |= {"calls": dict(hollow.collectives), "bytes": dict(hollow.traffic)}
        memory.mark()
        trainer.optimizer.step()
        found |= {"step": memory.live, "step_peak": memory.peak, "step_bytes": _above(hollow, found)}
        trainer.optimizer.zero_grad()
    return found


def _above(hollow: Hollow, found: dict[str, Any]) -> int:
    """Bytes of collectives since the backward."""
    return sum(hollow.traffic.values()) - sum(found["bytes"].values())


# --- ways ------------------------------------------------------------------------------------------------------------


def sharded(model: Any, mesh: Any) -> Any:
    """FSDP2 with a unit per block and one for the rest."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """As on a GPU, where it works on all parameters at once by default."""
    return torch.optim.AdamW(_trained(model), foreach=True)


def _plain(large: Large, model: Any, mesh: Any) -> Trainer:
    for block in model.blocks:
        block.compile(backend=compiler, fullgraph=True)
    if mesh is not None:
        for module in sharded(model, mesh).modules():
            if hasattr(module, "set_force_sum_reduction_for_comms"):
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
    return Trainer(model, adamw(model))


def _ours(*, recompute: bool = False, **options: Any) -> Callable[[Large, nn.Module, Any], Trainer]:
    def prepare(large: Large, model: Any, mesh: Any) -> Trainer:
        if recompute:
            model.blocks = nn.Sequential(*(checkpoint_wrapper(block) for block in model.blocks))
        if mesh is not None:
            sharded(model, mesh)
        private = dp_compile(model, backend="eager", regions=None if mesh is not None else "blocks", **options)
        optimizer = DPOptimizer(adamw(model), private, noise_multiplier=1.0, expected_batch_size=large.batch, seed=1)
        return Trainer(private, optimizer)

    return prepare


def _twice(large: Large, model: Any, mesh: Any) -> Trainer:
    """Two backwards through one graph, as published: the first one's gradients are dropped."""
    trainer = _plain(large, model, mesh)

    def backward(losses: Tensor) -> None:
        losses.mean().backward(retain_graph=True)
        trainer.optimizer.zero_grad()
        (losses * torch.ones_like(losses.detach())).sum().backward()

    trainer.backward = backward
    return trainer


def _opacus(large: Large, model: Any, mesh: Any) -> Trainer:
    from benchmarks.scale.opacus import prepare

    if mesh is not None:
        sharded(model, mesh)
    return Trainer(*prepare(large, _trained(model), sharded=mesh is not None))


WAYS = {
    "plain": Way("not private, FSDP2", True, False, _plain),
    "ours": Way("dpcompile, FSDP2, norm='ghost'", True, True, _ours(norm="ghost")),
    "ours_auto": Way("dpcompile, FSDP2, quickest plan", True, True, _ours()),
    "two_pass": Way("dpcompile, FSDP2, norm='two_pass'", True, True, _ours(norm="two_pass")),
    "two_pass_again": Way(
        "dpcompile, FSDP2, norm='two_pass', checkpointed blocks", True, True, _ours(norm="two_pass", recompute=True)
    ),
    "twice": Way("two backwards, FSDP2", True, True, _twice),
    "opacus": Way("Opacus' optimizer, FSDP2", True, True, _opacus),
    "plain_whole": Way("not private, replicated", False, False, _plain),
    "ours_whole": Way("dpcompile, replicated, norm='ghost'", False, True, _ours(norm="ghost")),
    "opacus_whole": Way("Opacus' optimizer, replicated", False, True, _opacus),
}


# --- the setting -----------------------------------------------------------------------------------------------------


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Noise by torch operations in pieces of a GPU's size, not by the C++ kernel, which writes memory."""
    with (
        unittest.mock.patch.object(native, "takes", lambda tensors: False),
        unittest.mock.patch.object(noise, "_SCRATCH_CPU", noise._SCRATCH),
    ):
        yield


@contextmanager
def no_talk() -> Iterator[None]:
    """Without the comparison of seed, sigma and C before the first step: there is nobody to compare with."""
    with unittest.mock.patch.object(common, "refuse_disagreement"):
        yield
