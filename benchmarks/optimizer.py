"""What noise costs an optimizer step: DPOptimizer with AdamW against the same AdamW, compiled, without privacy.

``python -m benchmarks.optimizer [--parameters 100000000] [--tensors 20] [--steps 7]``. Answers first, then times, both
sides interleaved in one process; the smallest and the median of each, their ratios, and the memory of a private step.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpcompile import DPOptimizer, dp_compile
from dpcompile.noise.normal import gaussian

EXPECTED = 1000.0
STEP: Any = {"lr": 1e-3, "weight_decay": 0.01}


class Parameters(nn.Module):
    """Parameters, and a loss that uses each: what the optimizer step sees of a model."""

    def __init__(self, total: int, tensors: int) -> None:
        super().__init__()
        self.values = nn.ParameterList(torch.randn(total // tensors) for _ in range(tensors))

    def forward(self, x: Tensor) -> Tensor:
        """``[B] -> [B]``; never run."""
        return x * torch.stack([v.sum() for v in self.values]).sum()


def private(model: nn.Module, sigma: float) -> tuple[DPOptimizer, Callable[..., None]]:
    """The optimizer, and what puts the last gradients back as if a clipped backward had just delivered them."""
    wrapped = dp_compile(model, backend="eager")
    optimizer = DPOptimizer(
        torch.optim.AdamW(model.parameters(), **STEP),
        wrapped,
        noise_multiplier=sigma,
        expected_batch_size=EXPECTED,
        seed=1,
    )
    ledger, names = optimizer.engine.ledger, list(optimizer.engine.parameters())
    tasks = iter(range(10**9))

    def deliver(sums: list[Tensor] | None = None) -> None:
        sums = sums or [p.grad for p in model.parameters() if p.grad is not None]
        for p in model.parameters():
            p.grad = None
        ledger.clear()
        ledger.deliver(zip(names, sums, strict=True), graph_task=next(tasks))

    return optimizer, deliver


def compare(tensors: int) -> None:
    """Raise unless the private step is AdamW's: on the sums without noise, and on sums with noise from torch."""
    for sigma in (0.0, 1.0):
        torch.manual_seed(0)
        ours, theirs = Parameters(1000 * tensors, tensors), Parameters(1000 * tensors, tensors)
        theirs.load_state_dict(ours.state_dict())
        plain = torch.optim.AdamW(theirs.parameters(), **STEP)
        optimizer, deliver = private(ours, sigma)
        for step in range(2):
            sums = [torch.randn_like(p) for p in ours.parameters()]
            for i, (p, total) in enumerate(zip(theirs.parameters(), sums, strict=True)):
                p.grad = (total + sigma * gaussian(1, step=step, parameter=i, numel=total.numel())) / EXPECTED
            plain.step()
            deliver(sums)
            optimizer.step()
        worst = max((a - b).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        print(f"noise multiplier {sigma}: weights differ by at most {worst:.1e} after two steps of size {STEP['lr']}")
        if worst > 2e-6:
            raise SystemExit("the answers differ")


def main() -> None:
    """Compare, then measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--tensors", type=int, default=20)
    parser.add_argument("--steps", type=int, default=7)
    options = parser.parse_args()
    compare(min(options.tensors, 50))

    ours, theirs = (Parameters(options.parameters, options.tensors) for _ in range(2))
    optimizer, deliver = private(ours, 1.0)
    deliver([torch.randn_like(p) for p in ours.parameters()])
    optimizer.step()
    plain = torch.optim.AdamW(theirs.parameters(), **STEP)
    fused = torch.optim.AdamW(theirs.parameters(), **STEP, fused=True)
    for group in plain.param_groups:
        group["lr"] = torch.tensor(group["lr"])  # a number would be compiled in
    for p in theirs.parameters():
        p.grad = torch.randn_like(p)
    compiled = torch.compile(plain.step)
    steps = {"compiled AdamW": compiled, "AdamW(fused=True)": fused.step, "private": optimizer.step}
    for _ in range(2):
        for run in steps.values():
            deliver()
            run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.steps):
        for name, run in steps.items():
            deliver()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    deliver()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages()) / 2**20
    base = times["compiled AdamW"]
    print(f"{options.parameters:,} parameters in {options.tensors} tensors, {torch.get_num_threads()} threads")
    for name, seconds in times.items():
        low, middle = min(seconds), statistics.median(seconds)
        print(
            f"{name:18} min {low * 1e3:7.1f} ms  median {middle * 1e3:7.1f} ms  ratio {low / min(base):.2f} / "
            f"{middle / statistics.median(base):.2f}"
        )
    size = options.parameters * 4 / 2**20
    print(f"memory of the noise if stored: {size:.0f} MiB; allocated by torch in a private step: {allocated:.2f} MiB;")
    print(f"growth of the process's peak over the timed steps: {grown:.0f} MiB")


if __name__ == "__main__":
    main()
