"""What every rank of tests/auditing/test_audit.py runs: an audit of a model under DistributedDataParallel."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from audited import BROKEN, D, losses, wide
from launching import run_checks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from dpcompile import PoissonLoader, audit, dp_compile, make_private
from dpcompile.auditing.report import AuditReport
from dpcompile.distributed.ranks import gathered


def report(world: int, rank: int, seed: int | None = 1) -> AuditReport:
    torch.manual_seed(2)
    dataset = TensorDataset(torch.randn(8, D), torch.randint(0, D, (8,)))
    model = dp_compile(wide(), backend="eager")
    model = DistributedDataParallel(model) if world > 1 else model
    loader = PoissonLoader(
        dataset, expected_batch_size=8, sample_rate=1.0, physical_batch_size=64, steps=8, seed=0,
        rank=rank, world_size=world,
    )  # fmt: skip
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    given = make_private(model, inner, loader, noise_multiplier=2.0, seed=1)
    return audit(*given, losses, canaries=400, seed=seed)


def right() -> None:
    """As on one rank, and the same on all."""
    found = report(2, dist.get_rank())
    assert found == report(1, 0) and not found.contradicted and found.epsilon > 4
    drawn = gathered(report(2, dist.get_rank(), seed=None))
    assert drawn[0] == drawn[1] != found


def half_the_noise() -> None:
    with pytest.MonkeyPatch.context() as patch:
        BROKEN["half_the_noise"](patch)
        assert report(2, dist.get_rank()).contradicted


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="two DPOptimizers of one seed")
    dist.init_process_group("gloo")
    run_checks({"right": right, "half the noise": half_the_noise}, sys.argv[1:])
