"""Operands for the norm operators; as a program, what the Triton kernels make of them under Triton's interpreter.

The interpreter is chosen by ``TRITON_INTERPRET=1`` before Triton is imported, so it needs a process of its own.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    rows: Tensor  # [B, K, T, P], or an index [B, T]
    cols: Tensor

    @property
    def one_hot(self) -> bool:
        return not self.rows.is_floating_point()

    def truth(self) -> Tensor:
        rows = self.rows
        if self.one_hot:
            same = (rows[:, :, None] == rows[:, None]).double()[:, None]
            return (same * (self.cols.double() @ self.cols.double().mT)).sum((1, 2, 3))
        return (rows.double().mT @ self.cols.double()).square().sum((1, 2, 3))


def _random(b: int, k: int, t: int, p: int, d: int, dtype: torch.dtype = torch.float32) -> Case:
    return Case(torch.randn(b, k, t, p).to(dtype), torch.randn(b, k, t, d).to(dtype))


def _index(b: int, k: int, t: int, d: int, words: int, dtype: torch.dtype = torch.float32) -> Case:
    return Case(torch.randint(-1, words, (b, t)), torch.randn(b, k, t, d).to(dtype))


def _strided() -> Case:
    """Transposed, sliced with a step, expanded."""
    rows = torch.randn(5, 33, 2, 3).permute(2, 0, 3, 1)[:, :, :, ::2]  # [2, 5, 3, 17]
    return Case(rows, torch.randn(1, 5, 1, 7).expand(2, 5, 3, 7))


def _mixed() -> Case:
    case = _random(2, 1, 40, 20, 9)
    return Case(case.rows.bfloat16(), case.cols)


def _cancelling(width: int, scale: float) -> Callable[[], Case]:
    """Two positions that cancel but for one part in ``scale``."""

    def make() -> Case:
        cols = torch.randn(16, 1, 1, width) * scale + torch.randn(16, 1, 2, width)
        rows = torch.randn(16, 1, 2, 3)
        return Case(rows - rows.mean(2, keepdim=True), cols)

    return make


def _cancelling_far_apart() -> Case:
    """The positions that cancel are in different tiles, between others that are zero."""
    rows, cols = torch.zeros(4, 1, 150, 5), torch.zeros(4, 1, 150, 9)
    base = torch.randn(4, 1, 9) * 1e3
    for position, sign in ((3, 1.0), (140, -1.0)):
        rows[:, :, position] = sign
        cols[:, :, position] = base + torch.randn(4, 1, 9)
    return Case(rows, cols)


def _with(value: float, side: str) -> Callable[[], Case]:
    def make() -> Case:
        case = _random(3, 2, 70, 5, 9)
        getattr(case, side)[1, 1, 66, 2] = value
        return case

    return make


def _index_with_nan() -> Case:
    case = _index(3, 1, 70, 9, 5)
    case.cols[1, 0, 69, 8] = math.nan
    return case


def _far_offsets() -> Case:
    """Two positions that lie 2**31 elements apart; the memory between them is never touched."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    rows = memory.as_strided((1, 1, 2, 20), (1, 1, 2**31, 1)).copy_(torch.randn(1, 1, 2, 20))
    return Case(rows, torch.randn(1, 1, 2, 9).bfloat16())


CASES: dict[str, Callable[[], Case]] = {
    "one element": lambda: _random(2, 1, 1, 1, 1),
    "one position": lambda: _random(3, 1, 1, 70, 20),
    "blocks": lambda: _random(2, 3, 21, 5, 9),
    "off tiles": lambda: _random(2, 1, 65, 67, 130),
    "five tiles": lambda: _random(1, 1, 300, 5, 7),
    "four tiles": lambda: _random(1, 2, 256, 16, 16),
    "more positions than features": lambda: _random(1, 1, 600, 2, 3, torch.bfloat16),
    "strided": _strided,
    "bfloat16": lambda: _random(2, 1, 33, 130, 140, torch.bfloat16),
    "float16": lambda: _random(2, 2, 70, 5, 9, torch.float16),
    "two dtypes": _mixed,
    "zero": lambda: Case(torch.zeros(2, 1, 20, 3), torch.zeros(2, 1, 20, 4)),
    "far offsets": _far_offsets,
    "cancelling far apart": _cancelling_far_apart,
    "nan in rows": _with(math.nan, "rows"),
    "nan in columns": _with(math.nan, "cols"),
    "infinity in columns": _with(math.inf, "cols"),
    "index": lambda: _index(3, 1, 70, 9, 5),
    "index of blocks, bfloat16": lambda: _index(2, 3, 33, 20, 5, torch.bfloat16),
    "index, few equal": lambda: _index(2, 1, 300, 9, 10**6),
    "index, nan": _index_with_nan,
}
for _width in (4, 64, 512):
    for _scale in (1e2, 1e3, 1e4):
        CASES[f"cancelling {_width} {_scale:g}"] = _cancelling(_width, _scale)


def make(name: str) -> Case:
    torch.manual_seed(0)
    return CASES[name]()


def interpreted(name: str) -> dict[str, list[float]]:
    """Rule -> the norms by the kernels."""
    from dpcompile.kernels.triton import direct as triton_direct
    from dpcompile.kernels.triton import ghost as triton_ghost

    case = make(name)
    if case.one_hot:
        return {"ghost": triton_ghost.ghost_norm_one_hot(case.rows, case.cols).tolist()}
    functions = {"direct": triton_direct.direct_norm, "ghost": triton_ghost.ghost_norm}
    return {rule: f(case.rows, case.cols).tolist() for rule, f in functions.items()}


if __name__ == "__main__":
    import numpy as np

    np.seterr(all="ignore")
    json.dump({name: interpreted(name) for name in CASES}, sys.stdout)
