"""What every rank of ``python -m benchmarks.sharded`` runs: FSDP2 steps by turns, in one process a rank.

Answers come first: clipped sums (or plain sums) of all ranks against one backward per example on the union of their
batches. Then the steps take turns, and a turn takes as long as the slowest rank.
"""

from __future__ import annotations

import functools
import json
import sys
import unittest.mock
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.measure import seconds_of, spread
from benchmarks.oracle import find_truth, how_wrong
from benchmarks.problem import Problem, build
from dpcompile import DPOptimizer, dp_compile

__all__ = ["ENGINES", "main"]


class Sharded:
    """One way to make the gradients of a step, and to update, under FSDP2.

    Args:
        problem: of this rank alone: its own examples.
        mesh: of all ranks.
        backend: of the compiler.
    """

    private = False

    def __init__(self, problem: Problem, mesh: Any, backend: str) -> None:
        self.problem = problem
        self.model: Any = problem.model
        self.optimizer: Any = None
        self.prepare(mesh, backend)

    def prepare(self, mesh: Any, backend: str) -> None:
        """Not private: every block compiled, then sharded."""
        for block in self.model.blocks:
            block.compile(backend="aot_eager" if backend == "eager" else backend, fullgraph=True)
        _plain_sums(_shard(self.model, mesh))
        self.optimizer = _adamw(self.model)

    def backward(self) -> None:
        """Forward and backward."""
        losses = self.problem.case.loss(self.model(self.problem.inputs), self.problem.targets)
        losses.mean().backward()

    def gradient_step(self) -> None:
        """What is timed first: no optimizer in it."""
        self.optimizer.zero_grad()
        self.backward()

    def whole_step(self) -> None:
        """With noise, where it is private, and AdamW."""
        self.gradient_step()
        self.optimizer.step()

    def gradients(self) -> dict[str, Tensor]:
        """Sums over the examples of all ranks."""
        factor = 1 if self.private else self.problem.batch
        found: dict[str, Any] = {n: p.grad for n, p in self.problem.model.named_parameters() if p.grad is not None}
        return {n: grad.full_tensor() * factor for n, grad in found.items()}


class Ours(Sharded):
    """dpcompile: sharded, then compiled."""

    private = True

    def prepare(self, mesh: Any, backend: str) -> None:
        """The order that the documentation gives."""
        _shard(self.model, mesh)
        inner = _adamw(self.model)
        self.model = dp_compile(self.model, max_grad_norm=self.problem.max_grad_norm, backend=backend)
        size = self.problem.batch * dist.get_world_size()
        self.optimizer = DPOptimizer(inner, self.model, noise_multiplier=1.0, expected_batch_size=size, seed=1)


class Opacus(Sharded):
    """Opacus' ghost clipping with its own wrapper: a unit for every layer, two backwards."""

    private = True

    def prepare(self, mesh: Any, backend: str) -> None:
        """As its documentation has it; indices of positions made contiguous, which its norms of embeddings need."""
        from opacus.grad_sample import (  # type: ignore[import-not-found]
            GradSampleModuleFastGradientClippingFSDP,
        )
        from opacus.optimizers import FSDPOptimizerFastGradientClipping  # type: ignore[import-not-found]
        from opacus.utils import fsdp_utils  # type: ignore[import-not-found]

        self.model.rows = True
        self.model.positions.register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
        with unittest.mock.patch.object(fsdp_utils, "fully_shard", functools.partial(fully_shard, mesh=mesh)):
            _plain_sums(fsdp_utils.FSDP2Wrapper(self.model))
        bound: Any = self.problem.max_grad_norm  # an int by its annotation there
        self.model = GradSampleModuleFastGradientClippingFSDP(self.model, max_grad_norm=bound, loss_reduction="mean")
        size = self.problem.batch * dist.get_world_size()
        self.optimizer = FSDPOptimizerFastGradientClipping(
            _adamw(self.model), noise_multiplier=1.0, max_grad_norm=bound, expected_batch_size=size
        )

    def backward(self) -> None:
        """Both backwards are behind the loss's own."""
        from opacus.utils.fast_gradient_clipping_utils import (  # type: ignore[import-not-found]
            DPTensorFastGradientClipping,
        )

        losses = self.problem.case.loss(self.model(self.problem.inputs), self.problem.targets)
        DPTensorFastGradientClipping(self.model, self.optimizer, losses, "mean").backward()

    def gradient_step(self) -> None:
        """It sets gradients to zero unless told."""
        self.optimizer.zero_grad(set_to_none=True)
        self.backward()


ENGINES: dict[str, Callable[..., Sharded]] = {"plain": Sharded, "ours": Ours, "opacus": Opacus}


def _shard(model: Any, mesh: Any) -> Any:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _plain_sums(model: nn.Module) -> None:
    """Sums over the ranks, not means, and nothing that gloo cannot do."""
    module: Any
    for module in model.modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-6)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Errors, and seconds by turns.

    Returns:
        engine -> ``error`` (why there is none) or ``answer_error``, ``gradient`` and ``step`` (minimum and median).
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    whole = build(job["model"], batch=world * job["batch"])
    truth = find_truth(whole)
    found: dict[str, Any] = {"tolerance": truth.tolerance, "engines": {}}
    ready: dict[str, Sharded] = {}
    for name in job["engines"]:
        problem = build(job["model"], batch=world * job["batch"], max_grad_norm=truth.max_grad_norm)
        rows = slice(rank * job["batch"], (rank + 1) * job["batch"])
        own = Problem(problem.case, problem.model, problem.inputs[rows], problem.targets[rows], problem.max_grad_norm)
        try:
            engine = ENGINES[name](own, mesh, job["backend"])
            engine.gradient_step()
            error = how_wrong(engine.gradients(), truth, private=engine.private)
            found["engines"][name] = {"answer_error": error}
            if error <= truth.tolerance:
                ready[name] = engine
            else:
                found["engines"][name]["error"] = f"wrong answer ({error:.1e})"
        except Exception as failure:
            found["engines"][name] = {"error": f"{type(failure).__name__}: {' '.join(str(failure).split())[:160]}"}
    for kind in ("gradient", "step"):
        steps = {n: e.gradient_step if kind == "gradient" else e.whole_step for n, e in ready.items()}
        for step in steps.values():
            step()
        times: dict[str, list[float]] = {n: [] for n in steps}
        for _ in range(job["repeats"]):
            for name, step in steps.items():
                dist.barrier()
                slowest = torch.tensor(seconds_of(step), dtype=torch.float64)
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                times[name].append(slowest.item())
        for name, seconds in times.items():
            found["engines"][name][kind] = spread(seconds)
    return found


def main() -> None:
    """Read the job, do it, and let rank 0 write the result."""
    with open(sys.argv[1]) as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module|Full backward hook")
    dist.init_process_group("gloo")
    result = measure(job)
    if dist.get_rank() == 0:
        with open(job["result"], "w") as file:
            json.dump(result, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
