"""Which filters Inductor copies, and how many bytes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dpcompile.lowering.layouts import copied_bytes, filters_of, laid_out


class Mixed(nn.Module):
    """Convolutions of one and two dimensions, of the input and of what is made of it, with filters made of others."""

    def forward(self, x: Tensor, line: Tensor, a: Tensor, b: Tensor, c: Tensor, up: Tensor, last: Tensor) -> Tensor:
        h = F.conv_transpose2d(torch.conv2d(x, a), weight=up)
        h = torch.conv2d(torch.conv2d(input=h, weight=b.tanh()), last)
        return h.sum() + torch.conv1d(line, c).sum()


def test_filters_and_images() -> None:
    gm = fx.symbolic_trace(Mixed())
    last = torch.randn(8, 8, 3, 3).to(memory_format=torch.channels_last)
    inputs: list[Any] = [
        torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8), torch.randn(8, 3, 3, 3), torch.randn(8, 8, 3, 3),
        torch.randn(8, 3, 3), torch.randn(8, 8, 2, 2), last,
    ]  # fmt: skip
    names = {2: "a", 3: "b", 4: "c", 5: "up", 6: "last"}
    found = filters_of(gm, inputs, names)
    assert found == {2: "a", 5: "up"}  # `b` is made into another, `c` has one dimension, `last` lies so already
    assert filters_of(gm, inputs, {5: "up"}) == {5: "up"}
    assert copied_bytes(gm, inputs, found, 3) == inputs[2].nbytes + inputs[5].nbytes + 3 * inputs[0].nbytes


def test_laid_out() -> None:
    p = nn.Parameter(torch.randn(4, 3, 2, 2))
    found = laid_out(p)
    assert torch.equal(found, p) and not found.requires_grad
    assert found.is_contiguous(memory_format=torch.channels_last) and found.data_ptr() != p.data_ptr()
