"""A batch without examples: what it returns, and a backward that delivers norms ``[0]`` and no gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpcompile._torch import pytree
from dpcompile.runtime.delivery import Delivery, through_delivery

__all__ = ["run_empty"]


def run_empty(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    trained: Mapping[str, Tensor],
    delivery: Callable[[Tensor], Delivery],
) -> Any:
    """Call the ordinary module on an empty batch; the sum over its examples is 0 for every parameter.

    Args:
        module: undecorated. What it computes here is returned, without a gradient of its own.
        args: of the call.
        kwargs: of the call.
        trained: the trainable parameters.
        delivery: makes theirs for a batch like this tensor, ``[0]``.

    **Guarantee.** Whatever is computed from the result, its backward hands the ledger no gradient.
    """
    with torch.no_grad():
        result = module(*args, **kwargs)
    device = next((x.device for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
    (norms,), _, _ = through_delivery(delivery(torch.zeros(0, device=device)), list(trained.values()), [])
    nothing = norms.sum()

    def joined(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value + nothing.to(value.dtype) if floating else value

    return pytree.tree_map(joined, result)
