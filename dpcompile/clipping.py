"""From norms to weights: how much of every example's gradient may pass.

Each function takes the norms and answers with weights such that ``weight * norm <= C`` for every example.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from dpcompile._torch import enable_python_dispatcher, fake_mode_of, fake_vector, lengths_of, trace_like
from dpcompile.axis import Examples, Shared, Whole
from dpcompile.errors import PrivacyError
from dpcompile.joint import JointGraph
from dpcompile.proof import prove
from dpcompile.sizes import size

__all__ = [
    "Clipping",
    "ClippingFunction",
    "ProvenClipping",
    "clip_group",
    "clip_weights",
    "group_bound",
    "group_of",
    "narrowed",
    "own_norms",
    "proven",
    "unscaled",
    "validate_clipping",
]

ClippingFunction: TypeAlias = Callable[..., Tensor]
Clipping: TypeAlias = "str | ClippingFunction"

NAMES = ("flat", "automatic", "per_layer", "per_block")
_READS = ("__array__", "__dlpack__", "data_ptr", "numpy", "storage", "tolist", "untyped_storage")
_STABILITY = 0.01  # gamma of Bu et al. 2023, section 4
# Products below 1e-38 vanish in float32: of a norm as small as this it is only known that it is not larger.
_UNKNOWN = 1e-28


def validate_clipping(clipping: Clipping, max_grad_norm: float) -> None:
    """Refuse what is no clipping.

    Raises:
        PrivacyError: an unknown name, or a bound that is not a positive finite number.
    """
    number = isinstance(max_grad_norm, (int, float)) and not isinstance(max_grad_norm, bool)
    if not (number and math.isfinite(max_grad_norm) and max_grad_norm > 0):
        raise PrivacyError(
            f"max_grad_norm must be a positive finite number, got {max_grad_norm!r}",
            remedy="it is C, the largest norm one example's gradient may have; 1.0 is a common choice",
        )
    if not callable(clipping) and clipping not in NAMES:
        raise PrivacyError(
            f"unknown clipping {clipping!r}",
            remedy=f"use one of {', '.join(map(repr, NAMES))}, or a function from norms [B] to weights [B]",
        )


def group_of(clipping: Clipping, parameter: str) -> str:
    """Which parameters are clipped together: all, those of one layer, or those of one block.

    A block is an element of the outermost numbered container (``blocks.3``), else the outermost module.
    """
    return _group(clipping, parameter) if isinstance(clipping, str) else ""


@functools.lru_cache(maxsize=1 << 16)
def _group(clipping: str, parameter: str) -> str:
    path = parameter.split(".")[:-1]
    if clipping == "per_layer":
        return ".".join(path)
    if clipping == "per_block":
        numbered = next((i for i, part in enumerate(path) if part.isdigit()), 0)
        return ".".join(path[: numbered + 1])
    return ""


def group_bound(max_grad_norm: float, groups: int) -> float:
    """C of each of several groups: their squares add up to that of the whole."""
    return float(max_grad_norm) / max(groups, 1) ** 0.5


def clip_group(
    squared: Sequence[Tensor], mask: Tensor, *, clipping: Clipping, bound: float | Tensor, mean_of: int | None
) -> tuple[Tensor, Tensor]:
    """The squared norm of one clip group and its weights, both ``[B]``.

    Args:
        squared: ``[B]`` of every parameter of the group.
        mask: see :func:`clip_weights`, as for the rest.
        clipping: "
        bound: "
        mean_of: where the loss is a mean over the batch, how many times ``mask``'s examples that batch holds: a
            gradient in the graph is ``1 / (mean_of * B)`` of the example's own. None where it is a sum.
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
        weights = torch.minimum(_apply(clipping, norms, bound).to(norms.dtype).clamp_min(0), ceiling)
    elif clipping == "automatic":
        weights = bound / (norms + _STABILITY)
    else:
        weights = ceiling.clamp_max(1.0)
    usable = torch.isfinite(norms.float()) & torch.isfinite(weights) & (mask > 0)
    return torch.where(usable, weights * scale, torch.zeros_like(weights))


def _apply(function: ClippingFunction, norms: Tensor, bound: float | Tensor) -> Tensor:
    return function(norms, bound) if _takes_bound(function) else function(norms)


def _takes_bound(function: ClippingFunction) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    return len(required) >= 2


def proven(clipping: Clipping, norms: Tensor, bound: float) -> Clipping:
    """What runs in place of a user's clipping function: the graph that it is traced into here, which is proved.

    **Guarantee.** The graph gives every example a weight from its own norm alone. The function itself sees no norms.

    ===================================================  ====================================================
    edge case                                            outcome
    ===================================================  ====================================================
    Python state that the function reads                 stays as it was here
    NumPy, ``.tolist()``, DLPack, branches on values     refused
    a tensor from outside, or made of Python numbers     refused
    ``torch.rand_like``                                  drawn anew in every backward
    ===================================================  ====================================================

    Args:
        clipping: any; a name stays as it is.
        norms: fake, ``[B]``.
        bound: C.

    Raises:
        DPCompileError: it is not traced into such a graph.
    """
    if not callable(clipping):
        return clipping
    return _proved(*_traced(clipping, norms.double(), bound))


class ProvenClipping:
    """:func:`proven` for batches as they come: a function is traced once for all sizes that it treats alike.

    **Guarantee.** What was traced runs only on sizes of the batch that it was proved for; others are traced anew.
    """

    def __init__(self, clipping: Clipping, bound: float) -> None:
        self._clipping, self._bound = clipping, bound
        self._found: dict[torch.device, list[tuple[Callable[[int], bool], Clipping]]] = {}

    def of(self, count: int, device: torch.device) -> Clipping:
        """For a batch of ``count`` examples.

        Raises:
            DPCompileError: see :func:`proven`.
        """
        if not callable(self._clipping):
            return self._clipping
        known = self._found.setdefault(device, [])
        for fits, graph in known:
            if fits(count):
                return graph
        norms = fake_vector(count, device)
        graph = _proved(*_traced(self._clipping, norms, self._bound))
        known.append((lengths_of(norms), graph))
        return graph


def _traced(function: ClippingFunction, norms: Tensor, bound: float) -> tuple[fx.GraphModule, fx.Node]:
    """The graph of a user's clipping function, and its result.

    Raises:
        PrivacyError: it cannot be traced, or does not return one weight per example.
    """

    def apply(norms: Tensor) -> Any:
        with _NoReads():
            return _apply(function, norms, bound)

    try:
        with fake_mode_of([norms]), enable_python_dispatcher():
            traced = trace_like(apply, norms)
        if traced.graph.find_nodes(op="get_attr"):
            raise TypeError("it uses a tensor that is not made from the norms")
    except Exception as error:
        raise PrivacyError(
            f"the clipping function could not be traced: {type(error).__name__}: {error}",
            remedy="write it with tensor operations on the norms [B], without Python branches on their values",
        ) from error
    result = traced.graph.output_node().args[0]
    value = result.meta.get("val") if isinstance(result, fx.Node) else None
    if not (isinstance(result, fx.Node) and isinstance(value, Tensor) and tuple(value.shape) == tuple(norms.shape)):
        raise PrivacyError(
            "the clipping function must return one weight per example, shape [B]",
            remedy="return a tensor of the shape of the norms",
        )
    return traced, result


def _proved(traced: fx.GraphModule, result: fx.Node) -> ClippingFunction:
    label = prove(_as_joint(traced, result)).of(result)
    if not isinstance(label, (Shared, Whole)) and label != Examples(0):
        raise PrivacyError(
            f"the clipping function does not give every example its own weight: its result is {label}",
            remedy="let weight i depend on norm i alone",
        )
    return traced


class _NoReads(TorchFunctionMode):
    """Refuses what would read a tensor's memory past torch: while tracing there is none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS:
            raise TypeError(f"`{name}` reads the norms past torch")
        return func(*args, **(kwargs or {}))


def _as_joint(traced: fx.GraphModule, result: fx.Node) -> JointGraph:
    """A traced clipping function in the form that the proof takes: its result is the one output to be per example."""
    norms = next(n for n in traced.graph.nodes if n.op == "placeholder")
    return JointGraph(
        module=traced, parameters={}, gradients={}, example_axes={norms: Examples(0)}, tangent_of={norms: result},
        outputs=(result,), mask=norms, names={}, norm_slot=0, gradient_slots={}, sum_slots={},
        batch=size(norms.meta["val"].shape[0]),
    )  # fmt: skip
