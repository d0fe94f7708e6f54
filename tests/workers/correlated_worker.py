"""What every rank of tests/distributed/test_correlated_ranks.py runs, with a directory.

The same for noise of the last steps ("bands"), and for noise over a pass, in a "tree" or by "buffers".
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launching import run_checks
from sharded_worker import C, T, V, dp_compile, gpt, made, shard, step
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from dpcompile import PoissonLoader, make_private
from dpcompile.checkpoint import load_checkpoint, save_checkpoint

STEPS, SAVED = 11, 4
# Options of the loader and of make_private; what is counted after SAVED and STEPS steps.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, int]]] = {
    "bands": ({"bands": 3}, {}, (2, 4)),
    "tree": ({"in_turn": True}, {"in_turn": "tree"}, (1, 2)),  # passes of ten steps
    "buffers": ({"in_turn": True}, {"in_turn": "buffers"}, (1, 2)),
}


def parts(model: Any, kind: str, ranks: bool) -> Any:
    """Model, optimizer and loader of the run; all of it on this rank, or its part."""
    torch.manual_seed(5)
    data = TensorDataset(torch.randint(0, V, (40, T)))
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    where: dict[str, Any] = {"rank": dist.get_rank(), "world_size": dist.get_world_size()} if ranks else {}
    of_loader, options, _ = KINDS[kind]
    loader = PoissonLoader(data, expected_batch_size=4, steps=STEPS, seed=3, **of_loader, **where)
    return make_private(model, inner, loader, noise_multiplier=0.5, seed=7, **options)


def train(model: Any, optimizer: Any, loader: Any, stop: int = STEPS) -> dict[str, Tensor]:
    for n, (x,) in enumerate(loader, 1):
        step(model, x)
        optimizer.step()
        optimizer.zero_grad()
        if n == stop:
            break
    named = [(name.removeprefix("module."), p.detach()) for name, p in model.named_parameters()]
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.clone() for name, p in named}


def compiled(model: Any) -> Any:
    return dp_compile(model, max_grad_norm=C, backend="eager")


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


def correlated(kind: str, directory: Path) -> None:
    """Shards and replicas come to the weights of one process; so does what is resumed from shards, on any ranks."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    wanted = train(*parts(compiled(made(gpt)), kind, ranks=False)) if world == 1 else None
    path, counts = directory / f"saved {kind}", KINDS[kind][2]
    if wanted is None:
        wanted = torch.load(directory / f"{kind}.pt")
    else:
        torch.save(wanted, directory / f"{kind}.pt")
    same(train(*parts(compiled(shard(made(gpt), mesh)), kind, ranks=True)), wanted)
    same(train(*parts(DistributedDataParallel(compiled(made(gpt))), kind, ranks=True)), wanted)
    if not (path / ".metadata").exists():
        model, optimizer, loader = parts(compiled(shard(made(gpt), mesh)), kind, ranks=True)
        train(model, optimizer, loader, stop=SAVED)
        optimizer.discard()
        save_checkpoint(path, model, optimizer, loader)
    dist.barrier()
    for plain in (shard(made(gpt), mesh), None):
        private = DistributedDataParallel(compiled(made(gpt))) if plain is None else compiled(plain)
        model, optimizer, loader = parts(private, kind, ranks=True)
        load_checkpoint(path, model, optimizer, loader)
        assert (optimizer.logical_step, optimizer.accountant.steps) == (SAVED, counts[0])
        same(train(model, optimizer, loader), wanted)
        assert (optimizer.logical_step, optimizer.accountant.steps) == (STEPS, counts[1])


def main() -> None:
    """Run the check."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run_checks({kind: lambda kind=kind: correlated(kind, Path(sys.argv[1])) for kind in KINDS})


if __name__ == "__main__":
    main()
