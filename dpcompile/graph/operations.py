"""What an operation is called, and what is known of operations by name."""

from __future__ import annotations

from typing import Any

import torch

from dpcompile._torch import OpOverload, OpOverloadPacket, pytree

__all__ = [
    "CONSTANTS",
    "COPIES",
    "FILLED",
    "IN_THE_SAME_MEMORY",
    "KEEPS_VALUES",
    "REARRANGES",
    "RESHAPES",
    "WRITES_BY_INDEX",
    "ZEROS",
    "has_size_of_values",
    "operation_name",
    "takes_only_shapes",
]

_OWN = ("aten", "prims", "dpcompile")
# What is known of operations by name, beside the rules of the proof (`dpcompile.proof.rules`); each kind is said once,
# here. Every element of the result is one of the first operand's, and every element of that once, in other places:
RESHAPES = frozenset({"view", "_unsafe_view", "reshape"})  # `view` also reads the same bits as another dtype
REARRANGES = RESHAPES | {"squeeze", "unsqueeze", "permute", "transpose", "t"}
# in the same places, perhaps rounded:
COPIES = frozenset({"clone", "alias", "_to_copy", "convert_element_type"})
# Some elements of the first operand, or one of them several times:
SELECTS = frozenset({"slice", "select", "expand"})
KEEPS_VALUES = REARRANGES | COPIES | SELECTS | {"detach", "device_put", "lift_fresh_copy"}
# The result lies in the memory of the first operand:
IN_THE_SAME_MEMORY = REARRANGES | SELECTS | {"alias", "detach", "getitem", "split", "split_with_sizes", "unbind"}
# All elements are zero, or one number:
ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})
FILLED = {"full": "fill_value", "full_like": "fill_value", "new_full": "fill_value", "scalar_tensor": "s"}
# Computed where they are read, in the same loop:
CONSTANTS = frozenset({"full", "full_like", "iota", "arange", "scalar_tensor", "empty", "new_full", "zeros", "ones"})
WRITES_BY_INDEX = ("index_put", "_unsafe_index_put", "index_add", "index_copy", "scatter", "scatter_add",
    "scatter_reduce")  # fmt: skip
# Only the shape of operands counts:
_FACTORIES = frozenset(
    {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like", "new_zeros",
     "new_ones", "new_full", "new_empty", "new_empty_strided", "sym_size", "sym_stride", "sym_numel", "empty_permuted"}
)  # fmt: skip


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
