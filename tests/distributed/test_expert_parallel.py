"""Expert parallelism: launches of tests/workers/experts_worker.py."""

from __future__ import annotations

import pytest
from launching import launch, passed

pytest.importorskip("transformers.distributed.expert_parallel")

pytestmark = pytest.mark.full  # launches of several ranks

FEW = {"one backward each", "few refusals"}
BOTH = {"one backward each", "one graph", "by layer", "ghost", "instantiated", "training"}
BESIDE = {"beside tensor parallelism", "beside it, by layer"}
ALONE = {
    "regions", "inductor", "MixtralForCausalLM", "GptOssForCausalLM", "Qwen3MoeForCausalLM",
    "blocks of Mixtral", "few refusals", "all refusals", "all to all of Transformers",
}  # fmt: skip


def test_experts_cut_over_ranks() -> None:
    """Two ranks, against one backward per example; the rest of their checks is slow."""
    assert passed(launch(2, "experts_worker.py", *FEW)) == FEW


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "checks"), [(2, BOTH | ALONE), (4, BOTH | BESIDE)])
def test_every_model_of_experts(ranks: int, checks: set[str]) -> None:
    """Two ranks: experts alone. Four: with FSDP2 or tensor parallelism, two by two."""
    assert passed(launch(ranks, "experts_worker.py", *checks)) == checks
