"""One backward per example: the slow and obviously right way to clipped sums, and the comparison with it.

A loss is a function of a model's output and the rows it was computed for; it gives one number per example. The same
function serves the whole batch (``rows = slice(None)``) and the batches of one example that the oracle runs.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dpcompile.module import engine_of

__all__ = [
    "Loss",
    "PseudoLoss",
    "Truth",
    "assert_right",
    "batch_size",
    "clip",
    "error_of",
    "leaves",
    "per_example_gradients",
    "train_step",
]

Loss: TypeAlias = Callable[[Any, slice], Tensor]
Gradients: TypeAlias = dict[str, Tensor]


@dataclasses.dataclass
class Truth:
    """Norms ``[B]`` and clipped sums by parameter name, in float64; ``scale`` is what the sums could be at most."""

    norms: Tensor
    sums: Gradients
    scale: float


def leaves(output: Any) -> list[Tensor]:
    """All floating-point tensors of a model's output, whatever holds them."""
    if dataclasses.is_dataclass(output):
        output = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            found += [leaf] if leaf.is_floating_point() else []
        elif dataclasses.is_dataclass(leaf):
            found += leaves(leaf)
    return found


class PseudoLoss:
    """A loss for any output: each example weighs its own output entries, linearly and squared, with its own numbers."""

    def __init__(self, batch: int, out_dim: int = 0) -> None:
        self.batch, self.out_dim = batch, out_dim

    def __call__(self, output: Any, rows: slice) -> Tensor:
        """``[n]`` for the ``n`` examples of ``rows``."""
        total: Tensor | None = None
        for position, leaf in enumerate(leaves(output)):
            each = leaf.movedim(self.out_dim, 0)
            generator = torch.Generator().manual_seed(17 + position)
            weight = torch.randn((2, self.batch, *each.shape[1:]), generator=generator, dtype=torch.float64)
            weight = weight[:, rows].to(each.device, each.dtype)
            term = (weight[0] * each + 0.5 * weight[1] * each.square()).reshape(len(each), -1).sum(1)
            total = term if total is None else total + term
        assert total is not None
        return total


# --- taking a batch apart -------------------------------------------------------------------------------------------


def _dims_of(args: Sequence[Any], kwargs: Mapping[str, Any], in_dims: Any) -> tuple[list[Any], dict[str, Any]]:
    """The entry of ``in_dims`` for every argument: ints, None, or nested like the argument."""
    if in_dims is None or isinstance(in_dims, int):
        return [in_dims] * len(args), dict.fromkeys(kwargs, in_dims)
    if isinstance(in_dims, Mapping):
        raise TypeError("the oracle takes a sequence; kwargs then have dimension 0")
    return list(in_dims), dict.fromkeys(kwargs, 0)


def _map_with_dims(function: Callable[[Tensor, int], Any], value: Any, dims: Any) -> Any:
    if isinstance(value, Tensor):
        return value if dims is None else function(value, dims)
    if isinstance(value, dict):
        return {k: _map_with_dims(function, v, dims[k] if isinstance(dims, dict) else dims) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        entries = dims if isinstance(dims, (list, tuple)) else [dims] * len(value)
        return type(value)(_map_with_dims(function, v, d) for v, d in zip(value, entries, strict=True))
    return value


def take(args: Sequence[Any], kwargs: Mapping[str, Any], in_dims: Any, rows: slice) -> tuple[list[Any], dict[str, Any]]:
    """The same call on some of the examples."""

    def cut(tensor: Tensor, dim: int) -> Tensor:
        index = [slice(None)] * tensor.ndim
        index[dim] = rows
        return tensor[tuple(index)].contiguous()

    of_args, of_kwargs = _dims_of(args, kwargs, in_dims)
    return (
        [_map_with_dims(cut, a, d) for a, d in zip(args, of_args, strict=True)],
        {k: _map_with_dims(cut, v, of_kwargs[k]) for k, v in kwargs.items()},
    )


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any], in_dims: Any) -> int:
    """The number of examples in a call."""
    sizes: list[int] = []

    def note(tensor: Tensor, dim: int) -> Tensor:
        sizes.append(tensor.shape[dim])
        return tensor

    of_args, of_kwargs = _dims_of(args, kwargs, in_dims)
    for a, d in zip(args, of_args, strict=True):
        _map_with_dims(note, a, d)
    for k, v in kwargs.items():
        _map_with_dims(note, v, of_kwargs[k])
    assert len(set(sizes)) == 1, sizes
    return sizes[0]


# --- the oracle -----------------------------------------------------------------------------------------------------


def per_example_gradients(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], loss: Loss, *, in_dims: Any = 0
) -> Gradients:
    """``[B, *shape]`` in float64 for every trainable parameter: one forward and backward for each example alone."""
    model = copy.deepcopy(model)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    collected: dict[str, list[Tensor]] = {n: [] for n in named}
    for i in range(batch_size(args, kwargs, in_dims)):
        rows = slice(i, i + 1)
        one_args, one_kwargs = take(args, kwargs, in_dims, rows)
        value = loss(model(*one_args, **one_kwargs), rows).sum()
        gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        for (name, p), g in zip(named.items(), gradients, strict=True):
            collected[name].append(torch.zeros_like(p, dtype=torch.float64) if g is None else g.double())
    return {n: torch.stack(gs) for n, gs in collected.items()}


def clip(
    gradients: Gradients,
    max_grad_norm: float,
    *,
    clipping: Any = "flat",
    mask: Tensor | None = None,
    groups: Mapping[str, Any] | None = None,
) -> Truth:
    """Clip every example's gradient and add them up.

    Args:
        gradients: of :func:`per_example_gradients`.
        max_grad_norm: C.
        clipping: "flat", "automatic", or a function of norms (then cut to C/norm).
        mask: bool ``[B]``; False gives weight 0.
        groups: parameter -> group; every group is clipped by itself to ``C / sqrt(number of groups)``.
    """
    squared = {n: g.reshape(len(g), -1).square().sum(1) for n, g in gradients.items()}
    groups = groups or dict.fromkeys(gradients, "all")
    count = len(set(groups.values()))
    sums: Gradients = {}
    scale = 0.0
    for group in set(groups.values()):
        members = [n for n in gradients if groups[n] == group]
        norms = torch.stack([squared[n] for n in members]).sum(0).sqrt()
        weights = _weights(norms, max_grad_norm / math.sqrt(count), clipping)
        if mask is not None:
            weights = torch.where(mask, weights, 0.0)
        for n in members:
            kept = weights != 0
            sums[n] = torch.einsum("b,b...->...", weights[kept], gradients[n][kept])
        scale += (weights[kept] * norms[kept]).sum().item()
    return Truth(torch.stack(list(squared.values())).sum(0).sqrt(), sums, scale)


def _weights(norms: Tensor, bound: float, clipping: Any) -> Tensor:
    weights = []
    for i, norm in enumerate(norms.tolist()):
        if not math.isfinite(norm):
            weights.append(0.0)
        elif clipping == "flat":
            weights.append(1.0 if norm <= bound else bound / norm)
        elif clipping == "automatic":
            weights.append(bound / (norm + 0.01))
        else:
            wanted = max(float(clipping(norms)[i]), 0.0)
            weights.append(wanted if wanted * norm <= bound else bound / norm)
    return torch.tensor(weights, dtype=torch.float64)


# --- comparison -----------------------------------------------------------------------------------------------------


def train_step(
    private: Any, args: Sequence[Any], kwargs: Mapping[str, Any], loss: Loss, *, reduction: str = "mean"
) -> Any:
    """An ordinary training step up to ``backward()``; returns the model's output."""
    output = private(*args, **kwargs)
    each = loss(output, slice(None))
    (each.mean() if reduction == "mean" else each.sum()).backward()
    return output


def error_of(private: nn.Module, truth: Truth) -> tuple[float, float]:
    """Relative error of the norms, and the largest of the clipped sums' (of the parameter's, or of 1/1000 of all)."""
    norms = engine_of(private).row_norms
    assert norms.dtype == torch.float32 and norms.shape == truth.norms.shape, (norms.dtype, norms.shape)
    finite = torch.isfinite(truth.norms)
    assert torch.equal(torch.isfinite(norms), finite), norms
    floor = 1e-3 * truth.norms[finite].max() + 1e-9  # a gradient of rounding errors alone has no digits to compare
    of_norms = ((norms.double() - truth.norms)[finite].abs() / truth.norms[finite].clamp_min(floor)).max().item()
    of_sums = 0.0
    for name, p in private.named_parameters():
        if name not in truth.sums:
            assert p.grad is None, f"frozen parameter {name} has a gradient"
            continue
        wanted = truth.sums[name]
        got = torch.zeros_like(wanted) if p.grad is None else p.grad.double()
        assert torch.isfinite(got).all(), name
        scale = max(wanted.norm().item(), 1e-3 * truth.scale, 1e-9)
        of_sums = max(of_sums, (got - wanted).norm().item() / scale)
    return of_norms, of_sums


def assert_safe(private: nn.Module, truth: Truth, over: float) -> None:
    """Norms are right or too large by no more than ``over``, never too small; clipped sums are as far off as that."""
    ratio = engine_of(private).row_norms.to(torch.float64) / truth.norms
    assert ratio.min() >= 1 - 3e-7, f"a norm is too small: {ratio.min()} of the true one"
    assert_right(private, truth, over)


def assert_right(private: nn.Module, truth: Truth, tolerance: float) -> None:
    """Norms and clipped sums agree; the norms are reported in float32, whatever the tolerance."""
    of_norms, of_sums = error_of(private, truth)
    assert of_norms <= max(tolerance, 3e-7), f"norms are off by {of_norms:.1e}"
    assert of_sums <= tolerance, f"clipped sums are off by {of_sums:.1e}"
