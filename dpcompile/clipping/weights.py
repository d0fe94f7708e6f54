"""From norms to weights: how much of every example's gradient may pass.

Each function takes the norms and answers with weights such that ``weight * norm <= C`` for every example.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from dpcompile.clipping.groups import Clipping, ClippingFunction

__all__ = ["apply", "clip_group", "clip_weights", "narrowed", "own_norms", "unscaled"]
_STABILITY = 0.01  # gamma of Bu et al. 2023, section 4
# Products below 1e-38 vanish in float32: of a norm as small as this it is only known that it is not larger.
_UNKNOWN = 1e-28


def clip_group(
    squared: Sequence[Tensor], mask: Tensor, *, clipping: Clipping, bound: float | Tensor, mean_of: int | None
) -> tuple[Tensor, Tensor]:
    """The squared norm of one clip group and its weights, both ``[B]``.

    Args:
        squared: ``[B]`` of every parameter of the group.
        mask: see :func:`clip_weights`, as for the rest.
        clipping: "
        bound: "
        mean_of: where the loss is a mean over the batch, how many times ``mask``'s examples the losses are that it is
            the mean of: a gradient in the graph is ``1 / (mean_of * B)`` of the example's own. None where it is a sum.
    """
    total = sum(squared[1:], start=squared[0]) if squared else torch.zeros_like(mask)
    return total, clip_weights(total, mask, clipping=clipping, bound=bound, scale=_scale(mask, mean_of))


def own_norms(squared: Sequence[Tensor], mask: Tensor, mean_of: int | None) -> Tensor:
    """The norms that the user sees, float32 ``[B]``: of the examples' own gradients, over all groups."""
    total = sum(squared[1:], start=squared[0]) if squared else torch.zeros_like(mask)
    return (total.sqrt() * _scale(mask, mean_of)).to(torch.float32)


def unscaled(mask: Tensor) -> Tensor:
    """``[B]``, float64: what makes a gradient in the graph that of the loss without its loss scale, as a factor."""
    return torch.where(mask > 0, mask.double(), 1.0)


def _scale(mask: Tensor, mean_of: int | None) -> Tensor:
    return unscaled(mask) * (1 if mean_of is None else mask.shape[0] * mean_of)


def narrowed(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights in the dtype of the sums that take them.

    **Guarantee.** No weight grows but by rounding to nearest: below the smallest normal number, where that may be much,
    it is 0.

    Args:
        weights: ``[B]``, finite and not negative.
        dtype: float32 or float64.
    """
    if dtype == torch.float64:
        return weights.to(dtype)
    limits = torch.finfo(dtype)
    return torch.where(weights < limits.tiny, 0.0, weights.clamp_max(limits.max)).to(dtype)


def clip_weights(
    squared_norms: Tensor, mask: Tensor, *, clipping: Clipping, bound: float | Tensor, scale: Tensor
) -> Tensor:
    """The weight of every example.

    **Guarantee.** For every example ``weight >= 0`` and ``weight * sqrt(squared_norm) <= bound``; it is exactly 0 where
    the norm is no finite float32 number and where ``mask`` is 0.

    Args:
        squared_norms: ``[B]``, of the gradients as they stand in the graph; float64, as squares of float32 numbers may
            be no float32 numbers.
        mask: ``[B]``, 0 for padding, and for an example 1, or 1 over the scale of the loss (`loss_scale`).
        clipping: "flat" is ``min(1, C/norm)`` (Abadi et al. 2016, arXiv:1607.00133, algorithm 1), and so are
            "per_layer" and "per_block" within their group (McMahan et al. 2018, arXiv:1710.06963, section 2.3);
            "automatic" is ``C/(norm + 0.01)`` (Bu et al. 2023, arXiv:2206.07136, AUTO-S). A function gets the norms
            ``[B]`` (and C, if it takes two arguments) and returns weights, which are then cut to ``C/norm``.
        bound: C, of this group; a tensor of shape ``[B]`` or of one number is one too.
        scale: ``[B]``, what a gradient in the graph must be multiplied by to be the example's own: B under a mean loss,
            over the scale of the loss.

    Returns:
        ``[B]``, float64, for the gradients as they stand in the graph: ``scale`` is in it.
    """
    squared_norms = squared_norms.double()
    norms = squared_norms.sqrt() * scale
    ceiling = bound / (squared_norms.sqrt().clamp_min(_UNKNOWN) * scale)
    if callable(clipping):
        weights = torch.minimum(apply(clipping, norms, bound).to(norms.dtype).clamp_min(0), ceiling)
    elif clipping == "automatic":
        weights = bound / (norms + _STABILITY)
    else:
        weights = ceiling.clamp_max(1.0)
    usable = torch.isfinite(norms.float()) & torch.isfinite(weights) & (mask > 0)
    return torch.where(usable, weights * scale, torch.zeros_like(weights))


def apply(function: ClippingFunction, norms: Tensor, bound: float | Tensor) -> Tensor:
    """Call a function of the user, which takes C if it has two arguments."""
    return function(norms, bound) if _takes_bound(function) else function(norms)


def _takes_bound(function: ClippingFunction) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    return len(required) >= 2
