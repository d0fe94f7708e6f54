"""What a stage of a pipeline hands to the next one, which takes it for rows of examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dpcompile._torch import pytree
from dpcompile.distributed.borders import Border
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.labels import Examples, Label, Whole

__all__ = ["border_of"]


def border_of(result: Any, labels: Mapping[int, Label], examples_per_user: int) -> Border:
    """Along which dimensions of the ranks' mesh each tensor that a stage hands on may be another one on each rank.

    Args:
        result: of the stage's module.
        labels: ``id(tensor)`` -> what the proof found out about it.
        examples_per_user: rows of a user, one after the other.

    **Guarantee.** Row i of what the next stage is given depends on example i alone, or this raises.

    Raises:
        UnsupportedGraphError: they are not floating-point tensors with the examples on dimension 0.
    """
    border = []
    for tensor in pytree.tree_leaves(result):
        label = labels.get(id(tensor)) if isinstance(tensor, Tensor) else None
        rows = isinstance(label, Examples) and (label.dim, label.outer, label.inner) == (0, 1, examples_per_user)
        alone = isinstance(label, Whole) and isinstance(tensor, Tensor) and tensor.shape[:1] == (examples_per_user,)
        if not (rows or alone) or not tensor.is_floating_point():
            kind = f"{tensor.dtype} {list(tensor.shape)}, {label}" if isinstance(tensor, Tensor) else repr(tensor)
            raise UnsupportedGraphError(
                f"a stage of a pipeline returns {kind}: the next stage takes what it is given for one row an example, "
                "on dimension 0, and sends gradients back",
                remedy="return floating-point tensors with the examples on dimension 0; give other inputs to each "
                "stage itself (schedule.step(..., name=tensor)), and compute what no example has where it is needed",
            )
        assert isinstance(label, (Examples, Whole))
        border.append(tuple(axis for axis, _ in label.own))
    return tuple(border)
