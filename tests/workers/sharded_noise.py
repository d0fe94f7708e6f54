"""Noise as it arrives in sharded weights: checks of tests/workers/sharded_worker.py.

All weights are 0 and all gradients are 0, so that a step of SGD with learning rate 1 leaves ``-noise / batch size`` in
every weight, and what stands there after it, times ``-batch size / (sigma C)``, must be standard normal.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import dpcompile
from dpcompile import DPOptimizer

D, STEPS = 64, 4
SIGMA, C, BATCH = 0.7, 0.5, 8


def trainer(mesh: DeviceMesh | None, loss_reduction: str = "mean") -> tuple[Any, DPOptimizer]:
    model: Any = nn.Sequential(nn.Linear(D, D, bias=False), nn.Tanh(), nn.Linear(D, D, bias=False))
    if mesh is not None:
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    make: Any = dpcompile.dp_compile
    private = make(model, max_grad_norm=C, backend="eager", loss_reduction=loss_reduction)
    inner = torch.optim.SGD(private.parameters(), lr=1.0)
    return private, DPOptimizer(inner, private, noise_multiplier=SIGMA, expected_batch_size=BATCH, seed=11)


def steps(private: Any, optimizer: DPOptimizer, loss_reduction: str = "mean", times: int = 1) -> list[list[Tensor]]:
    """Standardised noise of every step and parameter, what of it lies here; ``times`` backwards a step."""
    found = []
    for _ in range(STEPS):
        with torch.no_grad():
            for p in private.parameters():
                getattr(p, "to_local", lambda p=p: p)().zero_()
        for i in range(times):
            losses = private(torch.randn(2, D)).sum(1) * 0
            getattr(losses, loss_reduction)().backward()
            optimizer.accumulating = i < times - 1
            optimizer.step()
            optimizer.zero_grad()
        here = [getattr(p, "to_local", lambda p=p: p)().detach() for p in private.parameters()]
        found.append([w.flatten() * (-BATCH / (SIGMA * C)) for w in here])
    return found


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def independent(rows: Tensor) -> None:
    """No two rows, nor their squares, are correlated; the bound is 5 standard deviations."""
    rows = rows.double()
    for values in (rows, rows.square()):
        off = torch.corrcoef(values) - torch.eye(len(rows), dtype=rows.dtype)
        assert off.abs().max() < 5 / math.sqrt(rows.shape[1]), f"noise is correlated: {off.abs().max():.2f}"


def standard(values: Tensor) -> None:
    """Mean 0 and variance 1, within 5 standard deviations."""
    values, n = values.double(), values.numel()
    assert abs(values.mean().item()) < 5 / math.sqrt(n), values.mean()
    assert abs(values.var().item() - 1) < 5 * math.sqrt(2 / n), f"variance {values.var():.3f} of sigma^2 C^2"


def noise(mesh: DeviceMesh, directory: Path) -> None:
    """Independent between ranks, steps and parameters; of variance sigma^2 C^2 once; the same for any world size."""
    here = steps(*trainer(mesh))
    parts = everywhere(here)
    independent(torch.stack([p for rank in parts for step in rank for p in step]))
    whole = [torch.cat([rank[i][j] for rank in parts]) for i in range(STEPS) for j in range(2)]
    standard(torch.cat(whole))
    if dist.get_rank() == 0:
        torch.save({str(i): w for i, w in enumerate(whole)}, directory / f"noise_{dist.get_world_size()}.pt")
    for reduction, times in (("sum", 1), ("mean", 3), ("sum", 2)):
        other = everywhere(steps(*trainer(mesh, reduction), reduction, times))
        again = [torch.cat([rank[i][j] for rank in other]) for i in range(STEPS) for j in range(2)]
        assert all(map(torch.equal, again, whole)), f"{reduction}, {times} backwards: other noise"


def replicas(mesh: DeviceMesh) -> None:
    """On replicate x shard: replicas have the same bits, shards have not."""
    here = steps(*trainer(mesh))
    bits = hashlib.sha256(b"".join(p.numpy().tobytes() for step in here for p in step)).hexdigest()
    found = everywhere((mesh.get_local_rank(1), bits))
    by_shard: dict[int, set[str]] = {}
    for shard, digest in found:
        by_shard.setdefault(shard, set()).add(digest)
    assert all(len(digests) == 1 for digests in by_shard.values()), "replicas differ"
    assert len(set.union(*by_shard.values())) == len(by_shard), "shards have the same noise"
