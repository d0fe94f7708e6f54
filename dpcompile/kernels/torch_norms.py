"""The norms of the operators in torch operations, on panels that stay small.

Shape letters as in :mod:`dpcompile.norms.factors`. What runs on CPUs, in float64, and where there is no Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpcompile.kernels.rounding import gram_unit, products_on
from dpcompile.norms.slices import accumulation_dtype

__all__ = ["direct_norm", "ghost_norm"]

_PANEL = 64  # positions per panel of a Gram matrix: the half that is computed twice is at most a panel wide


def direct_norm(rows: Tensor, cols: Tensor) -> Tensor:
    """See :func:`dpcompile.kernels.norm_ops.direct_norm`.

    The product is made for a few examples at a time, or for a part of the longer side of one, in memory that is reused:
    it is squared and summed while it is in cache.
    """
    dtype = _wide(rows, cols)
    if rows.shape[-1] > cols.shape[-1]:
        rows, cols = cols, rows
    batch, blocks, _, p = rows.shape
    d = cols.shape[-1]
    limit = _scratch(rows.device)
    at_once = min(batch, max(1, limit // (blocks * p * d)))
    step = min(d, max(1, limit // (blocks * p)))
    memory = torch.empty(at_once * blocks * p * step, dtype=dtype, device=rows.device)
    total = torch.zeros(batch, dtype=dtype, device=rows.device)
    for start in range(0, batch, at_once):
        chunk = slice(start, min(batch, start + at_once))
        left, right = rows[chunk].mT.to(dtype).flatten(0, 1), cols[chunk].to(dtype).flatten(0, 1)
        for first in range(0, d, step):
            part = right[..., first : first + step]
            product = _into(memory, left, part)
            total[chunk] += product.square_().view(chunk.stop - start, -1).sum(1)
    return total


def ghost_norm(rows: Tensor | None, cols: Tensor, index: Tensor | None = None) -> Tensor:
    """See :func:`dpcompile.kernels.norm_ops.ghost_norm`; ``index`` in place of rows that are one-hot.

    The lower half of both Gram matrices, a panel of rows at a time.

    **Guarantee.** The result is not below the true squared norm: rounding moves the inner products by at most
    :func:`dpcompile.kernels.rounding.gram_unit` times the lengths, and ``|R| slack_C + slack_R |C|`` is added;
    ``slack_C`` holds the rounding of the product ``R C`` and of its sum too.
    """
    sides = [s for s in (rows, cols) if s is not None]
    dtype = _wide(*sides)
    products = products_on(cols.device)
    eps = torch.finfo(dtype).eps
    units = [gram_unit(s.shape[-1], dtype, products) for s in sides]
    units[-1] += 4 * eps
    batch, blocks, positions, _ = cols.shape
    panel = min(_PANEL, positions)
    at_once = min(batch, max(1, _scratch(cols.device) // (blocks * panel * positions)))
    memory = torch.empty(3, at_once * blocks * panel * positions, dtype=dtype, device=cols.device)
    total = torch.zeros(batch, dtype=dtype, device=cols.device)
    for start in range(0, batch, at_once):
        chunk = slice(start, min(batch, start + at_once))
        wide = [s[chunk].to(dtype).flatten(0, 1) for s in sides]
        lengths = [torch.linalg.vector_norm(w, dim=-1) for w in wide]
        for first in range(0, positions, panel):
            end = min(positions, first + panel)
            grams = [_into(m, w[:, first:end], w[:, :end].mT) for m, w in zip(memory[1:], wide, strict=False)]
            if index is not None:
                equal = index[chunk, first:end, None] == index[chunk, None, :end]
                grams.insert(0, equal.to(dtype).repeat_interleave(blocks, 0))
            terms = memory[0, : grams[0].numel()].view(grams[0].shape)
            sums = torch.mul(grams[0], grams[1], out=terms).sum(1)
            slack = _weighed(grams[0].abs_(), lengths[-1], first, end) * units[-1]
            if index is None:
                slack += _weighed(grams[1].abs_(), lengths[0], first, end) * units[0]
            for part in (sums, slack):
                by_example = 2 * part[:, :first].sum(1) + part[:, first:].sum(1)
                total[chunk] += by_example.view(-1, blocks).sum(1)
    return total.clamp_min(0)


def _weighed(gram: Tensor, lengths: Tensor, first: int, end: int) -> Tensor:
    """``sum_t |gram[t, t']| |a_t| |a_t'|`` for every t'."""
    return torch.bmm(lengths[:, None, first:end], gram)[:, 0] * lengths[:, :end]


def _into(memory: Tensor, left: Tensor, right: Tensor) -> Tensor:
    shape = (left.shape[0], left.shape[1], right.shape[2])
    return torch.bmm(left, right, out=memory[: shape[0] * shape[1] * shape[2]].view(shape))


def _wide(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for other in tensors[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    return accumulation_dtype(dtype)


def _scratch(device: torch.device) -> int:
    """Elements of a product that exist at once: what a CPU's cache holds, or a small part of a GPU's memory."""
    return 2**20 if device.type == "cpu" else 2**26
