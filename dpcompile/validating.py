"""``validate``: everything about a model that would be refused, found at once and before training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dpcompile._torch import pytree
from dpcompile.api import dp_compile
from dpcompile.batchnorm import batch_normalised, has_statistics, replace_batchnorm
from dpcompile.capture.tensor_kinds import check_tensor
from dpcompile.errors import DPCompileError, ExampleMixingError, PrivacyError, UnsupportedGraphError
from dpcompile.module import PrivateModule, engine_of
from dpcompile.runtime.replicas import inner_module, refuse_wrapped

__all__ = ["Problems", "validate"]

_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Ran:
    """Arguments of a module, and what it returned."""

    call: _Call
    result: Any


class Problems(list[DPCompileError]):
    """What was found, as errors that were not raised; empty if nothing was. ``print`` it."""

    def __str__(self) -> str:
        if not self:
            return "no problem was found"
        return f"{len(self)} problem{'s' * (len(self) > 1)}:\n" + "\n".join(f"{i}. {p}" for i, p in enumerate(self, 1))


def validate(model: nn.Module, *args: Any, in_dims: Any = 0, regions: str | None = None, **kwargs: Any) -> Problems:
    """Everything that ``dp_compile`` and ``make_private`` would refuse in this model, each with its remedy.

    Layers are looked at first. Then a copy in which BatchNorm is replaced is captured and proved, and where that is
    refused, each part of it by itself with the arguments that it got, for one proof stops at the first refusal, and
    then the whole with stand-ins for them. One ``forward`` may hold more than one problem itself: the others are told
    when the first is mended. Neither the model nor the random state changes.

    Args:
        model: as it would be made private.
        *args: of a call in training, two examples or more.
        in_dims: as in :func:`dpcompile.dp_compile`.
        regions: likewise.
        **kwargs: of the call.

    Returns:
        The problems; none means that these very arguments are fine, in this training mode.

    Raises:
        Exception: what the plain model raises on these arguments.
    """
    model = engine_of(model).module if isinstance(inner_module(model), PrivateModule) else model
    found = Problems(_of_layers(model))
    if any(is_lazy(p) for p in model.parameters()) or any(isinstance(p, UnsupportedGraphError) for p in found):
        return found
    try:
        mended = _with_group_norm(copy.deepcopy(model))
    except (TypeError, RuntimeError, DPCompileError):  # no copy, or layers that cannot be replaced: as it is
        return _with(found, None if found else _refusal(model, (args, kwargs), in_dims, regions))
    calls = _calls(mended, (args, kwargs))
    for problem in _of_graph(mended, calls, "", _rows(args, kwargs, in_dims), in_dims, regions):
        _with(found, problem)
    return found


def _of_layers(model: nn.Module) -> Iterator[DPCompileError]:
    """Problems that are seen without a call."""
    try:
        refuse_wrapped(model)
    except DPCompileError as error:
        yield error
        return
    lazy = [name for name, p in (*model.named_parameters(), *model.named_buffers()) if is_lazy(p)]
    if lazy:
        yield UnsupportedGraphError(
            f"{len(lazy)} parameters have no size yet: {', '.join(lazy[:4])}",
            remedy="call the model once, under torch.no_grad()",
        )
    elif not any(p.requires_grad for p in model.parameters()):
        yield PrivacyError("the model has no trainable parameter", remedy="unfreeze what is to be trained")
    for name, layer in batch_normalised(model).items():
        yield ExampleMixingError(
            f"{type(layer).__name__} '{name}' in training mode normalises every example by the statistics of the whole "
            "batch",
            remedy="dpcompile.replace_batchnorm(model)"
            + (", or call .eval() on it" if has_statistics([layer]) else ""),
        )
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.training and layer.track_running_stats:
            yield ExampleMixingError(
                f"{type(layer).__name__} '{name}' in training mode writes statistics of the batch into its buffers",
                remedy="make it with track_running_stats=False, or call .eval() on it",
            )
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if kind == "parameter" and tensor.requires_grad and tensor.is_complex():
                yield UnsupportedGraphError(
                    f"parameter '{name}' is complex", remedy="hold it as a real one, with torch.view_as_real"
                )
            try:
                if not is_lazy(tensor):
                    check_tensor(f"{kind} '{name}'", tensor)
            except DPCompileError as error:
                yield error


def _with_group_norm(model: nn.Module) -> nn.Module:
    """Without the layers that were told of already."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
            layer.eval()
    return replace_batchnorm(model) if batch_normalised(model) else model


def _of_graph(
    module: nn.Module, calls: Mapping[str, _Ran], name: str, rows: int, in_dims: Any, regions: str | None
) -> Iterator[DPCompileError]:
    """Of one module: what its parts are refused for, and then its own forward, with stand-ins in their place."""
    own = _refusal(module, calls[name].call, in_dims, regions)
    if own is None:
        return
    told = []
    for child, part in module.named_children():
        path = f"{name}.{child}" if name else child
        if path in calls and _rows(*calls[path].call, 0) == rows and any(p.requires_grad for p in part.parameters()):
            problems = list(_of_graph(part, calls, path, rows, 0, regions))
            if problems and _can_stand_in(calls[path].result, rows):
                setattr(module, child, _StandIn(calls[path].result))
            told += problems
    yield from told
    own = _refusal(module, calls[name].call, in_dims, regions) if told else own
    if own is not None and not any(p.where == own.where and type(p) is type(own) for p in told):
        yield own


class _StandIn(nn.Module):
    """Returns tensors of the same sizes, each row of them made of this row of the arguments."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        leaves, self.structure = pytree.tree_flatten(result)
        self.sizes = [(x.shape[1:], x.dtype) for x in leaves]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        row = given.flatten(1).float().mean(1)
        leaves = [
            row.to(dtype).reshape(-1, *[1] * len(size)).expand(-1, *size) * torch.ones(size, dtype=dtype)
            for size, dtype in self.sizes
        ]
        return pytree.tree_unflatten(leaves, self.structure)


def _can_stand_in(result: Any, rows: int) -> bool:
    leaves = pytree.tree_leaves(result)
    return bool(leaves) and all(isinstance(x, Tensor) and x.ndim > 0 and len(x) == rows for x in leaves)


def _refusal(module: nn.Module, call: _Call, in_dims: Any, regions: str | None) -> DPCompileError | None:
    """Why a call of it is not private."""
    args, kwargs = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, call)
    with torch.random.fork_rng():
        try:
            private: Any = dp_compile(module, in_dims=in_dims, regions=regions, backend="eager", verify=False)
            private.trace(*args, **kwargs)
        except DPCompileError as error:
            return error
    return None


def _calls(model: nn.Module, call: _Call) -> dict[str, _Ran]:
    """What every submodule is called with first, by name, and what it returns."""
    found: dict[str, _Ran] = {}
    hooks = []
    for name, module in model.named_modules():

        def note(_: Any, args: Any, kwargs: Any, result: Any, name: str = name) -> None:
            found.setdefault(name, _Ran((args, kwargs), result))

        hooks.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model(*call[0], **call[1])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _rows(args: Any, kwargs: Any, in_dims: Any) -> int:
    """How many examples its tensors have along dimension 0; 0 where they do not agree."""
    sizes = {len(x) if x.ndim else 0 for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    return sizes.pop() if len(sizes) == 1 and in_dims == 0 else 0


def _with(found: Problems, problem: DPCompileError | None) -> Problems:
    """With this one too, unless it is there."""
    if problem is not None and str(problem) not in [str(p) for p in found]:
        found.append(problem)
    return found
