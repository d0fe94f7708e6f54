"""What an operation is called."""

from __future__ import annotations

from dpcompile._torch import OpOverload, OpOverloadPacket

__all__ = ["operation_name"]

_OWN = ("aten", "prims", "dpcompile")


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
