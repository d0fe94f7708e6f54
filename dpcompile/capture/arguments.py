"""The tensors of a call, by name, and the dimension along which each holds the examples."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from dpcompile._torch import pytree
from dpcompile._torch.tensors import is_fake
from dpcompile.capture.tensor_kinds import check_tensor
from dpcompile.errors import DPCompileError, UnsupportedGraphError

__all__ = ["InDims", "example_dims", "signature_of"]

InDims: TypeAlias = "int | None | Sequence[Any] | Mapping[str, Any]"


def example_dims(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], in_dims: InDims
) -> list[tuple[str, Tensor, int | None]]:
    """``(name, tensor, example dimension)`` for every tensor of a call.

    Args:
        forward: the model's forward, for the names of positional arguments.
        args: of the call; nested lists, tuples and dicts are looked into.
        kwargs: of the call.
        in_dims: as for ``torch.func.vmap``: one number (or None: no example axis) for all, a sequence with an entry per
            positional argument, or a mapping from argument names. Entries may be nested like their argument. What is
            not mentioned has the examples on dimension 0.

    Raises:
        DPCompileError: ``in_dims`` does not fit the call, or the example axes disagree in size.
        UnsupportedGraphError: a packed sequence, or a tensor that is no plain one.
    """
    found = list(_leaves(forward, args, kwargs, in_dims))
    sizes: dict[int, str] = {}
    seen: dict[int, tuple[str, int | None]] = {}
    for name, tensor, dim in found:
        other, earlier = seen.setdefault(id(tensor), (name, dim))
        if earlier != dim:
            raise DPCompileError(
                f"inputs '{other}' and '{name}' are the same tensor, with examples on dimension {earlier} and {dim}",
                remedy="pass a clone where the other dimension is meant",
            )
        if dim is None:
            continue
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise DPCompileError(
                f"in_dims gives {dim!r} for input '{name}'",
                remedy="give the number of the dimension that holds the examples, or None",
            )
        if not -tensor.ndim <= dim < tensor.ndim:
            raise DPCompileError(
                f"input '{name}' of shape {list(tensor.shape)} has no dimension {dim} that could hold the examples",
                remedy=f"say so with in_dims, e.g. in_dims={{{name!r}: None}} if it is the same for all examples",
            )
        sizes.setdefault(tensor.shape[dim], name)
    if len(sizes) > 1:
        listed = ", ".join(f"'{name}' has {n}" for n, name in sizes.items())
        raise DPCompileError(
            f"the inputs disagree about the number of examples: {listed}",
            remedy="pass batches of one size; name inputs that have no example axis in in_dims with None"
            + next((_OF_BAGS.format(name) for name, t, _ in found if _is_offsets(t)), ""),
        )
    return found


_OF_BAGS = (
    "; if '{}' says where bags begin (EmbeddingBag), leave it out and pass ids as [B, T], filled up with padding_idx"
)


def _is_offsets(tensor: Tensor) -> bool:
    """Whether these may be the places at which the examples' bags begin."""
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.ndim != 1 or len(tensor) < 2 or is_fake(tensor):
        return False
    return int(tensor[0]) == 0 and bool((tensor[1:] >= tensor[:-1]).all())


def _leaves(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], in_dims: InDims
) -> Iterator[tuple[str, Tensor, int | None]]:
    names = _positional_names(forward, len(args))
    if isinstance(in_dims, (list, tuple)) and len(in_dims) != len(args):
        raise DPCompileError(
            f"in_dims has {len(in_dims)} entries for {len(args)} positional arguments",
            remedy="give one entry per positional argument, or a dict by argument name",
        )
    if isinstance(in_dims, Mapping):
        unknown = set(in_dims) - set(names) - set(kwargs) - _parameters(forward)
        if unknown:
            raise DPCompileError(
                f"in_dims names arguments that the model does not take: {sorted(unknown)}",
                remedy=f"its arguments are {names + sorted(kwargs)}",
            )
    for position, (name, value) in enumerate(zip(names, args, strict=True)):
        yield from _inside(name, value, _entry(in_dims, name, position))
    for name, value in kwargs.items():
        yield from _inside(name, value, _entry(in_dims, name, None))


def _entry(in_dims: InDims, name: str, position: int | None) -> Any:
    if isinstance(in_dims, Mapping):
        return in_dims.get(name, 0)
    if isinstance(in_dims, (list, tuple)):
        return 0 if position is None else in_dims[position]
    return in_dims


def _inside(name: str, value: Any, dims: Any) -> Iterator[tuple[str, Tensor, int | None]]:
    paths, spec = pytree.tree_flatten_with_path(value, is_leaf=lambda x: isinstance(x, PackedSequence))
    if dims is None or not isinstance(dims, (list, tuple, Mapping)):
        spread = [dims] * len(paths)
    else:
        broadcast = pytree._broadcast_to_and_flatten(dims, spec, is_leaf=lambda x: x is None)
        if broadcast is None:
            raise DPCompileError(
                f"in_dims for '{name}' does not have the structure of the argument", remedy="nest it like the argument"
            )
        spread = broadcast
    for (path, leaf), dim in zip(paths, spread, strict=True):
        if isinstance(leaf, PackedSequence):
            raise UnsupportedGraphError(
                f"input '{name}{pytree.keystr(path)}' is a PackedSequence: its rows hold the steps of several examples",
                remedy="pass the padded tensor and the lengths, and mask what is behind the end of each sequence",
            )
        if isinstance(leaf, Tensor):
            check_tensor(f"input '{name}{pytree.keystr(path)}'", leaf)
            yield name + pytree.keystr(path), leaf, dim


def _positional_names(forward: Callable[..., Any], count: int) -> list[str]:
    names: list[str] = []
    for parameter in _signature(forward):
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(count - len(names))]
    return names[:count] + [f"argument {i}" for i in range(len(names), count)]


def _parameters(forward: Callable[..., Any]) -> set[str]:
    return {p.name for p in _signature(forward)}


def _signature(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(signature_of(forward).parameters.values())
    except (TypeError, ValueError):
        return []


_Signatures: TypeAlias = "WeakKeyDictionary[types.FunctionType, inspect.Signature]"
_OF_METHODS: _Signatures = WeakKeyDictionary()
_OF_FUNCTIONS: _Signatures = WeakKeyDictionary()


def signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    """``inspect.signature``, looked up once for each function, and once for the methods that are made of it."""
    bound = type(forward) is types.MethodType
    function, known = (forward.__func__, _OF_METHODS) if bound else (forward, _OF_FUNCTIONS)
    if type(function) is not types.FunctionType:
        return inspect.signature(forward)
    found = known.get(function)
    if found is None:
        found = known[function] = inspect.signature(forward)
    return found
