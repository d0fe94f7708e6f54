"""Inductor without faults that meet ordinary models, while it compiles for us."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch._decomp.decompositions
import torch._dynamo

from dpcompile._torch.later import Later

if TYPE_CHECKING:
    from torch._inductor.loop_body import LoopBody
    from torch._inductor.scheduler import SchedulerNode

__all__ = ["FORGETS_WRITES", "lstm_step_by_step", "mended"]

_loop_body, _scheduler = Later("torch._inductor.loop_body"), Later("torch._inductor.scheduler")

FORGETS_WRITES = torch.__version__ < "2.14"


def _recompute_with_names(before: Callable[..., None]) -> Callable[..., None]:
    """Remember which values were written in place when the loops of an operation are laid out anew.

    Up to torch 2.13 Inductor forgets it, where it does that to fuse the operation with another on a CPU, and may run a
    reader before the write: behind the scatter-add of a max pool's backward all gradients were zero, or a buffer was
    used after it was freed (pytorch #185509, mended in 2.14). Any write in place can meet it.
    """

    def recompute(self: SchedulerNode, *args: Any, **options: Any) -> None:
        before(self, *args, **options)
        self.set_read_writes(self.read_writes.rename(self.mutation_renames))

    return recompute if FORGETS_WRITES else before


def _read_or_nothing(before: Callable[..., Any]) -> Callable[..., Any]:
    """What a loop reads of a value: None, not a KeyError, where it reads the value under the name before a write.

    Inductor (to 2.15 at least) asks that to see whether the value may stay in a thread's own memory: then it may not
    (pytorch #196570).
    """

    def read(self: LoopBody, name: str) -> Any:
        try:
            return before(self, name)
        except KeyError:
            return None

    return read


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Inductor without faults that meet ordinary models, while it compiles for us; other compilations keep theirs."""
    node, body = _scheduler.SchedulerNode, _loop_body.LoopBody
    recompute, read = node.recompute_size_and_body, body.get_read_expr
    node.recompute_size_and_body, body.get_read_expr = _recompute_with_names(recompute), _read_or_nothing(read)
    try:
        yield
    finally:
        node.recompute_size_and_body, body.get_read_expr = recompute, read


@contextlib.contextmanager
def lstm_step_by_step() -> Iterator[None]:
    """Decompose an LSTM whose input needs no gradient too; on a CPU torch would make it one opaque operation.

    The last states get the shape of the first: torch 2.11 returns them with a dimension too many.
    """
    module = torch._decomp.decompositions
    chosen = module.select_one_layer_lstm_function

    def step_by_step(inputs: Any, hidden: Any, *rest: Any, **options: Any) -> Any:
        out, last = module.one_layer_lstm(inputs, hidden, *rest, **options)
        return out, tuple(x.reshape(h.shape) for x, h in zip(last, hidden, strict=True))

    module.select_one_layer_lstm_function = lambda *_: step_by_step
    try:
        yield
    finally:
        module.select_one_layer_lstm_function = chosen
