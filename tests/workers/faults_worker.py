"""What every rank of test_faults.py runs: ``torchrun --max-restarts 4 tests/workers/faults_worker.py DIRECTORY``.

Each attempt ends in another fault, on one rank, until the last one: in forward, in backward, in the data, and a rank
that is killed. The last goes on from the checkpoint of the killed one, and compares with a run that never stopped.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from block_models import MLP, D
from sharded_worker import C, alone, dp_compile, full, made, part, raises, same, shard, step
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import Dataset

from dpcompile import DPOptimizer, PoissonLoader, PrivacyAccountant
from dpcompile.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

STEPS, SIZE, RATE = 6, 40, 6 / 40
FAULTS = ("forward", "backward", "data", "kill")
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
fault = FAULTS[attempt] if attempt < len(FAULTS) else None


class Rows(Dataset[Any]):
    """Standard normal rows; one that cannot be read, if asked for."""

    def __init__(self, broken: bool) -> None:
        torch.manual_seed(2)
        self.rows, self.broken = torch.randn(SIZE, D), broken

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor]:
        if self.broken and index > SIZE // 2:
            raise OSError(f"row {index} cannot be read")
        return (self.rows[index],)


def make(mesh: DeviceMesh, broken: bool = False) -> tuple[Any, DPOptimizer, PoissonLoader]:
    model = dp_compile(shard(made(MLP), mesh), max_grad_norm=C, backend="eager")
    accountant = PrivacyAccountant(noise_multiplier=0.5, sample_rate=RATE)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = DPOptimizer(inner, model, noise_multiplier=0.5, expected_batch_size=6, seed=7, accountant=accountant)
    ranks: dict[str, Any] = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    loader = PoissonLoader(Rows(broken), expected_batch_size=6, physical_batch_size=8, steps=STEPS, seed=3, **ranks)
    return model, optimizer, loader.attach(model, optimizer)


def train(model: Any, optimizer: DPOptimizer, loader: PoissonLoader, after: Callable[[int], None]) -> None:
    for (x,) in loader:
        step(model, x)
        optimizer.step()
        optimizer.zero_grad()
        if not optimizer.accumulating:
            after(optimizer.logical_step)


def faulty(mesh: DeviceMesh, directory: Path) -> None:
    """A run that ends on rank 1, in its fourth step or where the data break."""
    mine = dist.get_rank() == 1
    model, optimizer, loader = make(mesh, broken=fault == "data" and mine)

    def after(done: int) -> None:
        if fault == "kill" and done == 3:
            save_checkpoint(directory / f"step_{done}", model, optimizer, loader)
        elif mine and done == 4:
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            breaks(model, fault)

    train(model, optimizer, loader, after)


def breaks(model: Any, where: str | None) -> None:
    """From now on a gradient, or a value, of a block in the middle raises."""
    layer = model.layers[2]

    class Raise(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise RuntimeError("a fault in backward")

    original = type(model).__call__

    def call(self: nn.Module, x: Tensor) -> Tensor:
        if where == "forward":
            with broken_forward(layer):
                return original(self, x)
        out = original(self, x)
        return Raise.apply(out) if where == "backward" else out  # type: ignore[return-value]

    type(model).__call__ = call  # type: ignore[method-assign]


@contextmanager
def broken_forward(layer: nn.Module) -> Iterator[None]:
    """The unit's own all-gather fails: what runs around the compiled graphs."""
    state: Any = layer._get_fsdp_state()  # type: ignore[operator]
    group = state._fsdp_param_group
    unshard = group.unshard

    def raises(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a fault in forward")

    group.unshard = raises
    try:
        yield
    finally:
        group.unshard = unshard


def resumed(mesh: DeviceMesh, directory: Path) -> None:
    """From the last checkpoint to the end: weights and epsilon of the run that never stopped."""
    (directory / "step_9").mkdir(exist_ok=True)  # a checkpoint whose saving was cut short
    dist.barrier()
    path = latest_checkpoint(directory)
    assert path is not None and path == directory / "step_3", path
    model, optimizer, loader = make(mesh)
    load_checkpoint(path, model, optimizer, loader)
    train(model, optimizer, loader, lambda done: None)
    whole, straight, draws = make(mesh)
    train(whole, straight, draws, lambda done: None)
    assert optimizer.logical_step == straight.logical_step == STEPS
    for (name, p), q in zip(whole.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q[1].full_tensor()), name
    accountant = PrivacyAccountant(noise_multiplier=0.5, sample_rate=RATE)
    accountant.step(STEPS)
    assert optimizer.accountant is not None
    assert optimizer.accountant.epsilon(1e-5) == accountant.epsilon(1e-5)
    raises(Exception, "holds a checkpoint already", lambda: save_checkpoint(path, model, optimizer, loader))


def caught(mesh: DeviceMesh) -> None:
    """All ranks fail alike and go on: the next step is that of a model that never failed, with the new weights."""
    x = torch.randn(8, D)
    for where in ("forward", "backward", "own"):
        single = made(MLP)
        model = dp_compile(shard(made(MLP), mesh), max_grad_norm=C, backend="eager")
        inner = torch.optim.SGD(model.parameters(), lr=0.5)
        optimizer = DPOptimizer(inner, model, noise_multiplier=0.0, expected_batch_size=8, seed=7)
        step(model, part(x))

        def fail(model: Any = model, where: str = where) -> None:
            if where == "forward":
                with broken_forward(model.layers[2]):
                    model(part(x))
            elif where == "own":
                model(part(x)[:, :-1])
            else:
                out = model(part(x))
                out.register_hook(failing)
                out.sum().backward()

        raises(Exception, "" if where == "own" else f"a fault in {where}", fail)
        optimizer.step()
        optimizer.zero_grad()
        step(model, part(x))
        sums, _ = alone(single, x)
        with torch.no_grad():
            for name, p in single.named_parameters():
                p -= 0.5 * sums[name] / 8
        single.zero_grad()
        same(full(model), alone(single, x)[0])


def failing(grad: Tensor) -> Tensor:
    raise RuntimeError("a fault in backward")


def main() -> None:
    """Fail, or resume."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    directory = Path(sys.argv[1])
    if fault is not None:
        faulty(mesh, directory)
        raise AssertionError(f"no fault in {fault}")
    resumed(mesh, directory)
    torch.manual_seed(2)
    caught(mesh)
    if dist.get_rank() == 0:
        print("passed: resumed, caught", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
