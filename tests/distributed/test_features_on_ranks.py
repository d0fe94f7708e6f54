"""Options under tensor, sequence and context parallelism: launches of tests/workers/features_worker.py."""

from __future__ import annotations

import pytest
from launching import launch, passed

CHECKS = {
    "tensor": {
        "plain", "per_layer", "automatic", "a function", "ghost", "instantiate", "users", "blocks", "budget", "verify",
        "inductor", "per_block", "refusals",
    },
    "sequence": {"automatic", "budget", "verify"},
    "context": {"automatic", "per_layer", "users"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHECKS)
def test_options_give_what_they_give_on_one_rank(kind: str) -> None:
    wanted = {f"{kind} {name}" for name in CHECKS[kind]}
    assert passed(launch(2, "features_worker.py", *wanted)) == wanted
