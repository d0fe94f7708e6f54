"""What autograd recorded between a model's outputs and a loss, read while the loss's backward runs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["constants", "inputs_of", "noted", "note", "operation_of", "roots", "saved", "shape_of_output"]

_BACKWARD = torch.autograd.graph._engine_run_backward.__code__
_NOTE = "dpcompile"


def roots() -> list[tuple[Any, int]]:
    """``(node, output)`` at which backwards that are running began: that of this thread; on a device's thread, any.

    Empty where a backward was not begun from Python.
    """
    found = list(_roots_of(sys._getframe()))
    if not found and threading.current_thread() is not threading.main_thread():
        found = [node for frame in sys._current_frames().values() for node in _roots_of(frame)]
    return found


def _roots_of(frame: Any) -> Iterator[tuple[Any, int]]:
    while frame is not None:
        if frame.f_code is _BACKWARD:
            yield from (
                (t.grad_fn, t.output_nr) for t in frame.f_locals["t_outputs"] if getattr(t, "grad_fn", None) is not None
            )
            return
        frame = frame.f_back


def note(node: Any, output: int, fact: Any) -> None:
    """Leave a fact on an output of a node, for as long as the node lives."""
    node.metadata.setdefault(_NOTE, {})[output] = fact


def noted(node: Any, output: int) -> Any:
    """That fact, or None."""
    return node.metadata.get(_NOTE, {}).get(output)


def inputs_of(node: Any) -> tuple[tuple[Any, int], ...]:
    """``(node, output)`` of every differentiable input; node is None of a constant."""
    return node.next_functions


def operation_of(node: Any) -> str:
    """Autograd's name of the operation, without the number of the overload: ``LogSoftmax``."""
    name = type(node).__name__
    stem, _, number = name.rpartition("Backward")
    return stem if stem and (not number or number.isdigit()) else name


def shape_of_output(node: Any, output: int) -> tuple[int, ...]:
    """Of what the operation computed forward."""
    return tuple(node._input_metadata[output].shape)


def saved(node: Any, name: str) -> Any:
    """A number, or several, that the operation was called with. AttributeError: there was none of this name."""
    return getattr(node, f"_saved_{name}")


def constants(node: Any, name: str) -> bool:
    """Whether the operation was called with a tensor of this name; what was in it is freed by now."""
    try:
        return getattr(node, f"_saved_{name}") is not None
    except RuntimeError:
        return True
