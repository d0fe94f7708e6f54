"""What every rank of test_meshes.py runs: ``torchrun tests/workers/mesh_worker.py DIRECTORY TASK [MESH OPTION ..]``.

The model is the small Llama of ``examples/train_parallel.py``, placed by that file on the mesh of its options. TASK is
``begin`` (on one rank: leaves its weights after five steps in DIRECTORY), ``train`` (the same steps, with a checkpoint
after two) or ``resume`` (from that checkpoint); these compare their weights. Noise has many times the tolerance.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset

import dpcompile
from dpcompile import DPOptimizer, PoissonLoader
from dpcompile.checkpoint import load_checkpoint, save_checkpoint

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
B, T, STEPS, SAVED, C, SIGMA, RATE = 16, 8, 5, 2, 0.5, 0.5, 1.0
LAYERS, WIDTH = 2, 32


def example() -> Any:
    """The module of the example."""
    sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module("train_parallel")


def options_of(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("dp", "pp", "tp", "cp"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--schedule", default="GPipe")
    return argparse.Namespace(**vars(parser.parse_args(words)), layers=LAYERS, width=WIDTH)


class Run:
    """The part of the model that lies here, in its schedule, with optimizer and loader."""

    def __init__(self, module: Any, options: argparse.Namespace, mesh: DeviceMesh) -> None:
        self.mesh, self.stage, self.stages = mesh, mesh.get_local_rank("pp"), options.pp
        pipeline = {"pipeline": mesh["pp"]} if options.pp > 1 else {}
        compiled: Any = dpcompile.dp_compile
        self.model = compiled(module.placed(options, mesh), max_grad_norm=C, backend="eager", **pipeline)
        self.loss = module.mean_loss
        self.schedule: Any = None
        if options.pp > 1:
            stage = PipelineStage(self.model, self.stage, options.pp, torch.device("cpu"), group=mesh["pp"].get_group())
            self.schedule = getattr(schedules, f"Schedule{options.schedule}")(stage, 2, loss_fn=self.loss)
        inner = torch.optim.SGD(self.model.parameters(), lr=RATE)
        self.optimizer = DPOptimizer(inner, self.model, noise_multiplier=SIGMA, expected_batch_size=B, seed=5)
        ids = torch.randint(0, module.BYTES, (64, T + 1), generator=torch.Generator().manual_seed(1))
        drawn = PoissonLoader(
            TensorDataset(ids[:, :-1], ids[:, 1:]), expected_batch_size=B, physical_batch_size=32 // options.dp,
            steps=STEPS, rank=mesh.get_local_rank("dp"), world_size=options.dp, seed=3,
        )  # fmt: skip
        self.loader = drawn.attach(self.model, self.optimizer)

    def backward(self, ids: torch.Tensor, targets: torch.Tensor) -> None:
        if self.schedule is None:
            self.loss(self.model(ids), targets).backward()
            return
        last = self.stage == self.stages - 1
        self.schedule.step(*((ids,) if self.stage == 0 else ()), **({"target": targets} if last else {}))

    def train(self, directory: Path, *, save: bool) -> None:
        for ids, targets in self.loader.parts():
            self.backward(ids, targets)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if save and self.optimizer.logical_step == SAVED and not self.optimizer.accumulating:
                save_checkpoint(directory / "run", self.model, self.optimizer, self.loader)
        assert self.optimizer.logical_step == STEPS

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole ones, of the layers that lie here."""
        named = {n: p.detach() for n, p in self.model.named_parameters()}
        return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in named.items()}


def main() -> None:
    """Train or go on, and compare."""
    torch.set_num_threads(1)
    directory, task, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    module = example()
    options = options_of(words)
    mesh = module.start(options)
    run = Run(module, options, mesh)
    if task == "resume":
        load_checkpoint(directory / "run", run.model, run.optimizer, run.loader)
        assert run.optimizer.logical_step == SAVED
    run.train(directory, save=task == "train")
    found, stored = run.weights(), directory / "weights.pt"
    if task == "begin":
        torch.save(found, stored)
    wanted = torch.load(stored)
    assert found and found.keys() <= wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"passed: {task}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
