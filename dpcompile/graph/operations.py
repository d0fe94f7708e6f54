"""What an operation is called, and which operations take no values."""

from __future__ import annotations

from typing import Any

import torch

from dpcompile._torch import OpOverload, OpOverloadPacket, pytree

__all__ = ["has_size_of_values", "operation_name", "takes_only_shapes"]

_OWN = ("aten", "prims", "dpcompile")
_FACTORIES = {
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like", "new_zeros",
    "new_ones", "new_full", "new_empty", "new_empty_strided", "sym_size", "sym_stride", "sym_numel", "empty_permuted",
}  # fmt: skip


def operation_name(target: object) -> str:
    """``add`` for ``aten.add.Tensor``, ``mylib::add`` for another library's: no two operations share a name.

    **Guarantee.** A name without ``::`` belongs to torch or to this package, so what is known of ``add`` is never
    believed of another library's operation that is called the same.
    """
    if isinstance(target, OpOverload):
        target = target.overloadpacket
    if isinstance(target, OpOverloadPacket):
        namespace, _, name = str(target).partition(".")
        return name if namespace in _OWN else f"{namespace}::{name}"
    name = getattr(target, "__name__", str(target))
    return name if getattr(target, "__module__", "") == "_operator" else f"python::{name}"


def takes_only_shapes(target: object) -> bool:
    """Whether an operation takes only the shape of its operands, not their values."""
    return operation_name(target) in _FACTORIES


def has_size_of_values(target: Any, args: Any) -> bool:
    """Whether the size of an operation's result goes by the values of its operands."""
    if torch.Tag.dynamic_output_shape not in getattr(target, "tags", ()):
        return False
    masks = (x for x in pytree.tree_leaves(args[1:]) if isinstance(x, torch.Tensor))
    return operation_name(target) != "index" or any(x.dtype in (torch.bool, torch.uint8) for x in masks)
