"""Products of rows with matrices that lie on other ranks: expert parallelism, each rank with examples of its own.

Every rank of a group holds E/n of E experts. Rows are sent to the rank that has their expert, are multiplied there,
and what comes out is sent back to where they lay (Lepikhin et al. 2020, arXiv:2006.16668, section 3; as many as there
are, without a capacity). So a row and its cotangent stay with the rank that has the example: its norm is taken there,
of all experts, and its clip weight is known where its rows are sent from. Of examples of other ranks a rank sees rows
that are weighted already, and only adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpcompile._torch.autograd import refuse_forward_mode
from dpcompile._torch.parallel import group_named, ranks_of_group
from dpcompile.errors import PrivacyError, UnsupportedGraphError
from dpcompile.graph.expert_products import expert_products, expert_sums

__all__ = ["all_experts", "is_sent", "no_gradient_of_one_example", "sent_products", "sent_sums"]

_TAGS = (torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe)  # rows are counted
_PRODUCTS, _SUMS = 1, 2
_SAID = 4  # numbers with each message: of which operation it is, its sizes, and whether a number is below 0


@torch.library.custom_op("dpcompile::sent_products", mutates_args=(), tags=_TAGS)
def sent_products(rows: Tensor, matrices: Tensor, expert: Tensor, group: str) -> Tensor:
    """``rows[n] @ M[expert[n]]``, of the matrices M of all ranks; zeros for a row of no expert.

    Every rank of the group calls this, in one order; rows are sent in one all-to-all, and the products in another,
    behind one that says how many they are.

    **Guarantee.** Row n of the result depends on row n, on ``expert[n]`` and on the matrices. Ranks that are not at the
    same call all raise.

    Args:
        rows: ``[N, P]``; N may be another one on each rank.
        matrices: ``[E/n, P, D]``, those of this rank.
        expert: integers, ``[N]``, by the order of the ranks in the group; E or more for no expert.
        group: the name of the process group.

    Returns:
        ``[N, D]``.

    Raises:
        IndexError: on all ranks, a number below 0 on one of them.
        PrivacyError: on all ranks, another call on one of them.
        NotImplementedError: a forward-mode derivative is taken.
    """
    refuse_forward_mode("a product with experts' matrices")
    dealt = _Dealt.of(expert, matrices.shape[0], group, (_PRODUCTS, *matrices.shape[1:]))
    products = expert_products(dealt.there(rows), matrices, dealt.local)
    return dealt.back(products, rows.shape[0])


@sent_products.register_fake
def _(rows: Tensor, matrices: Tensor, expert: Tensor, group: str) -> Tensor:
    """Shapes only."""
    refuse_forward_mode("a product with experts' matrices")
    return rows.new_empty(rows.shape[0], matrices.shape[2])


@torch.library.custom_op("dpcompile::sent_sums", mutates_args=(), tags=_TAGS)
def sent_sums(left: Tensor, right: Tensor, expert: Tensor, count: int, group: str) -> Tensor:
    """The sum of ``left[n] right[n]^T`` over all ranks' n with ``expert[n] == e``, for every e of this rank.

    Every rank of the group calls this, in one order; rows are sent in one all-to-all, behind one that says how many
    they are.

    Args:
        left: ``[N, P]``.
        right: ``[N, D]``.
        expert: integers, ``[N]``, as of :func:`sent_products`.
        count: E/n.
        group: the name of the process group.

    Returns:
        ``[E/n, P, D]``.

    Raises:
        IndexError: on all ranks, a number below 0 on one of them.
        PrivacyError: on all ranks, another call on one of them.
    """
    width = left.shape[1]
    dealt = _Dealt.of(expert, count, group, (_SUMS, width, right.shape[1]))
    rows = dealt.there(torch.cat([left, right], 1))
    return expert_sums(rows[:, :width], rows[:, width:], dealt.local, count)


@sent_sums.register_fake
def _(left: Tensor, right: Tensor, expert: Tensor, count: int, group: str) -> Tensor:
    """Shapes only."""
    return left.new_empty(count, left.shape[1], right.shape[1])


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    rows, matrices, expert, ctx.group = inputs
    ctx.save_for_backward(rows, matrices, expert)


def _backward(ctx: Any, grad: Tensor) -> Any:
    rows, matrices, expert = ctx.saved_tensors
    there, sums = torch.ops.dpcompile.sent_products, torch.ops.dpcompile.sent_sums
    of_rows = there(grad, matrices.mT, expert, ctx.group) if ctx.needs_input_grad[0] else None
    of_matrices = None
    if ctx.needs_input_grad[1]:
        of_matrices = sums(rows, grad, expert, matrices.shape[0], ctx.group)
    return of_rows, of_matrices, None, None


sent_products.register_autograd(_backward, setup_context=_save)


def is_sent(target: Any) -> bool:
    """Whether an operation sends rows to other ranks' experts."""
    return target in (torch.ops.dpcompile.sent_products.default, torch.ops.dpcompile.sent_sums.default)


def all_experts(count: int, group: str) -> int:
    """E, of a group of which each rank has ``count``."""
    return count * len(ranks_of_group(group))


def no_gradient_of_one_example(*operands: Any) -> Tensor:
    """What would be an example's gradient lies on all ranks: none of them can make it.

    Raises:
        UnsupportedGraphError: always.
    """
    raise UnsupportedGraphError(
        "the gradient of experts that lie on other ranks is needed example by example: something stands between the "
        "parameter and dpcompile.experts.products_of_experts, or an operator asks for it",
        remedy="pass the parameter itself, one for each product (no torch.cat, slices, sums or products of parameters; "
        "it may be transposed or cast)",
    )


@dataclass(slots=True)
class _Dealt:
    """Which rows go where.

    Attributes:
        group: of the ranks.
        order: positions of the rows that are sent, by expert.
        sent: how many go to each rank.
        received: how many come from each.
        local: of those that come, in their order, the number of the expert among this rank's.
    """

    group: Any
    order: Tensor
    sent: list[int]
    received: list[int]
    local: Tensor

    @classmethod
    def of(cls, expert: Tensor, count: int, group: str, said: tuple[int, ...]) -> _Dealt:
        """Tell every rank how many rows come to each of its experts."""
        ranks, resolved = len(ranks_of_group(group)), group_named(group)
        ordered, order = expert.sort(stable=True)
        steps = torch.arange(ranks * count + 1, device=expert.device, dtype=ordered.dtype)
        ends = torch.searchsorted(ordered, steps)
        below = (ends[:1] > 0).long()
        counts = ends.diff().view(ranks, count)
        own = torch.cat([ends.new_tensor(said), below])
        message = torch.cat([own.expand(ranks, _SAID), counts], 1)
        answer = torch.empty_like(message)
        dist.all_to_all_single(answer, message, group=resolved)
        if bool((answer[:, : _SAID - 1] != own[: _SAID - 1]).any()):
            raise PrivacyError(
                "the ranks that hold experts are not at the same product: rows would come to the wrong experts",
                remedy="run the same layers, in the same order, on every rank: no branch that one rank alone takes",
            )
        if bool(answer[:, _SAID - 1].any()):
            raise IndexError("a row asks for an expert with a number below 0, on one rank or more")
        coming = answer[:, _SAID:]
        local = torch.arange(count, device=expert.device).repeat(ranks).repeat_interleave(coming.flatten())
        first, last = int(ends[0]), int(ends[-1])
        return cls(resolved, order[first:last], counts.sum(1).tolist(), coming.sum(1).tolist(), local)

    def there(self, rows: Tensor) -> Tensor:
        """What comes here, from all ranks."""
        return self._exchanged(rows[self.order], self.sent, self.received)

    def back(self, products: Tensor, rows: int) -> Tensor:
        """Where the rows lay that were sent; zeros in the place of those that were not."""
        own = self._exchanged(products, self.received, self.sent)
        return own.new_zeros(rows, own.shape[1]).index_copy(0, self.order, own)

    def _exchanged(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        given = rows.contiguous()
        taken = given.new_empty(sum(received), given.shape[1])
        if not given.shape[1]:
            return taken
        into, given = taken.view(torch.uint8), given.view(torch.uint8)  # any dtype, on any backend
        dist.all_to_all_single(into, given, received, sent, group=self.group)
        return taken
