"""Fake and real tensors, and the memory behind them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch._decomp.decompositions
import torch._dynamo
from torch._dispatch.python import no_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatefulSymbolicContext,
    StatelessSymbolicContext,
    free_unbacked_symbols,
)
from torch.multiprocessing.reductions import StorageWeakRef as WeakMemory
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    "add_each_",
    "base_of",
    "WeakMemory",
    "WeakTensorKeyDictionary",
    "detect_fake_mode",
    "free_unbacked_symbols",
    "fake_mode_of",
    "fake_vector",
    "fix_sizes",
    "is_fake",
    "lengths_of",
    "memory_of",
    "real_tensors",
    "taking_real_tensors",
    "tensor_address",
    "uses_of_memory",
    "weak_memory",
]


def add_each_(tensors: list[torch.Tensor], numbers: Sequence[int]) -> None:
    """Add to each tensor in place a number of its own, which goes to a device as an argument of a kernel."""
    torch._foreach_add_(tensors, numbers)  # type: ignore[reportPrivateImportUsage, arg-type]


def fake_mode_of(values: Sequence[Any]) -> Any:
    """The mode of the fake tensors among values, or of the running trace if there are no tensors; None outside."""
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    fake = next((v for v in tensors if isinstance(v, FakeTensor)), None)
    if fake is not None:
        return fake.fake_mode
    return None if tensors else detect_fake_mode()


@contextlib.contextmanager
def taking_real_tensors(mode: Any) -> Iterator[None]:
    """Within a fake mode, operations take real tensors too."""
    before, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        with mode:
            yield
    finally:
        mode.allow_non_fake_inputs = before


def fix_sizes(tensor: torch.Tensor) -> None:
    """Let the running trace take a tensor's sizes for numbers: AOTAutograd makes symbols of those Dynamo never saw."""
    context = TracingContext.try_get()
    if context is not None:
        context.tensor_to_context[tensor] = StatefulSymbolicContext(
            [DimDynamic.STATIC] * tensor.ndim, tensor_source=ConstantSource("of fixed sizes")
        )


def fake_vector(length: int, device: torch.device) -> torch.Tensor:
    """A float64 vector without values: what is traced with it holds for :func:`lengths_of` it, this one among them."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    real = torch.empty(length, dtype=torch.float64, device=device)
    return mode.from_tensor(real, symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC]))


def lengths_of(vector: torch.Tensor) -> Callable[[int], bool]:
    """Whether all that was traced with a :func:`fake_vector` holds for a length."""
    env = cast(Any, vector).fake_mode.shape_env
    code = env.produce_guards_expression([vector], ignore_static=False)
    return lambda length: bool(env.evaluate_guards_expression(code, [torch.empty(length, device="meta")]))


def tensor_address(tensor: torch.Tensor) -> int:
    """The pointer that an ``at::Tensor`` holds."""
    return tensor._cdata


def memory_of(tensor: torch.Tensor) -> int:
    """Identify the memory behind a tensor, also a fake one: equal for views of one another."""
    return tensor.untyped_storage()._cdata


def base_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """What autograd knows a tensor as a view of; None if it is none."""
    return tensor._base


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether the tensor has a shape and no values."""
    return isinstance(tensor, FakeTensor)


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Run operations for real, also in the middle of tracing.

    Without torch's dispatcher in Python, which holds the interpreter's lock where collectives count on it to be free: a
    thread of gloo that waits for it while it holds the queue's would never go on.
    """
    with _disable_current_modes(), no_python_dispatcher(), torch.no_grad():
        yield


def uses_of_memory(tensor: torch.Tensor) -> int:
    """How many tensors share the memory of this one, itself included."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 1


def weak_memory(tensor: torch.Tensor) -> WeakMemory:
    """A reference to the memory of a tensor that does not keep it alive; ``.expired()`` once it is freed."""
    return WeakMemory(tensor.untyped_storage())
