"""The units of a model: which modules are compiled by themselves, and how a graph around them calls them."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpcompile._torch import pytree
from dpcompile._torch.autograd import in_functorch
from dpcompile._torch.dynamo import opaque
from dpcompile._torch.parallel import gathered_parameters, mixed_precision
from dpcompile._torch.tensors import fake_mode_of, taking_real_tensors
from dpcompile.distributed.shards import fake_gathered, is_distributed
from dpcompile.errors import UnsupportedGraphError

__all__ = ["Unit", "as_it_is", "find_units", "is_sharded", "one_unit", "stubs", "unit_call"]


@dataclass(eq=False)
class Unit:
    """A module that is compiled by itself.

    Attributes:
        module: the module.
        path: its name in the model; empty for the model itself.
        sharded: it is a unit of FSDP2, whose hooks run around it.
        children: the units directly inside.
        handle: by which a graph calls it.
        stand_in: the forward that graphs around it see.
        saved: the module's own forward and hooks, while the stand-in is installed.
    """

    module: nn.Module
    path: str
    sharded: bool
    children: list[Unit] = field(default_factory=list)
    handle: int = -1
    stand_in: Callable[..., Any] | None = None
    saved: list[dict[str, Any]] = field(default_factory=list)


_HANDLES = itertools.count()
_UNITS: weakref.WeakValueDictionary[int, Unit] = weakref.WeakValueDictionary()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_sharded(module: nn.Module) -> bool:
    """Whether ``torch.distributed.fsdp.fully_shard`` was applied to this module."""
    return any(
        c.__name__ == "FSDPModule" and c.__module__.startswith("torch.distributed") for c in type(module).__mro__
    )


def find_units(model: nn.Module, *, blocks: bool = True) -> Unit:
    """The model as a tree of units.

    Units of a model under ``fully_shard`` are those of FSDP. Otherwise they are the elements with parameters of
    ``ModuleList`` and ``Sequential`` containers whose class occurs there twice or more; the outermost such containers.
    Without ``blocks`` there are none but those of FSDP.
    """
    sharded = any(is_sharded(m) for m in model.modules())
    root = _unit(model, "", sharded and is_sharded(model))
    if sharded or blocks:
        _collect(root, model, "", sharded)
    return root


def one_unit(model: nn.Module) -> Unit:
    """The model as one unit."""
    return _unit(model, "", False)


def _collect(parent: Unit, module: nn.Module, path: str, sharded: bool) -> None:
    repeated = Counter(type(m) for m in module.children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else {}
    for name, child in module.named_children():
        inside = f"{path}.{name}" if path else name
        own = is_sharded(child) if sharded else repeated.get(type(child), 0) >= 2 and _has_parameters(child)
        if own:
            unit = _unit(child, inside, sharded)
            parent.children.append(unit)
            if sharded:
                _collect(unit, child, inside, sharded)
        else:
            _collect(parent, child, inside, sharded)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _unit(module: nn.Module, path: str, sharded: bool) -> Unit:
    unit = Unit(module, path, sharded, handle=next(_HANDLES))
    _UNITS[unit.handle] = unit
    handle = unit.handle

    def forward(*args: Any, **kwargs: Any) -> Any:
        return unit_call(handle, args, kwargs)

    unit.stand_in = forward
    return unit


@contextmanager
def stubs(units: Sequence[Unit]) -> Iterator[None]:
    """While a graph around these units is captured or run, their calls go to :func:`unit_call`, and no hook runs."""
    for unit in units:
        _install(unit)
    try:
        yield
    finally:
        for unit in units:
            _restore(unit)


@contextmanager
def as_it_is(unit: Unit) -> Iterator[None]:
    """The unit as it is, within :func:`stubs`."""
    standing = bool(unit.saved)
    if standing:
        _restore(unit)
    try:
        yield
    finally:
        if standing:
            _install(unit)


def _install(unit: Unit) -> None:
    own = unit.module.__dict__
    unit.saved.append({k: own[k] for k in ("forward", *_HOOKS) if k in own})
    own["forward"] = unit.stand_in
    for name in _HOOKS:
        own[name] = OrderedDict()


def _restore(unit: Unit) -> None:
    own = unit.module.__dict__
    own.pop("forward", None)
    own.update(unit.saved.pop())


@opaque
def unit_call(handle: int, args: Any, kwargs: Any) -> Any:
    """What a graph holds in place of a unit.

    On fake tensors it answers with fake outputs, from the unit's own forward.
    """
    unit = _UNITS[handle]
    mode = fake_mode_of(pytree.tree_leaves((args, kwargs)))
    if in_functorch():
        raise UnsupportedGraphError(
            f"block '{unit.path}' is compiled by itself, and is called under a transform of torch.func",
            remedy="call it on the whole batch, or compile the model without regions",
        )
    if mode is None:  # a captured graph hands the call to its skeleton
        raise UnsupportedGraphError(
            "the model ran without being compiled, so nothing would clip its gradients",
            remedy="switch torch.compile on again (TORCHDYNAMO_DISABLE, torch.compiler.set_stance)",
        )
    with taking_real_tensors(mode):  # a block may read what belongs to another
        outputs = _fake_call(unit, args, kwargs)
    _check_outputs(unit, outputs)
    return outputs


def _fake_call(unit: Unit, args: Any, kwargs: Any) -> Any:
    module, stand_in = unit.module, unit.module.__dict__.pop("forward", None)
    try:
        if not unit.sharded:
            with as_it_is(unit):
                return torch.func.functional_call(module, _fake_state(module, None, fsdp=False), args, kwargs)
        policy = mixed_precision(module)
        if policy.param_dtype is not None and policy.cast_forward_inputs:
            args, kwargs = _cast((args, kwargs), policy.param_dtype)
        state, before = _fake_state(module, policy.param_dtype, fsdp=True), f"{unit.path}." if unit.path else ""
        inside = tuple(f"{child.path.removeprefix(before)}." for child in unit.children)
        own = {n: x for n, x in state.items() if not n.startswith(inside)}
        with stubs(unit.children):  # which answer for themselves
            outputs = torch.func.functional_call(module, own, args, kwargs)
        return outputs if policy.output_dtype is None else _cast(outputs, policy.output_dtype)
    finally:
        if stand_in is not None:
            module.__dict__["forward"] = stand_in


def _fake_state(module: nn.Module, dtype: torch.dtype | None, *, fsdp: bool) -> dict[str, Tensor]:
    held = nn.Module.named_parameters(module)  # as they are: wrappers rename theirs
    whole = gathered_parameters(module) if fsdp else ()  # ahead of the forward: `unshard`, schedules of pipelines
    state = {n: _fake(p, dtype if p.is_floating_point() else None, fsdp and id(p) not in whole) for n, p in held}
    return state | {n: _fake(b, None, False) for n, b in module.named_buffers()}


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, values)


def _fake(tensor: Tensor, dtype: torch.dtype | None, fsdp: bool) -> Tensor:
    wanted = dtype or tensor.dtype
    if is_distributed(tensor):
        return fake_gathered(tensor, wanted, fsdp=fsdp)
    return torch.empty(tensor.shape, dtype=wanted, device=tensor.device, requires_grad=tensor.requires_grad)


def _check_outputs(unit: Unit, outputs: Any) -> None:
    plain = (Tensor, type(None), bool, int, float, str)
    if isinstance(outputs, Tensor) or outputs is None:
        return
    if not isinstance(outputs, (tuple, list)) or not all(isinstance(x, plain) for x in pytree.tree_leaves(outputs)):
        raise UnsupportedGraphError(
            f"block '{unit.path}' returns a {type(outputs).__name__}: blocks that are compiled by themselves return "
            "tensors, or tuples of them",
            remedy="return a tuple, or compile the model without regions",
        )
