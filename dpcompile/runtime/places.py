"""Where a model keeps what is no tensor: the attributes of its modules, and what hangs on them."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy
from torch import Tensor, nn

from dpcompile._torch.dynamo import Key

__all__ = ["LENGTH", "TRACE", "Path", "Place", "follow", "places_in", "same"]

Path: TypeAlias = "tuple[Hashable, ...]"
LENGTH = "len()"  # the key of a container's length
TRACE = "_dpcompile_trace"  # the attribute in which a module carries what it holds of examples
_CONTAINERS = (list, tuple, dict, deque, set, frozenset)
_PLAIN = (int, float, complex, str, bytes, types.NoneType)
_NAMESPACES = ("_modules", "_parameters", "_buffers", "__dict__")
_OPAQUE = (Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, numpy.ndarray)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands.

    Attributes:
        path: of keys, from the model.
        value: what stands there now: what is no container, or a container's length.
        owners: the objects on the way, by identity; the last one holds it.
    """

    path: Path
    value: Any
    owners: tuple[int, ...]

    def __str__(self) -> str:
        return ".".join(map(str, self.path))


def places_in(module: nn.Module, *, tensors: bool = False) -> Iterator[Place]:
    """Every place of a model, those of tensors if that is asked for.

    An object that stands in several, but for builtin containers, is found only where it is first.
    """
    seen: set[int] = set()
    for name, part in module.named_modules():
        path = tuple(name.split(".")) if name else ()
        for key, value in list(vars(part).items()):
            if key not in _NAMESPACES and key != TRACE:
                yield from _below((*path, key), value, (id(part),), seen, tensors)


def _below(path: Path, value: Any, owners: tuple[int, ...], seen: set[int], tensors: bool) -> Iterator[Place]:
    if isinstance(value, _PLAIN):
        yield Place(path, value, owners)
        return
    if id(value) in owners:
        return
    inside = (*owners, id(value))
    if isinstance(value, _CONTAINERS):
        keyed = isinstance(value, dict)
        entries = value.items() if keyed else enumerate(value)
        for key, entry in list(entries):
            yield from _below((*path, key), entry, inside, seen, tensors)
        yield Place((*path, LENGTH), len(value), inside)
    elif isinstance(value, Tensor):
        if tensors:
            yield Place(path, value, owners)
    elif (held := _attributes(value)) and not isinstance(value, _OPAQUE):
        if id(value) not in seen:
            seen.add(id(value))
            for key, entry in held.items():
                yield from _below((*path, key), entry, inside, seen, tensors)
    else:
        yield Place(path, value.copy() if isinstance(value, numpy.ndarray) else value, owners)


def _attributes(value: Any) -> dict[str, Any]:
    slots = (s for kind in type(value).__mro__ for s in _names(kind.__dict__.get("__slots__", ())))
    found = {s: getattr(value, s) for s in slots if not s.startswith("__") and hasattr(value, s)}
    return found | getattr(value, "__dict__", {}) if not isinstance(value, type) else {}


def _names(slots: str | Sequence[str]) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def follow(root: Any, way: Sequence[Key]) -> tuple[Any, Any, Any]:
    """The object at the end of a way that Dynamo goes, with what holds it and under which key; None for nothing."""
    owner, key, value = None, None, root
    for kind, step in way:
        if kind == "." and step in _NAMESPACES:
            continue
        owner, key = value, step
        try:
            if isinstance(owner, dict):
                key = list(owner)[step] if kind == "nth" else step
                value = owner[key]
            elif isinstance(owner, (list, tuple, deque)):
                fields = getattr(type(owner), "_fields", None)
                key = fields.index(step) if fields is not None and kind == "." else step
                value = owner[key]
                key %= len(owner)
            else:
                value = getattr(owner, str(step))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return None, None, None
    return owner, key, value


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, for all that can be told without asking objects of the user's."""
    if isinstance(one, bool) is not isinstance(other, bool):
        return False
    if isinstance(one, (int, float, complex)) and isinstance(other, (int, float, complex)):
        return one == other or (one != one and other != other)
    if type(one) is not type(other):
        return False
    if isinstance(one, (str, bytes)):
        return one == other
    if isinstance(one, (numpy.ndarray, numpy.generic)):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return one is other
