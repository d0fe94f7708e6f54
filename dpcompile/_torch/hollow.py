"""Modules and calls without content: every tensor has a shape and no values."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

__all__ = ["autocast_of_gpus", "put_on", "without_content"]

T = TypeVar("T")
_KINDS = (Tensor, nn.Parameter, FakeTensor)


def without_content(objects: T, device: torch.device) -> T:
    """A deep copy in which every tensor is a fake one on ``device``, laid out as it was; parameters stay parameters.

    No values are copied, also not of tensors on the meta device. Tensors of other kinds are copied as they are.
    """
    with _Hollow(device):
        return copy.deepcopy(objects)


class _Hollow(TorchFunctionMode):
    """What ``copy.deepcopy`` calls of a tensor, or of a parameter, makes a fake one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._mode, self._device = FakeTensorMode(), device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = args[0] if args and type(args[0]) in _KINDS and args[0].layout is torch.strided else None
        if own is None or func not in (Tensor.__deepcopy__, FakeTensor.__deepcopy__, Tensor.clone):
            return func(*args, **(kwargs or {}))
        if func is Tensor.clone:  # by which parameters are copied
            return self._fake(own)
        known = args[1]
        if id(own) not in known:
            known[id(own)] = self._fake(own).requires_grad_(own.requires_grad)
        return known[id(own)]

    def _fake(self, like: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction(), self._mode:
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self._device)


def put_on(value: object, device: torch.device) -> None:
    """Let a fake tensor, or all of several, be one on ``device`` from now on."""
    if isinstance(value, FakeTensor):
        value.fake_device = device
    elif isinstance(value, (tuple, list)):
        for one in value:
            put_on(one, device)


@contextlib.contextmanager
def autocast_of_gpus(device: torch.device) -> Iterator[None]:
    """Where CUDA is under autocast, ``device`` is too, in the same dtype."""
    if device.type == "cuda" or not torch.is_autocast_enabled("cuda"):
        yield
        return
    with torch.autocast(device.type, torch.get_autocast_dtype("cuda")):
        yield
