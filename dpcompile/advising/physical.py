"""The largest physical batch whose step fits in memory, by the plans of two sizes and of the one that is found."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpcompile._torch import pytree
from dpcompile.api import dp_compile
from dpcompile.errors import DPCompileError, PrivacyError
from dpcompile.module import PrivateModule, engine_of
from dpcompile.runtime.replicas import inner_module

__all__ = ["PhysicalBatch", "as_call", "check_inputs", "free_memory", "largest_physical_batch", "plain_module"]

_PLANS = 12  # that are made at most
_ROWS = 8, 16  # of the two steps from which the memory of larger ones is foretold
_SHARE = 0.9  # of the memory that is planned with
_STATE = 3  # times the trained weights: gradients, and two moments of Adam's


class PhysicalBatch(NamedTuple):
    """What fits."""

    rows: int
    """Of one forward, padding among them."""
    peak: float
    """Bytes that a step with so many is expected to need, weights and optimizer state among them."""
    memory: float
    """Bytes that there are."""
    budget: int
    """For ``memory_budget``: a step that is planned without one takes what is quickest, and may need more."""
    measured: bool = False
    """Whether a step of so many rows was run, and ``peak`` seen; else it is foretold."""


def plain_module(model: Any) -> nn.Module:
    """The ordinary module of a private one, or of one that is none yet."""
    return engine_of(model).module if isinstance(inner_module(model), PrivateModule) else model


def free_memory(device: torch.device) -> int:
    """Bytes that are free now: of the device, or of the machine (a limit that a container has is not seen)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def largest_physical_batch(model: nn.Module, inputs: Any, memory: float, at_most: int) -> PhysicalBatch:
    """The rows that fit, as the planner foretells it: nothing is run.

    The peak of a step is that of its graphs replayed moment by moment (:mod:`dpcompile.planning.replay`), the gradients
    and Adam's moments beside it. It grows by the same for each row, so that of two sizes tells where the memory ends,
    and the plan of that size is asked again (and, where it
    does not fit, of some between). What the allocator loses in gaps, and what a compiler copies, is not
    foretold: a tenth of the memory is left for them.

    Args:
        model: as it would be made private; a copy is asked.
        inputs: of one call in training, with examples along dimension 0: a tensor, a tuple, or keyword arguments.
        memory: bytes.
        at_most: rows that are wanted.

    Raises:
        PrivacyError: no tensor with examples.
        DPCompileError: not even one row fits, or what the model is refused for.
    """
    args, kwargs = as_call(inputs)
    have = len(check_inputs(inputs)[0])
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    plain, options = copy.deepcopy(model), {"backend": "eager", "verify": False, "memory_budget": 2**62}

    def peak(rows: int) -> float:
        private: Any = dp_compile(plain, dynamic=False, **options)
        given, named = _of_rows((args, kwargs), torch.arange(rows) % have)
        with torch.random.fork_rng():
            private.trace(*given, **named)
        found = private.plan.prediction.peak
        assert found is not None
        return found + _STATE * trained

    few, more = (peak(rows) for rows in _ROWS)
    each = max((more - few) / (_ROWS[1] - _ROWS[0]), 1.0)
    rows = max(min(at_most, math.floor(_ROWS[0] + (_SHARE * memory - few) / each)), 1)
    fits: PhysicalBatch | None = None
    low, high = 0, None
    for _ in range(_PLANS):
        rows = rows // 8 * 8 or rows
        needed = peak(rows)
        if needed <= _SHARE * memory:
            low, fits = rows, PhysicalBatch(rows, needed, memory, int(_SHARE * memory - _STATE * trained))
        else:
            high = rows
        if high is None or high - low <= 1:
            break
        rows = (low + high + 1) // 2 if low else high // 2
        if rows // 8 * 8 == low:
            break
    if fits is not None:
        return fits
    raise DPCompileError(
        f"not one example fits: a step is expected to need {peak(1) / 2**20:,.1f} MiB, and nine tenths of the memory "
        f"are {_SHARE * memory / 2**20:,.1f}",
        remedy="give more memory=, train fewer parameters (LoRA), or compile in regions with checkpointing "
        "(regions='blocks')",
    )


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: ``inputs`` are keyword arguments, several positional ones, or one."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def check_inputs(inputs: Any) -> list[Tensor]:
    """The tensors among the arguments of a call, each with examples.

    Raises:
        PrivacyError: none, or one without.
    """
    tensors = [x for x in pytree.tree_leaves(as_call(inputs)) if isinstance(x, Tensor)]
    if not tensors or any(not x.ndim or not len(x) for x in tensors):
        raise PrivacyError(
            "inputs hold no tensor of examples" if not tensors else "inputs hold a tensor without examples",
            remedy="give the arguments of one call of the model in training, examples along dimension 0",
        )
    return tensors


def _of_rows(call: Any, places: Tensor) -> Any:
    """The same call with so many examples: those that it has, over and over."""
    return pytree.tree_map(lambda x: x[places.to(x.device)] if isinstance(x, Tensor) else x, call)
