"""Fingerprints of tensors: the same in C++ and in torch operations, and other ones after every change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dpcompile.kernels import content
from dpcompile.kernels.content import different, fingerprints

CPU = torch.device("cpu")


def tensors() -> list[Tensor]:
    """Odd sizes, narrow and wide dtypes, layouts that are not contiguous, views at odd places, nothing at all."""
    return [
        torch.randn(3),
        torch.randn(5, 7),
        torch.randn((1 << 20) + 3),
        torch.randn(3, dtype=torch.bfloat16),
        torch.randn(7, dtype=torch.float64),
        torch.randn(3, dtype=torch.complex64),
        torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(10, 4)[:, 1:3],
        torch.randn(6, dtype=torch.bfloat16)[1:5],
        torch.empty(0, 3),
        torch.zeros(()),
    ]


def test_kernel_and_torch_operations_agree() -> None:
    assert content._library() is not None
    given = tensors()
    by_kernel = fingerprints(given)
    by_torch = content._by_torch([content._flat(t) for t in given], CPU)
    assert [int(x) for x in by_kernel] == by_torch.tolist()
    assert different(by_kernel, fingerprints(given)) == []


@pytest.mark.parametrize("kernel", [True, False])
def test_every_kind_of_change_is_seen(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr(content, "_library", lambda: None)
    value = torch.randn(4097)
    before = fingerprints([value])
    changes = {
        "scaled": lambda t: t.mul_(2**-16),
        "negated": lambda t: t.neg_(),
        "two signs": lambda t: t.index_copy_(0, torch.tensor([1, 3]), -t[[1, 3]]),
        "one bit": lambda t: t.view(torch.int32)[4096].bitwise_xor_(1),
        "swapped": lambda t: t.copy_(t[torch.cat([torch.tensor([4096]), torch.arange(1, 4096), torch.tensor([0])])]),
        "rolled": lambda t: t.copy_(t.roll(1)),
        "zeroed": lambda t: t.zero_(),
    }
    for name, change in changes.items():
        other = value.clone()
        assert different(before, fingerprints([other])) == []
        change(other)
        assert different(before, fingerprints([other])) == [0], name


def test_one_of_many_is_named() -> None:
    given = [torch.randn(n) for n in (5, 1, 1000, 3)]
    before = fingerprints(given)
    given[2][7] += 1
    assert different(before, fingerprints(given)) == [2]
