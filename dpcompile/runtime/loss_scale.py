"""Loss scaling (Micikevicius et al. 2018, section 3.2) by ``torch.amp.GradScaler``: clip the unscaled gradients.

A backward that starts at ``scaler.scale(loss)`` runs on scaled cotangents, so that float16 does not underflow. Norms
are those of the unscaled gradients, and so are the clipped sums: the scale leaves again in the clip weights. What
``scale()`` returns carries a hook that says, when a backward comes, at which scale it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from dpcompile._torch.autograd import current_backward
from dpcompile._torch.optim import scale_tensor
from dpcompile.errors import PrivacyError

__all__ = ["Unscaling", "check_scaler", "notice_scalers", "refused_scale", "scaled_like_this", "scales_of"]

_STARTED: dict[int, list[Tensor]] = {}  # of the latest backwards: the scales of the losses that each came through
_REMEMBERED = 16


@functools.lru_cache(maxsize=1)
def notice_scalers() -> None:
    """From now on what ``GradScaler.scale`` returns says when its backward runs; what it computes is the same."""
    original = GradScaler.scale

    @functools.wraps(original)
    def scale(self: GradScaler, outputs: Any) -> Any:
        result = original(self, outputs)
        if self.is_enabled() and not torch.compiler.is_compiling():
            result = result if isinstance(result, (Tensor, list, tuple)) else list(result)
            scaled = [x for x in _tensors(result) if x.requires_grad]
            value = scale_tensor(self) if scaled else None
            for tensor in scaled:
                tensor.register_hook(lambda _: _note(value))
        return result

    GradScaler.scale = scale  # type: ignore[method-assign]


def scales_of(backward: int) -> list[Tensor]:
    """The scale ``[]`` of the losses that this backward came through; empty if it is not scaled.

    Raises:
        PrivacyError: losses of several scales.
    """
    found = _STARTED.get(backward, [])
    if len(found) > 1 and len({float(s) for s in found}) > 1:
        raise PrivacyError(
            "one backward came through losses that were scaled differently",
            remedy="scale the sum of the losses with one gradient scaler",
        )
    return found[:1]


def refused_scale(backward: int) -> PrivacyError | None:
    """Why this backward of a pipeline's last stage is refused, if its loss was scaled, unknown to other stages."""
    if not _STARTED.get(backward):
        return None
    return PrivacyError(
        "the loss of a pipeline's last stage was scaled by a gradient scaler, of which the other stages do not know",
        remedy="train in bfloat16 or float32, without torch.amp.GradScaler",
    )


def scaled_like_this(outputs: Sequence[Tensor]) -> None:
    """A backward that starts at these tensors, within the one that is running, runs at its scale."""
    for scale in scales_of(current_backward()):
        for tensor in outputs:
            tensor.register_hook(lambda _, scale=scale: _note(scale))


class Unscaling:
    """Takes the loss scale of a forward's backward into its mask, before that backward computes anything.

    Args:
        mask: float32 ``[B]``, which compiled graphs read in their backward; of this forward alone.
    """

    def __init__(self, mask: Tensor) -> None:
        self._mask, self._done = mask, False

    def before_backward_of(self, outputs: Sequence[Any]) -> None:
        """Of a compiled graph that ran forward with the mask."""
        for node in {x.grad_fn for x in outputs if isinstance(x, Tensor) and x.grad_fn is not None}:
            node.register_prehook(self._begin)

    def _begin(self, _: Any) -> None:
        scales = _STARTED.get(current_backward())
        if scales and not self._done:
            self._done = True
            self._mask.data.div_(scales[0].to(self._mask.device))  # autograd has saved it: its version stays


def check_scaler(optimizer: Any, scales: Sequence[Tensor]) -> None:
    """Raise PrivacyError if the gradient scaler that steps this optimizer is not the one that scaled the loss.

    Args:
        optimizer: ``GradScaler.step`` has put ``grad_scale`` and ``found_inf`` there, or nobody has.
        scales: of the backwards since the last step.
    """
    values = {float(s) for s in scales}
    found, given = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if given is not None and (not values or float(given) != float(scales[-1])):
        raise PrivacyError(
            f"the gradient scaler that steps the optimizer is at scale {float(given):g}, and the backward ran at "
            f"{f'scale {float(scales[-1]):g}' if values else 'none that is known'}",
            remedy="call torch.amp.GradScaler's own scale() on the loss, outside compiled functions, of the same "
            "scaler, and update() after step(); or step the optimizer without a scaler",
        )
    if found is not None and float(found):
        raise PrivacyError(
            "the gradient scaler found infinite clipped sums, and skipping a step because of them would depend on the "
            "data",
            remedy="hold trained parameters in float32 or bfloat16, and let autocast narrow them",
        )


def _note(scale: Tensor | None) -> None:
    assert scale is not None
    _STARTED.setdefault(current_backward(), []).append(scale)
    while len(_STARTED) > _REMEMBERED:
        del _STARTED[next(iter(_STARTED))]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for member in value:
            yield from _tensors(member)
