"""One number for each row of a tensor, to tell rows apart: where they went, and whether they came before."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["row_bytes", "row_keys"]

_WORDS = 64  # of a row that are looked at, spread over it
_STRIDE = 0x9E3779B97F4A7C15 - (1 << 64)


def row_keys(tensor: Tensor, dim: int) -> Tensor:
    """int64 ``[B]``, on the tensor's device: equal for rows of equal bits; of up to 64 elements, spread over each row.

    Args:
        tensor: any shape and dtype.
        dim: of the rows, ``B`` long.
    """
    rows = tensor.detach().resolve_conj().resolve_neg()
    rows = torch.view_as_real(rows) if rows.is_complex() else rows
    rows = rows.movedim(dim, 0).flatten(1) if rows.ndim > 1 else rows.unsqueeze(1)
    columns = rows.shape[1]
    if not rows.numel():
        return torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    if columns > _WORDS:
        rows = rows[:, torch.linspace(0, columns - 1, _WORDS, device=rows.device).long()]
    words = rows.contiguous().view(_INTEGERS[rows.element_size()]).to(torch.int64)
    mixed = (words + 1) * _keys(words.shape[1], words.device)
    return (mixed ^ (mixed >> 29)).sum(1)


def row_bytes(tensor: Tensor, dim: int) -> list[bytes]:
    """Every row whole."""
    rows = tensor.detach().movedim(dim, 0).reshape(tensor.shape[dim], -1).cpu().contiguous()
    return [row.tobytes() for row in rows.view(torch.uint8).numpy()] if rows.numel() else [b""] * len(rows)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@lru_cache(maxsize=64)
def _keys(count: int, device: torch.device) -> Tensor:
    return (torch.arange(1, count + 1, device=device) * _STRIDE) | 1
