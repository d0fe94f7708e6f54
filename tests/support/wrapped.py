"""A subclass of Tensor that holds another one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Wrapper"]


class Wrapper(Tensor):
    """A tensor that holds another one."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        wrap: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        return wrap(cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors: Any, meta: Any, size: Any, stride: Any) -> Any:
        return Wrapper(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Wrapper, lambda x: x.inner, (args, kwargs or {}))
        return pytree.tree_map_only(Tensor, Wrapper, func(*args, **kwargs))
