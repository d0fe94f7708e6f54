"""The optimizer step of Opacus' ghost clipping, sharded and replicated, by its own optimizer classes.

Its backward is not sized: it looks up which tokens are distinct, and a tensor without content has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.scale.models import Large

__all__ = ["prepare"]


def prepare(large: Large, parameters: list[nn.Parameter], *, sharded: bool) -> tuple[Any, Any, Any]:
    """Stand-in for the model, optimizer, and a backward that leaves a gradient in every parameter as Opacus' does."""
    from opacus.optimizers import (  # type: ignore[import-not-found]
        DPOptimizerFastGradientClipping,
        FSDPOptimizerFastGradientClipping,
    )

    make: Any = FSDPOptimizerFastGradientClipping if sharded else DPOptimizerFastGradientClipping
    optimizer = make(
        torch.optim.AdamW(parameters, foreach=True),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=large.batch,
    )
    optimizer.zero_grad = lambda: type(optimizer).zero_grad(optimizer, set_to_none=True)

    def outputs(inputs: Tensor) -> Tensor:
        return torch.zeros(*large.data(len(inputs), large.context)[1].shape, 8)

    def backward(losses: Tensor) -> None:
        for p in parameters:
            p.grad = torch.empty_like(p)

    return outputs, optimizer, backward
