"""What the ranks of test_token_stages.py run: ``torchrun tests/workers/token_stages_worker.py [CHECK ..]``.

Stages whose tensors are cut over tokens, as torchtitan lays them out: on four ranks a pipeline of two by sequence
parallelism over two, on eight with FSDP2 besides. Each check prints its name once it passed, on rank 0.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from launching import run_checks
from pipeline_worker import Pipeline, compare, oracle, whole_model
from sequence_worker import block_styles
from tensor_worker import Block
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from two_axes_worker import Block as LlamaBlock
from two_axes_worker import Llama, Placed, laid

from dpcompile.module import engine_of

B, T, D, V, BLOCKS = 8, 4, 8, 12, 4
SCHEDULES = "GPipe", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"
ENDS = "cut", "whole"  # what stages hand on


class Stage(nn.Module):
    """An embedding, blocks of attention and a network with the names that they have in the whole model, a head."""

    def __init__(self, first: int = 0, end: int = BLOCKS) -> None:
        super().__init__()
        torch.manual_seed(2)
        tokens, blocks = nn.Embedding(V, D), [Block() for _ in range(BLOCKS)]
        norm, head = nn.LayerNorm(D), nn.Linear(D, V)
        if first == 0:
            self.tokens = tokens
        self.blocks = nn.ModuleDict({str(i): blocks[i] for i in range(first, end)})
        if end == BLOCKS:
            self.norm, self.head = norm, head

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.tokens(x) if hasattr(self, "tokens") else x
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.norm(x)) if hasattr(self, "head") else x


def cut(mesh: DeviceMesh, ends: str, first: int, end: int, make: Callable[[int, int], Stage] = Stage) -> Stage:
    """A stage whose norms see cut tokens, and whose layers between them gather and scatter."""
    model = make(first, end)
    blocks = list(model.blocks.values())
    for block in blocks:
        parallelize_module(block, mesh, block_styles())
    if first == 0:
        ids = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
        parallelize_module(model, mesh, {"tokens": ids})
    elif ends == "whole":
        divide = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True)
        parallelize_module(blocks[0], mesh, divide)
    if end == BLOCKS:
        logits = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
        parallelize_module(model, mesh, {"norm": SequenceParallel(), "head": logits})
    elif ends == "whole":
        gather = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate(), use_local_output=True)
        parallelize_module(blocks[-1], mesh, gather)
    return model


def placed(dp: DeviceMesh | None, tp: DeviceMesh, ends: str, first: int, end: int) -> nn.Module:
    model = cut(tp, ends, first, end)
    if dp is not None:
        for block in model.blocks.values():
            fully_shard(block, mesh=dp)
        fully_shard(model, mesh=dp)
    return model


class Stretch(Llama):
    """A stage of a Llama on a mesh of ``cp`` × ``tp``."""

    def __init__(self, first: int = 0, end: int = BLOCKS) -> None:
        super().__init__()
        torch.manual_seed(2)
        blocks = [LlamaBlock() for _ in range(BLOCKS)]
        del self.blocks
        self.tok, self.norm, self.head = (nn.Parameter(torch.randn(*shape) / 2) for shape in ((V, D), (D,), (V, D)))
        self.blocks: Any = nn.ModuleDict({str(i): blocks[i] for i in range(first, end)})
        if first:
            del self.tok
        if end < BLOCKS:
            del self.norm, self.head

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.embedded(x) if hasattr(self, "tok") else x
        for block in self.blocks.values():
            x = block(x)
        return self.logits(x) if hasattr(self, "head") else x


def on_two_axes(both: DeviceMesh, first: int, end: int, *, over_tokens: bool) -> nn.Module:
    """Whole weights see tokens that are cut over ``cp``, and over ``tp`` too if ``over_tokens``."""
    model = Stretch(first, end)
    for module in model.modules():
        if isinstance(module, Placed):
            module.cut_over_tokens = over_tokens
    return laid(model, both)


class Forgotten(Stage):
    """A norm behind the border, which takes the cut tokens for whole ones."""

    def __init__(self, first: int = 0, end: int = BLOCKS) -> None:
        super().__init__(first, end)
        if first:
            self.before = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return super().forward(self.before(x) if hasattr(self, "before") else x)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randint(0, V, (2 * B, T)), torch.randint(0, V, (2 * B, T))


@dataclass
class Case:
    """How stages are made, of which model, on which ranks.

    Attributes:
        make: a stage, from its first block to its end.
        whole: the model on one rank.
        group: of the pipeline.
        dp: FSDP2's ranks.
    """

    make: Callable[[int, int], nn.Module]
    whole: Callable[[], nn.Module]
    group: Any
    dp: DeviceMesh | None = None

    def part(self, x: Tensor) -> Tensor:
        return x if self.dp is None else x.chunk(2)[self.dp.get_local_rank()]


@cache
def mesh_of(*names: str) -> DeviceMesh:
    """Two ranks along each dimension; one for all checks, as torch would take another one for the same."""
    return init_device_mesh("cpu", (2,) * len(names), mesh_dim_names=names)


def sequence(ends: str) -> Case:
    """Sequence parallelism: on eight ranks with FSDP2."""
    if dist.get_world_size() == 4:
        mesh = mesh_of("pp", "tp")
        return Case(partial(placed, None, mesh["tp"], ends), Stage, mesh["pp"].get_group())
    mesh = mesh_of("pp", "dp", "tp")
    return Case(partial(placed, mesh["dp"], mesh["tp"], ends), Stage, mesh["pp"].get_group(), mesh["dp"])


def two_axes(*, over_tokens: bool) -> Case:
    """Tensor and context parallelism, on eight ranks."""
    mesh = mesh_of("pp", "cp", "tp")
    return Case(partial(on_two_axes, mesh["cp", "tp"], over_tokens=over_tokens), Stretch, mesh["pp"].get_group())


def gradients(case: Case, schedule: str = "1F1B", **options: Any) -> None:
    """Norms and clipped sums are those of one backward for each example."""
    pipeline = Pipeline(schedule, make=case.make, group=case.group, **options).optimize(2 * B)
    x, y = batch()
    norms, sums = oracle(x, y, options.get("examples_per_user", 1), make=case.whole)
    pipeline.step(case.part(x), case.part(y))
    for stage in pipeline.parts:
        torch.testing.assert_close(engine_of(stage).row_norms, case.part(norms), rtol=1e-5, atol=1e-6)
    assert len(sums) >= len(pipeline.named()) > 0
    for n, p in pipeline.named().items():
        assert p.grad is not None, n
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(grad * 2 * B, sums[n], rtol=1e-5, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")


def training(case: Case, schedule: str = "1F1B", steps: int = 3, **options: Any) -> None:
    """Weights after steps with noise are those of one rank."""
    pipeline = Pipeline(schedule, make=case.make, group=case.group, sigma=0.5, adam=True, **options).optimize(2 * B)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two optimizers of one seed
        model, _, alone_step = whole_model(case.whole, **options)
        for _ in range(steps):
            x, y = batch()
            pipeline.step(case.part(x), case.part(y))
            pipeline.check_held()
            pipeline.clear()
            alone_step(x, y)
    compare(pipeline, model)


def forgotten() -> None:
    """Only the ranks of the second stage see it; the others wait, and end with them."""
    mesh = mesh_of("pp", "tp")

    def make(first: int, end: int) -> nn.Module:
        return cut(mesh["tp"], "cut", first, end, Forgotten)

    Pipeline("1F1B", make=make, group=mesh["pp"].get_group()).optimize(2 * B).step(*batch())


def main() -> None:
    """Run the checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_world_size() == 4:
        checks: dict[str, Callable[[], None]] = {
            **{f"gradients, {ends}": lambda ends=ends: gradients(sequence(ends)) for ends in ENDS},
            **{s: lambda s=s: training(sequence("cut"), s) for s in SCHEDULES},
            "regions": lambda: gradients(sequence("cut"), regions="blocks"),
            "inductor": lambda: gradients(sequence("cut"), backend="inductor"),
            "users": lambda: gradients(sequence("cut"), examples_per_user=2),
            "automatic": lambda: training(sequence("cut"), clipping="automatic"),
        }
    else:
        checks = {
            "FSDP2": lambda: gradients(sequence("cut")),
            "FSDP2, noise": lambda: training(sequence("cut")),
            "tensor and context": lambda: gradients(two_axes(over_tokens=False)),
            "tensor, sequence and context": lambda: gradients(two_axes(over_tokens=True)),
        }
    if sys.argv[1:] == ["forgotten"]:
        checks = {"forgotten": forgotten}
    run_checks(checks, sys.argv[1:])


if __name__ == "__main__":
    main()
