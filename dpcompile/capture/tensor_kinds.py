"""Which kinds of tensors a private model may consist of and be called with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpcompile._torch.tensors import is_fake
from dpcompile.distributed.shards import is_distributed
from dpcompile.errors import UnsupportedGraphError

__all__ = ["check_model", "check_tensor"]


def check_tensor(what: str, tensor: Tensor) -> None:
    """Raise UnsupportedGraphError unless the tensor is a plain one, of numbers that lie in memory one by one.

    Args:
        what: "input 'x'", for the message.
        tensor: of a call, or a parameter or buffer.
    """
    if type(tensor) in _PLAIN and tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized):
        return  # as nearly all are, at every call
    found = next(_oddities(tensor), None)
    if found is not None:
        kind, remedy = found
        raise UnsupportedGraphError(f"{what} is {kind}, which dpcompile cannot follow", remedy=remedy)


def check_model(module: nn.Module, *, sharded: bool = False) -> None:
    """Raise UnsupportedGraphError unless all parameters and buffers are plain tensors.

    With ``sharded`` parameters are those of ``fully_shard``, which are gathered when they are used, or of
    ``parallelize_module``.
    """
    for name, parameter in module.named_parameters():
        if sharded and is_distributed(parameter):
            continue
        check_tensor(f"parameter '{name}'", parameter)
    for name, buffer in module.named_buffers():
        check_tensor(f"buffer '{name}'", buffer)


def _oddities(tensor: Tensor) -> Iterator[tuple[str, str]]:
    if tensor.is_nested:
        yield (
            "a nested (ragged) tensor",
            "pass a padded tensor and the lengths, one per example; the loss of an example is then a masked sum",
        )
    elif tensor.layout is not torch.strided:
        yield f"a tensor with layout {tensor.layout}", "pass it dense (x.to_dense()), or its indices and values"
    elif tensor.is_quantized:
        yield f"quantised ({tensor.dtype})", "dequantize() it, or keep int8 values and scales in plain buffers"
    elif is_distributed(tensor):
        yield (
            "a DTensor that torch.distributed.fsdp.fully_shard did not make, or that it made after dp_compile",
            "call parallelize_module first, then fully_shard on the blocks and the model, then dp_compile; pass inputs "
            "as plain tensors, each rank its own examples",
        )
    elif not (type(tensor) in _PLAIN or _renamed(tensor) or is_fake(tensor)):
        yield (
            f"a {type(tensor).__module__}.{type(tensor).__qualname__}, a subclass of torch.Tensor",
            "pass the plain tensor inside it (x.as_subclass(torch.Tensor), x.full_tensor(), x.get_data(), ..)",
        )


def _renamed(tensor: Tensor) -> bool:
    """A parameter of a class of its own that computes like any other."""
    plain = all(
        getattr(type(tensor), f) == getattr(nn.Parameter, f) for f in ("__torch_dispatch__", "__torch_function__")
    )
    return isinstance(tensor, nn.Parameter) and plain


_PLAIN: set[Any] = {Tensor, nn.Parameter, nn.Buffer}
