"""Replicas and shards that rest on the CPU: one launch of tests/replicated_worker.py for each number of ranks."""

from __future__ import annotations

import pytest
from launching import launch, passed

CHECKS = {
    "gradients of GPT", "gradients of ViT", "gradients of LoRA", "regions", "unused parameters looked for",
    "gradients of checkpointed GPT", "gradients of GPT, tied head", "gradients of a block twice",
    "regions with a tied head",
    "gradients in buckets", "training with noise", "micro-batches", "loading", "unused parameters", "refusals",
    "mesh of replicas", "parts", "make_private", "replicate", "offloaded", "checkpoints",
}  # fmt: skip


@pytest.mark.parametrize("world", [2, 4])
def test_replicas_come_to_what_one_process_comes_to(world: int) -> None:
    """Gradients, and weights after steps with noise, are those of one process on the ranks' batches together."""
    assert passed(launch(world, "replicated_worker.py")) == CHECKS | {"inductor" if world == 2 else "some ranks"}
