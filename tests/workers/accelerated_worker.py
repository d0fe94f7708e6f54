"""What every rank of tests/integrations/test_accelerate.py runs: ``torchrun tests/workers/accelerated_worker.py``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from launching import run_checks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import dpcompile
from dpcompile.integrations.accelerate import make_private

OPTIONS: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "seed": 5, "backend": "eager"}
OPTIONS |= {"physical_batch_size": 4}


def parts() -> tuple[nn.Module, torch.optim.Optimizer, DataLoader]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    data = TensorDataset(torch.randn(48, 6), torch.randint(0, 3, (48,)))
    return net, torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9), DataLoader(data, 8, shuffle=True)


def train(model: Any, optimizer: Any, loader: Any, accelerator: Accelerator | None, batches: int) -> None:
    taken = 0
    while taken < batches:
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            loss.backward() if accelerator is None else accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            taken += 1
            if taken == batches:
                break


def alone() -> nn.Module:
    """One process, on the draws of all: the loader is told that there is one."""
    net, optimizer, loader = parts()
    draws = dpcompile.PoissonLoader.from_dataloader(loader, physical_batch_size=4, seed=5, rank=0, world_size=1)
    options: dict[str, Any] = {**OPTIONS, "physical_batch_size": None}
    train(*dpcompile.make_private(net, optimizer, draws, **options), None, 12)
    return net


def close(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.allclose(p, q, rtol=1e-4, atol=1e-6) for p, q in zip(a.parameters(), b.parameters(), strict=True))


ACCELERATOR = Accelerator(cpu=True)


def weights() -> None:
    for prepared in (False, True):
        given: Any = parts()
        net = given[0]
        given = ACCELERATOR.prepare(*given) if prepared else given
        model, optimizer, loader = make_private(ACCELERATOR, *given, **OPTIONS)
        assert isinstance(model, DistributedDataParallel)
        train(model, optimizer, loader, ACCELERATOR, 12)
        assert optimizer.optimizer.accountant.steps == 12 and close(net, alone()), prepared
        ACCELERATOR.free_memory()
        ACCELERATOR._custom_objects.clear()


def states() -> None:
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    path = Path(folder[0]) / "state"
    given = make_private(ACCELERATOR, *parts(), **OPTIONS)
    train(*given, ACCELERATOR, 4)
    ACCELERATOR.save_state(str(path))
    dist.barrier()
    ACCELERATOR.free_memory()
    ACCELERATOR._custom_objects.clear()
    model, optimizer, loader = make_private(ACCELERATOR, *parts(), **{**OPTIONS, "seed": 6})
    ACCELERATOR.load_state(str(path))
    train(model, optimizer, loader, ACCELERATOR, 8)
    assert close(ACCELERATOR.unwrap_model(model), alone())


CHECKS = {"weights": weights, "states": states}

if __name__ == "__main__":
    run_checks(CHECKS, sys.argv[1:])
