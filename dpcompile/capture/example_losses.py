"""One loss per example: the user's loss function on one example at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpcompile._torch import pytree

__all__ = ["ExampleLosses"]


class ExampleLosses(nn.Module):
    """A model and a loss as one module, from a batch to ``[B]``: each loss is that of a batch of one."""

    def __init__(self, module: nn.Module, loss_fn: Callable[[Any, Any], Tensor], out_dims: int) -> None:
        super().__init__()
        self.module, self.loss_fn, self.out_dims = module, loss_fn, out_dims

    def forward(self, inputs: Any, targets: Any, dims: Any) -> Tensor:
        """``[B]``; ``dims`` says where the examples of the targets lie."""
        if isinstance(inputs, dict):
            outputs = self.module(**inputs)
        elif isinstance(inputs, (tuple, list)):
            outputs = self.module(*inputs)
        else:
            outputs = self.module(inputs)

        values, spec = pytree.tree_flatten((outputs, targets))
        out_count = len(pytree.tree_leaves(outputs))
        places = [self.out_dims] * out_count + pytree.tree_leaves(dims)
        sizes = [v.shape[d] for v, d in zip(values[out_count:], places[out_count:], strict=True) if _has(v, d)]
        mapped = [i for i, (v, d) in enumerate(zip(values, places, strict=True)) if _has(v, d, sizes)]

        def one(*slices: Tensor) -> Tensor:
            batches_of_one = list(values)
            for i, value in zip(mapped, slices, strict=True):
                batches_of_one[i] = value.unsqueeze(places[i])
            output, target = pytree.tree_unflatten(batches_of_one, spec)
            loss = self.loss_fn(output, target)
            if loss.numel() != 1:
                raise ValueError(f"loss_fn must give a scalar or one value per example, got shape {list(loss.shape)}")
            return loss.reshape(())

        return torch.func.vmap(one, in_dims=tuple(places[i] for i in mapped))(*(values[i] for i in mapped))


def _has(value: Any, dim: int | None, sizes: Sequence[int] = ()) -> bool:
    """Whether a value has the example dimension, of the targets' size; the proof decides what the others may do."""
    if dim is None or not isinstance(value, Tensor) or not -value.ndim <= dim < value.ndim:
        return False
    return not sizes or value.shape[dim] == sizes[0]
