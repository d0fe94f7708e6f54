"""How often a Poisson-sampled run compiles."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.bench import Bench
from dpcompile import make_private

TITLE = "Compilations over a Poisson-sampled run"


def run(bench: Bench) -> dict[str, Any]:
    """One process."""
    steps = 20 if bench.settings.quick else 200
    arguments = {"steps": steps, "backend": bench.settings.backend}
    return bench.shop.run("benchmarks.experiments.recompiles:count", arguments)


def count(*, steps: int, backend: str) -> dict[str, Any]:
    """Train a small network by the ordinary loop, and read Dynamo's counter of compiled graphs.

    Returns:
        ``steps``, ``graphs_first`` and ``graphs_last`` (compiled by the end of the first and of the last step), and
        seconds of the first step and of the slowest later one.
    """
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    counters.clear()
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    dataset = TensorDataset(torch.randn(2000, 20), torch.randint(0, 4, (2000,)))
    loader = DataLoader(dataset, batch_size=50)
    model, optimizer, loader = make_private(
        net, torch.optim.SGD(net.parameters(), lr=0.1), loader, noise_multiplier=1.0, backend=backend
    )
    graphs: list[int] = []
    seconds: list[float] = []
    while len(graphs) < steps:
        for x, y in loader:
            start = time.perf_counter()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
            graphs.append(counters["stats"]["unique_graphs"])
            if len(graphs) == steps:
                break
    return {
        "steps": steps,
        "graphs_first": graphs[0],
        "graphs_last": graphs[-1],
        "first_seconds": seconds[0],
        "slowest_later_seconds": max(seconds[1:]),
    }


def section(data: dict[str, Any]) -> str:
    """One sentence."""
    if "error" in data:
        return data["error"] + "\n"
    return (
        f"{data['steps']} physical batches of a Poisson-sampled run (20-64-4 network, sample rate 0.025): "
        f"{data['graphs_first']} graph compiled in the first step, {data['graphs_last']} in all; "
        f"first step {data['first_seconds']:.2f} s, slowest later step {1e3 * data['slowest_later_seconds']:.1f} ms.\n"
    )
