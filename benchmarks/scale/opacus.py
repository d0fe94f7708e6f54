"""Opacus' ghost clipping with two backwards, sharded and replicated, as its own classes do it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from benchmarks.scale.models import Large

__all__ = ["prepare"]


def prepare(
    large: Large, model: nn.Module, mesh: Any, trained: list[nn.Parameter]
) -> tuple[Any, Any, Callable[[Tensor], None]]:
    """Model, optimizer and backward; a mesh says that it is sharded, by Opacus' own wrapper."""
    import torch
    from opacus.grad_sample import (  # type: ignore[import-not-found]
        GradSampleModuleFastGradientClipping,
        GradSampleModuleFastGradientClippingFSDP,
    )
    from opacus.optimizers import (  # type: ignore[import-not-found]
        DPOptimizerFastGradientClipping,
        FSDPOptimizerFastGradientClipping,
    )
    from opacus.utils.fast_gradient_clipping_utils import (  # type: ignore[import-not-found]
        DPTensorFastGradientClipping,
    )
    from opacus.utils.fsdp_utils import FSDP2Wrapper  # type: ignore[import-not-found]

    warnings.filterwarnings("ignore", message="Full backward hook")
    if mesh is not None:
        model = FSDP2Wrapper(model)
        for module in model.modules():
            if hasattr(module, "set_force_sum_reduction_for_comms"):
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
        trained = [p for p in model.parameters() if p.requires_grad]
    wrap = GradSampleModuleFastGradientClipping if mesh is None else GradSampleModuleFastGradientClippingFSDP
    step = DPOptimizerFastGradientClipping if mesh is None else FSDPOptimizerFastGradientClipping
    wrapped = wrap(model, max_grad_norm=1.0, loss_reduction="mean")
    inner = torch.optim.AdamW(trained, foreach=True)
    optimizer = step(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=large.batch)

    def backward(losses: Tensor) -> None:
        DPTensorFastGradientClipping(wrapped, optimizer, losses, "mean").backward()

    return wrapped, optimizer, backward
