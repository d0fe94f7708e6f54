"""Replicas and shards that rest on the CPU: a launch of workers/replicated_worker.py for each number of ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from launching import launch, passed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from dpcompile.distributed.shards import as_gradient, computing_device, zeros_for

pytestmark = pytest.mark.full  # launches of several ranks

CHECKS = {
    "gradients of GPT", "gradients of ViT", "gradients of LoRA", "regions", "unused parameters looked for",
    "gradients of checkpointed GPT", "gradients of GPT, tied head", "gradients of a block twice",
    "regions with a tied head",
    "gradients in buckets", "training with noise", "micro-batches", "loading", "loading of users", "unused parameters",
    "refusals",
    "C by a quantile", "C of each layer by a quantile",
    "mesh of replicas", "parts", "make_private", "a cap on draws", "a rank that skips", "replicate", "offloaded",
    "checkpoints", "numbers by the step",
}  # fmt: skip


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_replicas_come_to_what_one_process_comes_to(world: int) -> None:
    """Gradients, and weights after steps with noise, are those of one process on the ranks' batches together."""
    assert passed(launch(world, "replicated_worker.py")) == CHECKS | {"inductor" if world == 2 else "some ranks"}


def test_what_four_replicas_do_otherwise() -> None:
    """Replicas of shards, sums over some of the ranks; the rest of their checks is slow."""
    few = {"some ranks", "mesh of replicas", "a rank that skips", "training with noise"}
    assert passed(launch(4, "replicated_worker.py", *few)) == few


def test_what_rests_on_the_cpu_has_its_gradient_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the mesh is of other devices, as with CPU offload from GPUs."""
    one = SimpleNamespace(device_count=lambda: 1)  # torch 2.14 asks for the number of "meta" devices
    monkeypatch.setattr("torch.distributed.device_mesh._get_device_handle", lambda kind: one, raising=False)
    dist.init_process_group("gloo", store=cast(Any, dist).HashStore(), rank=0, world_size=1)
    try:
        mesh, local = DeviceMesh("meta", torch.tensor([0]), _init_backend=False), torch.randn(3, 2)
        spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=TensorMeta(local.shape, local.stride(), local.dtype))
        parameter = torch.nn.Parameter(DTensor(local, spec, requires_grad=False))  # type: ignore[call-arg]
        assert computing_device(parameter).type == "meta" and zeros_for(parameter).device.type == "cpu"
        parameter.grad = as_gradient(parameter, torch.ones(3, 2))
        assert torch.equal(parameter.grad.to_local(), torch.ones(3, 2))  # type: ignore[union-attr]
    finally:
        dist.destroy_process_group()
