"""Time, by turns; and memory."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["interleaved", "peak_allocated", "peak_resident", "seconds_of", "spread"]

Step = Callable[[], Any]


def seconds_of(step: Step) -> float:
    """Wall-clock time of one call, until the device is done."""
    _wait()
    start = time.perf_counter()
    step()
    _wait()
    return time.perf_counter() - start


def interleaved(
    steps: list[Step], *, repeats: int, seconds: float = 1.0, most: int = 200, patience: float = 30.0
) -> list[list[float]]:
    """Times of several steps that take turns, A B A B, so that a slow spell of the machine meets all of them.

    Args:
        steps: what to time; they are warm already.
        repeats: turns at least.
        seconds: goes on until this much time is spent, for steps of a few milliseconds.
        most: turns at most.
        patience: after this many seconds three turns are enough, for steps of many seconds.

    Returns:
        One list of seconds per step.
    """
    times: list[list[float]] = [[] for _ in steps]
    gc.collect()
    start = time.perf_counter()
    while len(times[0]) < most:
        spent, turns = time.perf_counter() - start, len(times[0])
        if turns >= repeats and spent >= seconds or turns >= min(3, repeats) and spent >= patience:
            break
        for mine, step in zip(times, steps, strict=True):
            mine.append(seconds_of(step))
    return times


def spread(times: list[float]) -> dict[str, Any]:
    """Minimum, median and number of measurements."""
    return {"minimum": min(times), "median": statistics.median(times), "count": len(times)}


def peak_allocated(step: Step, device: str = "cpu") -> int:
    """Bytes that PyTorch's allocator has handed out at the highest, above the level before the step.

    On CUDA the allocator's own counter; on CPU the sum over the allocations and releases that the profiler records. It
    is the same to the byte in every run; memory that a library takes past PyTorch's allocator is not in it.
    """
    gc.collect()
    if device == "cuda":
        _wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        _wait()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    recorded: list[Any] = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]")
    level = highest = 0
    for _, change in changes:
        level += change
        highest = max(highest, level)
    return highest


def peak_resident(step: Step) -> int | None:
    """The high-water mark of the process' resident memory above the level before the step, in bytes; Linux only.

    Everything is in it, also what libraries take for themselves and what the C allocator keeps.
    """
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the mark to the present level
        before = _status("VmRSS")
        step()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        found = re.search(rf"^{field}:\s+(\d+) kB", file.read(), re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {field}"
    return 1024 * int(found[1])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
