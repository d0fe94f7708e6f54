"""The norms of the operators in torch operations, on panels that stay small.

Shape letters as in :mod:`dpcompile.norms.factors`. What runs on CPUs, in float64, and where there is no Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpcompile.graph.slices import accumulation_dtype
from dpcompile.kernels.by_index import index_norms
from dpcompile.kernels.exact import exact_norms, kinds_of, settled, sizes_of
from dpcompile.kernels.gram import certain_norms, gram, gram_norms
from dpcompile.kernels.products import blocked_product_
from dpcompile.kernels.rounding import gamma, linear_slack, unit_of
from dpcompile.kernels.squares import squares_of

__all__ = ["direct_norm", "ghost_norm"]

_PANEL = 64  # positions per panel of a Gram matrix: the half that is computed twice is at most a panel wide


def direct_norm(rows: Tensor, cols: Tensor) -> Tensor:
    """See :func:`dpcompile.kernels.norms.direct_norm`.

    The product is made for a few examples at a time, or for a part of the longer side of one, in memory that is reused:
    it is squared and summed while it is in cache.

    **Guarantee.** The clipped sum is another product than the one that is looked at here. So what rounding may have
    moved, ``gamma`` of the size, is added, and where that is not little the norm is taken in float64.
    """
    dtype = accumulation_dtype(torch.promote_types(rows.dtype, cols.dtype))
    if rows.shape[-1] > cols.shape[-1]:
        rows, cols = cols, rows
    batch, blocks, _, p = rows.shape
    d = cols.shape[-1]
    limit = _scratch(rows.device)
    at_once = min(batch, max(1, limit // (blocks * p * d)))
    step = min(d, max(1, limit // (blocks * p)))
    memory = torch.empty(at_once * blocks * p * step, dtype=dtype, device=rows.device)
    total = torch.zeros(batch, dtype=torch.float64, device=rows.device)
    roundings = 1
    for start in range(0, batch, at_once):
        chunk = slice(start, min(batch, start + at_once))
        left, right = rows[chunk].mT.to(dtype).flatten(0, 1), cols[chunk].to(dtype).flatten(0, 1)
        for first in range(0, d, step):
            part = right[..., first : first + step]
            shape = (left.shape[0], left.shape[1], part.shape[2])
            product = memory[: shape[0] * shape[1] * shape[2]].view(shape)
            roundings = blocked_product_(left, part, product)
            total[chunk] += squares_of(product.view(chunk.stop - start, -1))
    sizes = sizes_of(rows, cols)
    slack = linear_slack(total, gamma(roundings, unit_of(dtype)), sizes)
    return settled(total, slack, sizes, lambda which: exact_norms([rows[which]], [cols[which]], ""))


def ghost_norm(rows: Tensor | None, cols: Tensor, index: Tensor | None = None) -> Tensor:
    """See :func:`dpcompile.kernels.norms.ghost_norm`; ``index`` in place of rows that are one-hot.

    A few examples at a time, with the guarantee of :func:`dpcompile.norms.ghost.ghost`.
    """
    if rows is None:
        assert index is not None
        return torch.stack([index_norms(index, cols[:, k]) for k in range(cols.shape[1])]).sum(0)
    batch, blocks, positions, _ = cols.shape
    panels = max(1, positions // _PANEL)
    step = min(batch, max(1, _scratch(cols.device) // (blocks * positions**2)))
    found = []
    for start in range(0, batch, step):
        r, c = rows[start : start + step], cols[start : start + step]
        totals, sizes = gram_norms(gram(r, panels), gram(c, panels), panels)
        found.append(certain_norms(totals, sizes, [r], [c], kinds_of([None])))
    return torch.cat(found)


def _scratch(device: torch.device) -> int:
    """Elements of a product that exist at once: what a CPU's cache holds, or a small part of a GPU's memory."""
    return 2**20 if device.type == "cpu" else 2**26
