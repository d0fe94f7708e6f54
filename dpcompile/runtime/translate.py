"""From what Dynamo and Inductor raise to an error that a user can act on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dpcompile._torch.autograd import entered_modes
from dpcompile._torch.dynamo import (
    BackendCompilerFailed,
    TorchDynamoException,
    Unsupported,
    recompile_reason,
    user_place,
)
from dpcompile.errors import DPCompileError, UnsupportedGraphError, running_line

__all__ = ["found_nothing", "translated"]


def found_nothing(error: Exception) -> bool:
    """Whether Dynamo passed the function over; it does so ever after, also where it could compile it."""
    return "no compiled frames" in str(error)


def translated(error: Exception, check_arguments: Callable[[], Any]) -> DPCompileError | TypeError | None:
    """The error to raise instead of ``error``, or None to let it pass.

    Args:
        error: what a compiled call raised.
        check_arguments: raises a DPCompileError or a TypeError if the call's arguments are at fault; that explains more
            than what followed from it.
    """
    if isinstance(error, DPCompileError):
        return error
    if found_nothing(error) and entered_modes():
        return UnsupportedGraphError(
            f"the model is called under {' and '.join(entered_modes())}, which sees each of torch's operations, and "
            "Dynamo compiles nothing there",
            where=running_line(),
            remedy="use that mode with an ordinary model (model.state_dict() loads into one), or leave it for the call",
        )
    if found_nothing(error):
        return UnsupportedGraphError(
            "the model cannot be compiled here: torch.compile found nothing to compile",
            remedy="switch torch.compile on again (TORCHDYNAMO_DISABLE, or Dynamo's config)",
        )
    try:
        check_arguments()
    except (DPCompileError, TypeError) as at_fault:
        return at_fault
    inner = error
    while isinstance(inner, BackendCompilerFailed):
        inner = inner.inner_exception
    if isinstance(inner, DPCompileError):
        return inner
    own = _OWN_ERROR.search(str(error)) if isinstance(error, TorchDynamoException) else None
    if own is not None:
        ours = next((e for e in _causes(error) if isinstance(e, DPCompileError)), None)
        if ours is not None and type(ours).__name__ == own["kind"]:
            return ours
        return UnsupportedGraphError(
            f"the model fails on these inputs: {own['kind']}: {own['text']}",
            where=_place(error),
            remedy=next(
                (r for part, r in _OWN_REMEDIES if part in own["text"]), "make sure that the plain model runs on them"
            ),
        )
    if isinstance(error, Unsupported) and isinstance(error.__cause__, TypeError):
        return UnsupportedGraphError(
            f"the model fails on these inputs: TypeError: {_first_paragraph(str(error.__cause__))}",
            where=_place(error),
            remedy="make sure that the plain model runs on them",
        )
    if isinstance(error, Unsupported) and "a `lock` context manager" in str(error):
        return UnsupportedGraphError(
            "the model takes a lock, as models do that prepare something on their first call",
            where=user_place(error),
            remedy="call the model once before it is made private, under torch.no_grad()",
        )
    if any(words in f"{inner} {error}" for words in _OF_VALUES):
        return UnsupportedGraphError(
            "the model branches on the values of tensors, or takes a size from them",
            where=user_place(error),
            remedy="use torch.where, or shapes that do not depend on values (torch.nn.functional.one_hot(x, n).sum(0) "
            "for torch.bincount); pass what is known before the call as a Python number; give layers no random depth "
            "(layerdrop=0), and experts of Transformers experts_implementation='grouped_mm' (cut over ranks: "
            "ep_implementation='all_reduce')",
        )
    if isinstance(error, Unsupported):
        return UnsupportedGraphError(
            f"the model cannot be captured as one graph: {_first_paragraph(str(error))}",
            where=user_place(error),
            remedy=_remedy(str(error)),
        )
    if "RecompileLimit" in type(error).__name__ or "recompile_limit" in str(error):
        number = _NUMBER.match(recompile_reason(error) or "")
        if number is not None:
            return UnsupportedGraphError(
                f"the model was recompiled too often: the Python number {number['name']} keeps changing, and it is "
                "used where a graph cannot have it as an input",
                where=user_place(error),
                remedy="make it a tensor: pass torch.tensor(value), with in_dims={'its name': None}, or hold it in a "
                "buffer, and compute with that in forward",
            )
        return UnsupportedGraphError(
            "the model was recompiled too often: its inputs keep changing in a way that the graph depends on",
            where=user_place(error),
            remedy="use dynamic=True, or fixed physical batch sizes (PoissonLoader gives them)",
        )
    if isinstance(error, TorchDynamoException) or "\nfrom user code:" in str(error):  # Dynamo's own assertions
        return UnsupportedGraphError(
            f"the model cannot be compiled: {type(inner).__name__}: {_first_paragraph(str(inner))}",
            where=user_place(error),
            remedy="make sure that the plain model runs on these inputs, and under torch.compile with fullgraph=True",
        )
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What it was raised from, or while that was handled: tracing wraps errors of what it runs on fake tensors."""
    while (cause := error.__cause__ or error.__context__) is not None:
        yield cause
        error = cause


def _place(error: Exception) -> str | None:
    """The line in the model that fails; in one that is made of torch's layers alone, the line that calls it."""
    place = user_place(error)
    installed = place is None or place.startswith(os.path.dirname(torch.__file__))
    return running_line() or place if installed else place


def _remedy(text: str) -> str:
    """What to do about a graph break."""
    return next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, text)), _SIDE_EFFECTS)


_SIDE_EFFECTS = (
    "keep Python side effects, prints and branches on tensor values out of forward; move them around the call of the "
    "model, or allow graph breaks with dp_compile(..., regions='breaks')"
)
_PACKED = (
    "pack_padded_sequence, a recurrent layer and pad_packed_sequence work in forward, with lengths as a tensor of the "
    "call; what works on packed rows (.data, batch_sizes): compute it on the padded tensor, masked by the lengths"
)
_OWN_REMEDIES = (
    ("'Padded' object", _PACKED),
    (
        "was not found while torch.compile tracing",  # DTensor remembers the first of two meshes that are alike
        "make one DeviceMesh of all dimensions in a process, and take others out of it (mesh['tp']): of two that are "
        "alike torch takes the groups of the first",
    ),
)
_REMEDIES = (
    (r"pack_padded_sequence|pad_packed_sequence|pack_sequence|PackedSequence", _PACKED),
    (r"[Ss]parse", "compute with dense tensors in forward, or with indices and values (index_add, gather)"),
    (r"[Qq]uantize|torch\.ao\.|torch\.ops\.quantized",
     "dequantise frozen weights in forward (w_int8.float() * scale), or leave quantisation to the trained model"),
    (r"masked_tensor|MaskedTensor|nested", "use a plain padded tensor and a mask"),
    (r"backwards? hook", "remove the module's backward hooks, or do it in an autograd.Function in forward"),
    (r"torch\.autograd\.grad|\.backward\(|requires_grad_",
     "take derivatives inside the model with torch.func.grad, jvp or vjp"),
    (r"Data-dependent|data-dependent|dynamic shape operator",
     "choose by torch.where or by masks of fixed size, not by Python branches, boolean indexing or sizes that depend "
     "on values"),
)  # fmt: skip


_NUMBER = re.compile(r"(?P<name>.+?) == -?[\d.]+(e[+-]?\d+)?$")
_OF_VALUES = (
    "data-dependent expression",
    "Data-dependent branching",
    "PendingUnbacked",
    "Cannot convert symbols to int",  # a size that nobody knows before the call
)
_OWN_ERROR = re.compile(
    r"(?:got|raised exception) (?P<kind>\w+)\((?:\[ConstantVariable\(str: )?(?P<quote>['\"])(?P<text>.*?)(?P=quote)\)",
    re.DOTALL,
)


def _first_paragraph(text: str) -> str:
    return " ".join(text.strip().split("\n\n")[0].split())
