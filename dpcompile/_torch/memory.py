"""What torch's allocator of the CPU hands out and takes back while something runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._decomp.decompositions
import torch._dynamo

__all__ = ["memory_changes"]


def memory_changes(step: Callable[[], Any]) -> list[int]:
    """Bytes, in the order of time: of what is handed out above 0, of what is taken back below."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    profiler: Any = profile.profiler
    recorded: list[Any] = profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]")
    return [change for _, change in changes]
