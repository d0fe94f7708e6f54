"""The largest physical batch whose step was seen to fit: steps of a copy are run, and their peak memory measured."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dpcompile._torch import pytree
from dpcompile._torch.memory import memory_changes
from dpcompile.advising.physical import PhysicalBatch, as_call, check_inputs
from dpcompile.api import dp_compile
from dpcompile.errors import DPCompileError, PrivacyError
from dpcompile.kernels.workspace import kept_gradients
from dpcompile.module import PrivateModule, engine_of, private_view
from dpcompile.runtime.random_state import RandomState

__all__ = ["measured_physical_batch", "peak_of"]

_TRIES, _GROWTH = 14, 4  # sizes that are run at most, and how far each is beyond the last
_SHARE = 0.9  # of the memory that a step may take: the rest is for an allocator's gaps
_FIRST = 8, 16  # rows of the first two


def measured_physical_batch(
    model: Any, inputs: Any, memory: float, at_most: int, *, run: Callable[[int], float] | None = None
) -> PhysicalBatch:
    """The rows of the largest step that ran within nine tenths of the memory.

    Forward, loss and backward of a copy run with 8 rows, with 16, and with as many as those foretell, up to four times
    as many at once, until the next size is known not to fit. So no step beyond the first is tried that is expected to
    take more than there is. The peak is that of
    PyTorch's allocator, with weights, gradients and Adam's moments; on a GPU a step that is out of memory does not fit,
    and what it left is given back.

    **Guarantee.** Model, gradients, buffers, hooks, random state and whatever is attached to the model are what they
    were: a copy is run.

    Args:
        model: private, with the options that it was made with; or one that is none yet, with those that are usual.
        inputs: of one call in training, examples along dimension 0 (of a private model: as its ``in_dims`` say).
        memory: bytes.
        at_most: rows that are wanted.
        run: instead of a step, in tests: rows to bytes, or a ``torch.OutOfMemoryError``.

    Raises:
        PrivacyError: no tensor with examples, or a model of which no copy can be made.
        DPCompileError: not even one row fits, or what the model is refused for.
    """
    plain = model if not isinstance(model, PrivateModule) else engine_of(model).module
    trained = sum(p.numel() * p.element_size() for p in plain.parameters() if p.requires_grad)
    budget = int(_SHARE * memory - 3 * trained)
    needed = run if run is not None else _Steps(model, plain, inputs, budget)
    tried: dict[int, float] = {}

    def fits(rows: int) -> bool:
        try:
            tried[rows] = needed(rows)
        except torch.OutOfMemoryError:
            tried[rows] = float("inf")
        if run is None:
            _give_back()
        return tried[rows] <= _SHARE * memory

    low, high = 0, at_most + 1
    for rows in dict.fromkeys(min(first, at_most) for first in _FIRST):
        if not fits(rows):
            high = rows
            break
        low = rows
    while low + 1 < high and len(tried) < _TRIES:
        rows = _next(tried, low, high, _SHARE * memory)
        if rows <= low:
            break
        low, high = (rows, high) if fits(rows) else (low, rows)
    if not low:
        raise DPCompileError(
            f"not one example fits: a step of {min(tried)} took {min(tried.values()) / 2**20:,.1f} MiB, and nine "
            f"tenths of the memory are {_SHARE * memory / 2**20:,.1f}",
            remedy="give more memory=, train fewer parameters (LoRA), or compile in regions with checkpointing "
            "(regions='blocks')",
        )
    return PhysicalBatch(low, tried[low], memory, budget, measured=True)


def _next(tried: Mapping[int, float], low: int, high: int, limit: float) -> int:
    """The size to try next, between one that fits and one that does not; ``low``: there is none worth a try."""
    if not low:
        return high // 2
    known = sorted(n for n in tried if tried[n] < float("inf"))
    before = [n for n in known if n < low]
    each = (tried[low] - tried[before[-1]]) / (low - before[-1]) if before else 0.0
    guess = high - 1 if each <= 0 else int(min(low + (limit - tried[low]) / each, high - 1))
    if tried.get(high, 0.0) > limit:  # it grows faster than it did
        guess = min(guess, (low + high) // 2)
    guess = min(guess, _GROWTH * low)  # what is foretold of much more is foretold badly
    last = guess == high - 1 and high not in tried  # all that are wanted
    return guess if last else guess // 8 * 8 or guess


class _Steps:
    """Steps of a copy, by their number of rows: bytes that each takes at its highest."""

    def __init__(self, model: Any, plain: nn.Module, inputs: Any, budget: int) -> None:
        if isinstance(plain, PrivateModule):
            raise PrivacyError(
                f"{type(plain).__name__} is a class that dp_compile decorates, and steps are measured of a copy "
                "with options of its own",
                remedy="decorate the instance, dp_compile(Model()), or leave measure=True out",
            )
        self._private: Any = None
        self._call, self._dims = as_call(inputs), {id(t): 0 for t in check_inputs(inputs)}
        self._options = None
        if isinstance(model, PrivateModule):
            engine = engine_of(model)
            if engine.distributed or engine.options.examples_per_user > 1 or engine.options.pipeline is not None:
                raise PrivacyError(
                    "measure=True of a model on several ranks, or of users: a copy on this rank is not what will run",
                    remedy="leave measure=True out: memory is then foretold by plans",
                )
            self._dims = {id(t): dim for _, t, dim in engine.example_dims(self._call)}
            given = engine.options.memory_budget
            kept = {"memory_budget": budget if given is None else given, "max_grad_norm": engine.max_grad_norm}
            self._options = replace(engine.options, dynamic=False, verify=False, check=False, **kept)
        self._have = next(t.shape[dim] for t, dim in self._tensors() if dim is not None)
        self._plain, self._budget = plain, budget
        trained = [p for p in plain.parameters() if p.requires_grad]
        weights = sum(p.numel() * p.element_size() for p in plain.parameters())
        self._beside = weights + 2 * sum(p.numel() * p.element_size() for p in trained)  # and two moments of Adam's
        self._device = next(plain.parameters()).device

    def __call__(self, rows: int) -> float:
        """Of weights, gradients, moments and a step of so many rows."""
        before = RandomState.now(self._plain.parameters())
        module = copy.deepcopy(self._plain)
        module.zero_grad(set_to_none=True)
        if self._options is not None:
            private = private_view(module, self._options)
        else:
            private = dp_compile(module, dynamic=False, verify=False, memory_budget=self._budget)
        call = pytree.tree_map(lambda x: self._of_rows(x, rows), self._call)

        def step() -> None:
            _loss(private(*call[0], **call[1])).backward()
            private.zero_grad(set_to_none=True)

        try:
            step()  # compiles
            kept_gradients.release()
            return self._beside + peak_of(step, self._device)
        finally:
            kept_gradients.release()
            before.restore()

    def _tensors(self) -> list[tuple[Tensor, int | None]]:
        return [(x, self._dims.get(id(x))) for x in pytree.tree_leaves(self._call) if isinstance(x, Tensor)]

    def _of_rows(self, value: Any, rows: int) -> Any:
        dim = self._dims.get(id(value)) if isinstance(value, Tensor) else None
        if dim is None:
            return value
        places = (torch.arange(rows) % self._have).to(value.device)
        return value.detach().index_select(dim, places)


def _loss(result: Any) -> Tensor:
    """A mean of one number for each example, of whatever a model returns."""
    found = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
    if not found:
        raise PrivacyError(
            "the model returns nothing that a loss could be made of",
            remedy="give the arguments of one call of the model in training",
        )
    return sum((x.abs().square().mean() for x in found[1:]), start=found[0].abs().square().mean())


def peak_of(step: Callable[[], Any], device: torch.device) -> int:
    """Bytes that PyTorch's allocator has handed out at the highest, above the level before the step.

    On CUDA the allocator's own counter; on the CPU by the allocations and releases that the profiler records. What a
    library takes past PyTorch's allocator is not in it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    level = highest = 0
    for change in memory_changes(step):
        level += change
        highest = max(highest, level)
    return highest


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
