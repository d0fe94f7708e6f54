"""Operations that are taken apart before the proof, beyond what Inductor takes apart itself.

They are rare in training graphs, and in parts they fall under the rules that exist; some of them Inductor gets wrong.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

__all__ = ["DECOMPOSITIONS", "take_apart"]

aten = torch.ops.aten


def _trilinear(
    i1: Tensor,
    i2: Tensor,
    i3: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """``nn.Bilinear`` and its gradients: a product of three tensors over common dimensions, as an einsum."""
    ndim = i1.ndim + len(expand1)
    letters = "abcdefghijklmnopqrstuvwxyz"[:ndim]

    def kept(dropped: Sequence[int]) -> str:
        gone = {d % ndim for d in dropped}
        return "".join(x for d, x in enumerate(letters) if d not in gone)

    return torch.einsum(f"{kept(expand1)},{kept(expand2)},{kept(expand3)}->{kept(sumdim)}", i1, i2, i3)


def _weight_norm_backward(grad_w: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The adjoint of ``w = g v / |v|`` (Salimans and Kingma 2016, equation 3)."""
    others = [d for d in range(v.ndim) if d != dim % v.ndim]
    norms = norms.to(v.dtype)
    along = (grad_w * v).sum(others, keepdim=True) / norms
    return (g / norms) * (grad_w - v * (along / norms)), along.to(g.dtype)


def _distances(x1: Tensor, x2: Tensor, p: float, compute_mode: int | None) -> Tensor:
    """``torch.cdist``: distances between all rows of ``x1`` ``[.., P, D]`` and of ``x2`` ``[.., R, D]``."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def _distances_backward(grad: Tensor, x1: Tensor, x2: Tensor, p: float, cdist: Tensor) -> Tensor:
    """The gradient of the first operand, as in ATen's ``DistanceOpsKernel.cpp``."""
    difference, distance, grad = x1.unsqueeze(-2) - x2.unsqueeze(-3), cdist.unsqueeze(-1), grad.unsqueeze(-1)
    size, sign = difference.abs(), difference.sign()
    if p == 0:
        each = torch.zeros_like(difference)
    elif p == 1:
        each = grad * sign
    elif p == float("inf"):
        each = grad * sign * (size == distance)
    else:
        at_zero = (distance == 0) | ((difference == 0) & (p < 1))
        each = torch.where(at_zero, 0.0, sign * (size / distance) ** (p - 1) * grad)
    return each.sum(-2).sum_to_size(x1.shape)


def _unpool2d(self: Tensor, indices: Tensor, output_size: Sequence[int]) -> Tensor:
    """Values back at the positions that pooling took them from, each image's channel by itself."""
    empty = self.new_zeros([*self.shape[:-2], output_size[0] * output_size[1]])
    return empty.scatter(-1, indices.flatten(-2), self.flatten(-2)).unflatten(-1, output_size)


def _unpool3d(
    self: Tensor, indices: Tensor, output_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    empty = self.new_zeros([*self.shape[:-3], output_size[0] * output_size[1] * output_size[2]])
    return empty.scatter(-1, indices.flatten(-3), self.flatten(-3)).unflatten(-1, output_size)


def _avg_pool_backward(
    grad: Tensor,
    self: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Sums over windows, of cotangents that were divided by the size of their window before.

    Inductor (2.13 to 2.15) divides by the size of the whole window also where ``ceil_mode`` lets it stand over (pytorch
    #198119). Other pools are left as they are.
    """
    if not ceil_mode or divisor_override is not None:
        return NotImplemented
    ndim = len(kernel_size)
    for i, kernel in enumerate(kernel_size):
        dim, pad = i - ndim, padding[i] if padding else 0
        size = self.shape[dim]
        begin = torch.arange(grad.shape[dim], device=grad.device) * (stride[i] if stride else kernel) - pad
        end = (begin + kernel).clamp(max=size + pad)
        if not count_include_pad:
            begin, end = begin.clamp(min=0), end.clamp(max=size)
        grad = grad / (end - begin).to(grad.dtype).view(-1, *[1] * (ndim - 1 - i))
    backward = aten.avg_pool2d_backward if ndim == 2 else aten.avg_pool3d_backward
    return backward(grad, self, kernel_size, stride, padding, ceil_mode, count_include_pad, 1)


def _max_pool_backward(grad: Tensor, self: Tensor, indices: Tensor, ndim: int) -> Tensor:
    """Cotangents added up at the positions that pooling took the values from, each image's channel by itself.

    torch's own kernels read the positions as if they lay in order, also where Inductor lays them out with the channels
    last (pytorch #197888).
    """
    empty = torch.zeros_like(self, memory_format=torch.contiguous_format).flatten(-ndim)
    return empty.scatter_add(-1, indices.flatten(-ndim), grad.flatten(-ndim)).view(self.shape)


def _adaptive_max_pool3d_backward(grad: Tensor, self: Tensor, indices: Tensor) -> Tensor:
    return _max_pool_backward(grad, self, indices, 3)


def _fractional_max_pool2d_backward(
    grad: Tensor, self: Tensor, kernel_size: Sequence[int], output_size: Sequence[int], indices: Tensor
) -> Tensor:
    return _max_pool_backward(grad, self, indices, 2)


def _fractional_max_pool3d_backward(
    grad: Tensor, self: Tensor, kernel_size: Sequence[int], output_size: Sequence[int], indices: Tensor
) -> Tensor:
    return _max_pool_backward(grad, self, indices, 3)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten._cdist_backward.default: _distances_backward,
    aten._cdist_forward.default: _distances,
    aten._trilinear.default: _trilinear,
    aten.adaptive_max_pool3d_backward.default: _adaptive_max_pool3d_backward,
    aten.avg_pool2d_backward.default: _avg_pool_backward,
    aten.avg_pool3d_backward.default: _avg_pool_backward,
    aten.fractional_max_pool2d_backward.default: _fractional_max_pool2d_backward,
    aten.fractional_max_pool3d_backward.default: _fractional_max_pool3d_backward,
    aten.max_unpool2d.default: _unpool2d,
    aten.max_unpool3d.default: _unpool3d,
    aten._weight_norm_interface_backward.default: _weight_norm_backward,
}


def take_apart(graph: fx.Graph) -> None:
    """Take operations of a captured graph apart whose derivatives would be hard to follow.

    Bags of equal size (2-D input) become look-ups and a reduction over each bag; a write through a boolean mask becomes
    a choice between the old values and the new. A table's gradient is a dense sum, whatever the table asks for: the
    noise is dense too.
    """
    for node in graph.nodes:
        if node.op == "call_function" and node.target is F.embedding_bag:
            node.target = _embedding_bag
        elif node.op == "call_function" and node.target is F.embedding:
            node.args, node.kwargs = node.args[:6], {k: v for k, v in node.kwargs.items() if k != "sparse"}
        elif node.op == "call_function" and node.target is operator.setitem:
            node.target = _write


def _write(base: Tensor, index: Any, value: Any) -> None:
    """``base[index] = value``, without a look-up where a mask writes the same value to all of its positions."""
    mask = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not isinstance(value, (Tensor, int, float)):
        base[index] = value
        return
    inside = base.ndim - mask.ndim
    if isinstance(value, Tensor) and value.ndim == inside + 1 and value.shape[0] == 1:
        value = value.squeeze(0)
    other_shape = mask.ndim == 0 or mask.shape != base.shape[: mask.ndim]
    if other_shape or (isinstance(value, Tensor) and value.ndim > inside):
        base[index] = value
        return
    base.copy_(torch.where(mask.reshape(*mask.shape, *[1] * inside), value, base))


def _embedding_bag(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if input.ndim != 2 or max_norm is not None:
        return F.embedding_bag(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
    rows = F.embedding(input, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    present = torch.ones_like(input, dtype=torch.bool) if padding_idx is None else input != padding_idx % len(weight)
    if mode == "max":
        rows = rows.masked_fill(~present.unsqueeze(-1), float("-inf"))
        largest = rows.max(1).values
        return torch.where(present.any(1, keepdim=True), largest, torch.zeros_like(largest))
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    total = torch.where(present.unsqueeze(-1), rows, torch.zeros_like(rows)).sum(1)
    if mode == "mean":
        total = total / present.sum(1, keepdim=True).clamp_min(1).to(total.dtype)
    return total
