"""When a workaround may go: plain torch, without dpcompile, still has the fault that it is for.

A test that fails here says that this release of torch is right: the workaround is for older ones only, and goes with
the last of them that is supported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.autograd import Reverse
from torch import Tensor, nn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # whatever torch says of itself

RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])


def differs(module: nn.Module, x: Tensor, backend: str, gradients: bool) -> bool:
    """Whether compiled gradients, or results, are others than eager ones, or compiling fails."""
    found = []
    for run in (copy.deepcopy(module), copy.deepcopy(module)):
        torch._dynamo.reset()
        given = x.clone().requires_grad_()
        called = torch.compile(run, backend=backend, fullgraph=True) if found else run
        try:
            with torch._dynamo.config.patch(capture_scalar_outputs=True):
                result = called(given)
                result.square().sum().backward()
        except Exception:
            return True
        found.append([given.grad, *(p.grad for p in run.parameters())] if gradients else [result])
    return not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True) if a is not None)


class Calls(nn.Module):
    """A function of ``x`` and a weight."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.tensor(1.3)), function
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def through_a_view(m: Any, x: Tensor) -> Tensor:
    y = x.detach() * 1.0
    y.unsqueeze(0).mul_(m.weight)
    return Reverse.apply(y, 0.7)  # type: ignore[return-value]


def a_number_written(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.count.add_(1)
    return x * m.count.item()


def a_mask_by_index(m: Any, x: Tensor) -> Tensor:
    mask = torch.full((8, 8), -10000.0)
    mask[torch.arange(8).unsqueeze(0), torch.arange(8).unsqueeze(1)] = 0
    return torch.softmax(x + mask, dim=-1)


def average_with_ceil_mode(m: Any, x: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(x.view(1, 1, 8, 8), 3, ceil_mode=True) * m.weight


def adaptive_pool_channels_last(m: Any, x: Tensor) -> Tensor:
    images = x.view(1, 2, 2, 4, 4).to(memory_format=torch.channels_last_3d)
    return nn.functional.adaptive_max_pool3d(images * m.weight, 2)


# Workaround -> what shows the fault, the backend that has it, the first release without it (None: none is known).
FAULTS: dict[str, tuple[Any, str, tuple[int, int] | None]] = {
    "mended_dynamo.gradients_through_views": (through_a_view, "aot_eager", None),
    "normalise.save_what_is_overwritten": (a_number_written, "aot_eager", None),
    "mended_inductor._read_or_nothing": (a_mask_by_index, "inductor", None),
    "decompositions: average pools": (average_with_ceil_mode, "inductor", None),
    "decompositions: max pools": (adaptive_pool_channels_last, "inductor", None),
}


@pytest.mark.parametrize("workaround", FAULTS)
def test_torch_has_the_fault(workaround: str) -> None:
    function, backend, without = FAULTS[workaround]
    wrong = differs(Calls(function), torch.randn(8, 8), backend, gradients=True)
    assert wrong == (without is None or RELEASE < without), f"{workaround}: torch {torch.__version__} is {wrong=}"


def test_numbers_that_are_written_are_kept() -> None:
    """For `mended_dynamo.written_numbers_forgotten`, for torch before 2.14."""
    assert differs(Calls(a_number_written), torch.randn(8, 8), "aot_eager", gradients=False) == (RELEASE < (2, 14))
