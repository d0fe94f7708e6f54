"""FSDP2 on gloo: one launch of tests/workers/sharded_worker.py for each number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import launch, passed

pytestmark = pytest.mark.full  # launches of several ranks

CHECKS = {
    "gradients of GPT", "gradients of checkpointed GPT", "gradients of ViT", "gradients of LoRA", "two passes",
    "gradients of GPT, tied head", "gradients of a block twice", "graph breaks",
    "two passes, checkpointed", "two passes, parameters kept", "two passes for a budget",
    "clipped by blocks", "clipped by layers", "a block twice, by blocks", "a tied head, by layers",
    "parameters kept after forward", "padding", "micro-batches", "noise", "training with noise", "loading",
    "checkpoints", "bounds of blocks", "mixed precision", "refusals", "users", "users, by blocks",
}  # fmt: skip

FEW = ("noise", "loading", "checkpoints", "bounds", "replicas", "gradients of GPT")  # of the checks on four ranks


def test_any_number_of_ranks_comes_to_the_same(tmp_path: Path) -> None:
    """Gradients, weights after steps with noise, and runs resumed from a checkpoint of two ranks."""
    for world in (2, 1):  # two ranks save what the others resume
        _check(world, tmp_path)
    found = passed(launch(4, "sharded_worker.py", str(tmp_path), *FEW))
    assert found >= {"training with noise", "loading", "checkpoints", "bounds of blocks", "replicas of shards"}
    assert "noise of replicas" in found
    for run in ("weights", "loaded", "resumed"):
        found = {world: torch.load(tmp_path / f"{run}_{world}.pt") for world in (1, 2, 4)}
        for world in (2, 4):
            for name, value in found[1].items():
                label = f"{run}: {name} on {world} ranks"
                torch.testing.assert_close(found[world][name], value, rtol=1e-5, atol=1e-5, msg=label)

    for world in (2, 4):
        found, alone = (torch.load(tmp_path / f"noise_{w}.pt") for w in (world, 1))
        assert all(torch.equal(found[i], noise) for i, noise in alone.items()), f"other noise on {world} ranks"


@pytest.mark.slow
def test_all_checks_on_four_ranks(tmp_path: Path) -> None:
    for world in (2, 4):
        _check(world, tmp_path)


def _check(world: int, directory: Path) -> None:
    found = passed(launch(world, "sharded_worker.py", str(directory)))
    more = (
        {f"communication of {n}" for n in ("GPT", "ViT", "GPT, tied head")} | {"disagreement"} if world > 1 else set()
    )
    if world > 1:
        more |= {"communication of checkpointed GPT", "communication of two passes", "communication by blocks"}
        more |= {"communication of two checkpointed passes"}
    more |= {"padding of users"} if world < 4 else set()
    more |= {"inductor"} if world == 2 else set()
    more |= {"replicas of shards", "noise of replicas"} if world == 4 else set()
    assert found == CHECKS | more
