"""What both ranks of test_features_on_ranks.py run: ``torchrun tests/workers/features_worker.py [CHECK ..]``.

One model cut by tensor, by sequence, and by context parallelism; each option gives what it gives on one rank, or is
refused. Each check prints its name once it passed, on rank 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import context_worker
import sequence_worker
import tensor_worker
import torch
import torch.distributed as dist
from launching import run_checks
from tensor_worker import gradients_of, optimizer_of, same, same_weights, step
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import dpcompile
from dpcompile import AdaptiveClip, compile_step

dp_compile: Any = dpcompile.dp_compile
B, T, C = 8, 4, 0.5


def halves(norms: Tensor) -> Tensor:
    """Of ``[B]`` norms."""
    return torch.where(norms > C, C / norms, 1.0) / 2


def tensor(mesh: DeviceMesh | None) -> Any:
    model = sequence_worker.made(sequence_worker.GPT)
    return model if mesh is None else tensor_worker.cut(model, mesh)


def sequence(mesh: DeviceMesh | None) -> Any:
    model = sequence_worker.made(sequence_worker.GPT)
    return model if mesh is None else sequence_worker.cut_tokens(model, mesh)


def context(mesh: DeviceMesh | None) -> Any:
    make = partial(context_worker.Model, context_worker.gathered)
    if mesh is not None:
        return context_worker.placed(make, mesh)
    torch.manual_seed(3)
    return make()


MADE = {"tensor": tensor, "sequence": sequence, "context": context}


def equal(make: Callable[[Any], Any], mesh: DeviceMesh, **options: Any) -> None:
    """Gradients of two micro-batches are those of one rank."""
    found = []
    for m in (None, mesh):
        torch.manual_seed(5)
        private = dp_compile(model := make(m), **{"max_grad_norm": C, "backend": "eager", **options})
        for _ in range(2):
            step(private, torch.randint(0, sequence_worker.V, (B, T)))
        found.append(gradients_of(model))
    same(found[1], found[0])


def trained(make: Callable[[Any], Any], mesh: DeviceMesh, **options: Any) -> None:
    """Weights after noisy steps are those of one rank."""
    models = []
    for m in (None, mesh):
        torch.manual_seed(5)
        private = dp_compile(model := make(m), max_grad_norm=C, backend="eager")
        optimizer = optimizer_of(private, **options)
        for _ in range(2):
            step(private, torch.randint(0, sequence_worker.V, (B, T)))
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    same_weights(models[1], models[0], 1e-5)


def stepped(make: Callable[[Any], Any], mesh: DeviceMesh) -> None:
    private = dp_compile(make(mesh), max_grad_norm=C, backend="eager")
    optimizer = optimizer_of(private)
    x = torch.randint(0, sequence_worker.V, (B, T))
    compile_step(private, lambda out, y: out.float().square().flatten(1).sum(1).mean() + 0 * y.sum(), optimizer)(x, x)


def main() -> None:
    """Run the checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    checks: dict[str, Callable[[], Any]] = {}
    for kind, make in MADE.items():
        again: dict[str, Callable[[], Any]] = {
            "plain": partial(equal, make, mesh),
            "per_layer": partial(equal, make, mesh, clipping="per_layer"),
            "automatic": partial(equal, make, mesh, clipping="automatic"),
            "a function": partial(equal, make, mesh, clipping=halves),
            "ghost": partial(equal, make, mesh, norm="ghost"),
            "instantiate": partial(equal, make, mesh, norm="instantiate"),
            "users": partial(equal, make, mesh, examples_per_user=2),
            "blocks": partial(equal, make, mesh, regions="blocks"),
            "budget": partial(equal, make, mesh, memory_budget=4.0),
            "verify": partial(equal, make, mesh, verify=True),
            "inductor": partial(equal, make, mesh, backend="inductor"),
            "quantile": partial(trained, make, mesh, adaptive_clip=AdaptiveClip(learning_rate=1.0)),
            "exact": partial(trained, make, mesh, exact=True),
            "secure": partial(trained, make, mesh, secure=True),
            "breaks": partial(equal, make, mesh, regions="breaks"),
            "check": partial(equal, make, mesh, check=True),
            "two passes": partial(equal, make, mesh, norm="two_pass"),
            "per_block": partial(equal, make, mesh, clipping="per_block", regions="blocks"),
            "compile_step": partial(stepped, make, mesh),
        }
        checks |= {f"{kind} {name}": check for name, check in again.items()}
    run_checks(checks, sys.argv[1:])


if __name__ == "__main__":
    main()
