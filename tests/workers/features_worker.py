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
from sharded_worker import raises
from tensor_worker import gradients_of, optimizer_of, same, step
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import dpcompile
from dpcompile import PrivacyError, UnsupportedGraphError, compile_step

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


def refused(make: Callable[[Any], Any], mesh: DeviceMesh) -> None:
    private = dp_compile(make(mesh), max_grad_norm=C, backend="eager")
    raises(PrivacyError, "exact noise for a model whose parameters are cut", lambda: optimizer_of(private, exact=True))
    optimizer = optimizer_of(private)
    mean: Any = lambda out, y: out.square().mean() + 0 * y.sum()  # noqa: E731
    raises(
        UnsupportedGraphError,
        "compile_step makes one graph of the whole",
        lambda: compile_step(private, mean, optimizer),
    )


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
            "per_block": partial(equal, make, mesh, clipping="per_block", regions="blocks"),
            "refusals": partial(refused, make, mesh),
        }
        checks |= {f"{kind} {name}": check for name, check in again.items()}
    run_checks(checks, sys.argv[1:])


if __name__ == "__main__":
    main()
