"""What the ranks of test_pipeline_meshes.py run: ``torchrun tests/workers/meshed_stages_worker.py KIND [CHECK ..]``.

Stages that FSDP2 shards (``dp``), that tensor parallelism cuts (``tp``), or ``both``, on four ranks, of which two are
the pipeline's; checks that are rarer than those of pipeline_worker.py. Each prints its name once it passed, on rank 0.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from features_worker import halves
from launching import run_checks
from pipeline_worker import BLOCKS, MORE, B, Cut, Pipeline, Rooted, V, batch, loss_of, meshed, placed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from dpcompile.module import set_mask


class RootedCut(Rooted):
    """With wide blocks, and a parameter that FSDP2 takes."""

    block = Cut.block

    def __init__(self, first: int = 0, end: int = BLOCKS) -> None:
        super().__init__(first, end)
        if hasattr(self, "bias"):
            self.bias = nn.Parameter(torch.zeros(1))


def mesh_of(kind: str) -> DeviceMesh:
    shape, names = ((2, 1, 2), ("pp", "dp", "tp")) if kind == "both" else ((2, 2), ("pp", kind))
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def pipeline_of(kind: str, mesh: DeviceMesh, schedule: str = "1F1B", chunks: int = 4, **options: object) -> Pipeline:
    make, group = partial(placed, mesh, kind, make=RootedCut), mesh["pp"].get_group()
    return Pipeline(schedule, make=make, group=group, chunks=chunks, **options).optimize(B)  # type: ignore[arg-type]


def not_finite(kind: str) -> None:
    """Weight 0 in all stages, on all ranks."""
    mesh = mesh_of(kind)
    x, y = batch()
    x[:, 0] = x[:, 0].clamp_max(V - 2)
    x[3, 0] = V - 1
    found: list[dict[str, Tensor]] = []
    mine = (lambda t: t.chunk(2)[mesh.get_local_rank("dp")]) if kind == "dp" else (lambda t: t)
    for keep in (torch.ones(B, dtype=torch.bool), torch.arange(B) != 3):
        pipeline = pipeline_of(kind, mesh)
        for part in pipeline.parts:
            set_mask(part, mine(keep))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            pipeline.step(mine(x), mine(y))
        named = {n: p.grad for n, p in pipeline.named().items()}
        found.append({n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in named.items() if g is not None})
    assert found[0]
    for n, grad in found[0].items():
        assert grad.any() and torch.equal(grad, found[1][n]), n


def late_accident(kind: str) -> None:
    """The last stage raises in its third micro-batch, on one rank."""
    mesh, losses = mesh_of(kind), list[Tensor]()

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        losses.append(loss_of(logits, targets))
        if len(losses) == 3 and dist.get_rank() == dist.get_world_size() - 1:
            raise OSError("an accident")
        return losses[-1]

    pipeline_of(kind, mesh, loss=loss).step(*batch())


def killed(kind: str) -> None:
    """The first rank dies before its third forward."""
    pipeline = pipeline_of(kind, mesh_of(kind))
    run = pipeline.stages[0].forward_one_chunk

    def dying(chunk: int, *args: object, **kwargs: object) -> object:
        if chunk == 2 and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(chunk, *args, **kwargs)  # type: ignore[arg-type]

    pipeline.stages[0].forward_one_chunk = dying  # type: ignore[method-assign,assignment]
    pipeline.step(*batch())


def main() -> None:
    """Run the checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    kind, wanted = sys.argv[1], sys.argv[2:]
    checks: dict[str, Callable[[], None]] = {
        **{s: partial(meshed, kind, s) for s in ("InterleavedZeroBubble", *MORE)},
        "a function": partial(meshed, kind, "1F1B", clipping=halves),
        "not finite": partial(not_finite, kind),
    }
    failing = {"late accident": late_accident, "killed": killed}
    if wanted and wanted[0] in failing:
        checks, wanted = {wanted[0]: partial(failing[wanted[0]], kind)}, []
    run_checks(checks, wanted)


if __name__ == "__main__":
    main()
