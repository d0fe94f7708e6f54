"""Products of rows with one matrix each, which an index chooses: what the experts of a mixture compute.

Libraries sort the rows of all examples by expert, multiply each stretch with its matrix, and undo the sorting (Gale et
al. 2022, arXiv:2211.15841, section 5). These operations take the rows where they lie, and sort them inside: row n of
the result is made of row n alone, whatever the other rows are. A number of E or more is that of no expert here (under
expert parallelism another rank has it, and the libraries' products stop before such rows): its row comes out as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dpcompile._torch.autograd import refuse_forward_mode

__all__ = ["each_expert_sum", "expert_products", "expert_sums", "experts_of_examples", "stretches"]

_TAGS = (torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe)  # rows are counted


@torch.library.custom_op("dpcompile::expert_products", mutates_args=(), tags=_TAGS)
def expert_products(rows: Tensor, matrices: Tensor, expert: Tensor) -> Tensor:
    """``rows[n] @ matrices[expert[n]]``; zeros for a row of no expert.

    **Guarantee.** Row n of the result depends on row n, on ``expert[n]`` and on ``matrices``.

    Args:
        rows: ``[N, P]``.
        matrices: ``[E, P, D]``.
        expert: integers, ``[N]``; E or more for no expert.

    Returns:
        ``[N, D]``.

    Raises:
        IndexError: a number below 0.
        NotImplementedError: a forward-mode derivative is taken.
    """
    refuse_forward_mode("a product with experts' matrices")
    result = rows.new_zeros(rows.shape[0], matrices.shape[2])
    for number, which in stretches(expert, matrices.shape[0]):
        result[which] = rows[which] @ matrices[number]
    return result


@expert_products.register_fake
def _(rows: Tensor, matrices: Tensor, expert: Tensor) -> Tensor:
    """Shapes only."""
    refuse_forward_mode("a product with experts' matrices")
    return rows.new_empty(rows.shape[0], matrices.shape[2])


@torch.library.custom_op("dpcompile::expert_sums", mutates_args=(), tags=_TAGS)
def expert_sums(left: Tensor, right: Tensor, expert: Tensor, count: int) -> Tensor:
    """The sum of ``left[n] right[n]^T`` over all n with ``expert[n] == e``, for every e.

    Args:
        left: ``[N, P]``.
        right: ``[N, D]``.
        expert: integers, ``[N]``; E or more for no expert.
        count: E.

    Returns:
        ``[E, P, D]``.

    Raises:
        IndexError: a number below 0.
    """
    result = left.new_zeros(count, left.shape[1], right.shape[1])
    for number, which in stretches(expert, count):
        torch.mm(left[which].mT, right[which], out=result[number])
    return result


@expert_sums.register_fake
def _(left: Tensor, right: Tensor, expert: Tensor, count: int) -> Tensor:
    """Shapes only."""
    return left.new_empty(count, left.shape[1], right.shape[1])


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Any:
    rows, matrices, expert = ctx.saved_tensors
    products, sums = torch.ops.dpcompile.expert_products, torch.ops.dpcompile.expert_sums
    of_rows = products(grad, matrices.mT, expert) if ctx.needs_input_grad[0] else None
    of_matrices = sums(rows, grad, expert, matrices.shape[0]) if ctx.needs_input_grad[1] else None
    return of_rows, of_matrices, None


expert_products.register_autograd(_backward, setup_context=_save)


def each_expert_sum(left: Tensor, right: Tensor, expert: Tensor, count: int) -> Tensor:
    """:func:`expert_sums` of every example by itself, for tracing.

    Args:
        left: ``[B, T, P]``.
        right: ``[B, T, D]``.
        expert: ``[B, T]``.
        count: E.

    Returns:
        ``[B, E, P, D]``.
    """
    batch, own = expert.shape[0], experts_of_examples(expert, count)
    sums = torch.ops.dpcompile.expert_sums(left.flatten(0, 1), right.flatten(0, 1), own, batch * count)
    return sums.unflatten(0, (batch, count))


def experts_of_examples(expert: Tensor, count: int) -> Tensor:
    """Experts ``[B, T]`` numbered anew, so that each example has E of its own: ``[B * T]``.

    **Guarantee.** One that is none of E does not become another example's: it is none of B * E.
    """
    batch = expert.shape[0]
    own = expert + count * torch.arange(batch, device=expert.device).unsqueeze(1)
    return torch.where(expert < 0, -1, torch.where(expert < count, own, batch * count)).flatten()


def stretches(expert: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """The experts that are asked for, each with the positions of its rows; rows of no expert are left out.

    Raises:
        IndexError: a number below 0.
    """
    ordered, order = expert.sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(count + 1, device=ordered.device, dtype=ordered.dtype)).tolist()
    if ends[0]:
        raise IndexError("a row asks for an expert with a number below 0")
    for number in range(count):
        if ends[number] < ends[number + 1]:
            yield number, order[ends[number] : ends[number + 1]]
