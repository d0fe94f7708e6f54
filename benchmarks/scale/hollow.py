"""Tensors without content: a program runs at its full size, with its real shapes, and computes nothing.

Live tensors are ordinary ones whose memory is reserved and never touched, so the operating system gives none. Every
operation asks fake tensors for the shapes of its results, and makes results of these shapes without computing them.
What is compiled, gathered, reduced, kept and freed is what the program itself compiles, gathers, reduces, keeps and
frees; numbers read out of tensors are 0.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Hollow", "Memory", "fake_ranks"]


@contextmanager
def fake_ranks(world: int) -> Iterator[None]:
    """Make of this process rank 0 of ``world`` ranks that do not exist: collectives are counted and move nothing."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _clear_sharding_prop_cache()  # it holds meshes, equal to the next ones, of ranks that are no more
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(eq=False)
class Memory:
    """Bytes of all live tensors, each piece of memory once.

    Attributes:
        live: bytes now.
        peak: the highest ``live`` since :meth:`mark`.
    """

    live: int = 0
    peak: int = 0
    sizes: dict[int, int] = field(default_factory=dict)

    def mark(self) -> None:
        """Start a new peak."""
        self.peak = self.live

    def note(self, tensor: Tensor) -> None:
        """A tensor was made; its memory counts until it is freed."""
        storage = tensor.untyped_storage()
        if storage.device.type == "meta":  # of a compiler's fake tensors
            return
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self._free, key).atexit = False
            self.sizes[key] = 0
        self.resize(storage)

    def resize(self, storage: Any) -> None:
        """The size of known memory changed."""
        known = self.sizes.get(storage._cdata)
        if known is not None:
            self.live += storage.nbytes() - known
            self.sizes[storage._cdata] = storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


class Hollow(TorchDispatchMode):
    """Within it tensors have no content.

    Attributes:
        memory: of what is made within.
        collectives: operation -> number of calls.
        traffic: operation -> bytes of the whole tensor: what an all-gather gives, what a reduction is given.
        operations: operator -> number of calls, of those that were not computed.

    Raises:
        RuntimeError: an operation whose results' sizes depend on values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()
        self.collectives: Counter[str] = Counter()
        self.traffic: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self._fakes = FakeTensorMode()
        self._known: dict[Any, Any] = {}
        self._own: Any = None

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Dynamo compiles under modes that say so."""
        return True

    def __enter__(self) -> Any:
        own, memory = torch.UntypedStorage.resize_, self.memory

        def resize(storage: Any, size: int) -> Any:
            result = own(storage, size)
            memory.resize(storage)
            return result

        self._own, torch.UntypedStorage.resize_ = (own, torch._foreach_copy_), resize  # type: ignore[method-assign]
        setattr(torch, "_foreach_copy_", lambda *args, **kwargs: None)  # noqa: B010 (FSDP calls it below any mode)
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        torch.UntypedStorage.resize_, torch._foreach_copy_ = self._own  # type: ignore[method-assign]
        super().__exit__(*details)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D105
        kwargs = kwargs or {}
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if any(type(t) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) for t in tensors):
            wrapped = any(not isinstance(t, FakeTensor) and hasattr(t, "__tensor_flatten__") for t in tensors)
            return NotImplemented if wrapped else func(*args, **kwargs)
        if str(kwargs.get("device")) == "meta" or any(t.device.type == "meta" for t in tensors):
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else args[0].dtype != torch.bool and 0
        if func is torch.ops.aten.equal.default:
            return True
        if func.is_view or func in _AS_THEY_ARE or func.namespace == "profiler":
            return self._noted(func(*args, **kwargs))
        self.operations[str(func)] += 1
        if func._schema.is_mutable:
            written = _written(func, args, kwargs)
            if not func._schema.returns:
                return None
            return written[0] if len(func._schema.returns) == 1 and len(written) == 1 else tuple(written)
        return self._made(func, leaves, structure)

    def _made(self, func: Any, leaves: list[Any], structure: Any) -> Any:
        key = (func, structure, tuple(_layout(x) if isinstance(x, Tensor) else (type(x), x) for x in leaves))
        try:
            found = self._known.get(key)
        except TypeError:  # an argument without hash
            key, found = None, None
        if found is None:
            found = self._shapes(func, leaves, structure)
            if key is not None:
                self._known[key] = found
        if found is _ALIASES:
            args, kwargs = pytree.tree_unflatten(leaves, structure)
            return self._noted(func(*args, **kwargs))
        return self._noted(pytree.tree_map(lambda x: x.make() if isinstance(x, _Shape) else x, found))

    def _shapes(self, func: Any, leaves: list[Any], structure: Any) -> Any:
        with self._fakes:
            fakes = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) if isinstance(x, Tensor) else x
                for x in leaves
            ]
            args, kwargs = pytree.tree_unflatten(fakes, structure)
            results = func(*args, **kwargs)
        own = {x.untyped_storage()._cdata for x in fakes if isinstance(x, Tensor)}
        made = [x for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]
        if any(x.untyped_storage()._cdata in own for x in made):
            return _ALIASES
        return pytree.tree_map(
            lambda x: _Shape(tuple(x.shape), x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x, results
        )

    def _noted(self, results: Any) -> Any:
        for x in pytree.tree_leaves(results):
            if isinstance(x, Tensor):
                self.memory.note(x)
        return results

    def _collective(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name.removeprefix("c10d::").strip("_")
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.collectives[name] += 1
        self.traffic[name] += max((t.numel() * t.element_size() for t in tensors), default=0)
        work, returns = FakeWork().boxed(), func._schema.returns
        if len(returns) == 1:
            return work
        first = args[0]
        return (first, work)


@dataclass(frozen=True, slots=True)
class _Shape:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


_ALIASES = object()
_AS_THEY_ARE = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
    torch.ops.aten.set_.source_Storage_storage_offset,
    torch.ops.aten.set_.source_Tensor,
    torch.ops.aten.resize_.default,
}


def _layout(x: Tensor) -> tuple[Any, ...]:
    return (tuple(x.shape), x.stride(), x.dtype, x.device)


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operation writes, in the order in which it returns them."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.name in kwargs else None
            if value is None and position < len(args):
                value = args[position]
            found.append(value)
    return found
