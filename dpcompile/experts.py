"""Experts of a mixture on several ranks, each rank with examples of its own: expert parallelism.

The same module runs on one rank and on several, and trains privately or not::

    class Experts(nn.Module):
        def __init__(self, experts, width, hidden):
            super().__init__()
            self.router = nn.Linear(width, experts)
            self.up = nn.Parameter(torch.randn(experts, width, hidden) / width**0.5)
            self.down = nn.Parameter(torch.randn(experts, hidden, width) / hidden**0.5)

        def forward(self, x):  # [B, T, width]
            rows = x.flatten(0, 1)
            weights, chosen = self.router(rows).softmax(-1).topk(2)
            out = 0
            for weight, expert in zip(weights.unbind(1), chosen.unbind(1)):
                hidden = products_of_experts(rows, self.up, expert).relu()
                out = out + products_of_experts(hidden, self.down, expert) * weight.unsqueeze(1)
            return x + out.view(x.shape)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import dpcompile.graph.sent_products  # noqa: F401  # registers the operations
from dpcompile.distributed.expert_parallel import note_group
from dpcompile.distributed.shards import is_distributed
from dpcompile.errors import UnsupportedGraphError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["cut_experts", "products_of_experts"]


def cut_experts(module: nn.Module, mesh: DeviceMesh, *names: str) -> nn.Module:
    """Cut parameters of a module along their first dimension, the experts, over ranks that have batches of their own.

    Before ``fully_shard`` and ``dp_compile``::

        mesh = init_device_mesh("cuda", (ranks // 8, 8), mesh_dim_names=("edp", "ep"))
        for block in model.blocks:
            cut_experts(block.experts, mesh["ep"], "up", "down")
            fully_shard(block.experts, mesh=mesh["edp"])  # also where edp is 1
        fully_shard(model, mesh=init_device_mesh("cuda", (ranks,)))

    Whole matrices must fit on each rank while they are cut; the values are those of the first rank of ``mesh``.

    Args:
        module: has the parameters, ``[E, ..]`` each.
        mesh: of one dimension.
        names: of its own parameters; none: all of them.

    Returns:
        The module.

    Raises:
        UnsupportedGraphError: E does not divide by the ranks, or ``mesh`` has several dimensions.
    """
    from torch.distributed.tensor import Shard, distribute_tensor

    if mesh.ndim != 1:
        raise UnsupportedGraphError(
            f"experts cut over a mesh of {mesh.ndim} dimensions", remedy="take one of them: mesh['ep']"
        )
    own = dict(module.named_parameters(recurse=False))
    for name in names or own:
        whole = own[name]
        if whole.ndim == 0 or whole.shape[0] % mesh.size():
            raise UnsupportedGraphError(
                f"'{name}' of shape {list(whole.shape)} does not divide by the {mesh.size()} ranks along its first "
                "dimension, the experts",
                remedy="take a number of ranks that divides the number of experts, and cut nothing else by cut_experts "
                "(give the names of the matrices)",
            )
        part = distribute_tensor(whole.detach(), mesh, [Shard(0)])
        setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))
    note_group(mesh.get_group())
    return module


def products_of_experts(rows: Tensor, matrices: Tensor, expert: Tensor) -> Tensor:
    """``rows[n] @ matrices[expert[n]]``: every row times the matrix of its expert, wherever that lies.

    Of matrices that :func:`cut_experts` cut, rows are sent to the rank that has their expert, as many as there are, and
    the products back: two all-to-alls of ``P`` and ``D`` numbers a row, and one that counts them. The backward sends
    cotangents the same way, and once more rows and cotangents, ``P + D`` numbers, for the matrices' gradient, which is
    that of all ranks' examples. All else that is done to rows is done where their example is.

    **Guarantee.** Row n of the result depends on row n, ``expert[n]`` and the matrices, and on no other row.

    Without ``dp_compile`` gradients are added up over the ranks, where FSDP2 takes a mean of those of other parameters:
    ``set_gradient_divide_factor`` makes them alike.

    ==============================================  =======================================================
    edge case                                       outcome
    ==============================================  =======================================================
    all rows to one expert, an expert without rows  right
    a rank without rows for some of the experts     right; each rank may have another number of rows
    a number of E or more                           the row comes out as zeros (a capacity per example, say)
    a number below 0                                IndexError, on all ranks when one has it
    ranks that are at other products                PrivacyError on all, if sizes differ
    ==============================================  =======================================================

    Args:
        rows: ``[N, P]``, floating point; N is the product of the batch size and any others, or their order.
        matrices: ``[E, P, D]``: a parameter, whole or cut; rows are taken in its dtype.
        expert: integers, ``[N]``.

    Returns:
        ``[N, D]``, in the dtype of the matrices.

    Raises:
        ValueError: shapes that do not belong together.
        IndexError: see there.
    """
    if rows.ndim != 2 or matrices.ndim != 3 or expert.shape != rows.shape[:1] or rows.shape[1] != matrices.shape[1]:
        raise ValueError(
            f"rows {tuple(rows.shape)}, matrices {tuple(matrices.shape)} and experts {tuple(expert.shape)} do not "
            "belong together: they are [N, P], [E, P, D] and [N]"
        )
    rows = rows.to(matrices.dtype)
    if not is_distributed(matrices):
        return torch.ops.dpcompile.expert_products(rows, matrices, expert)
    cut: Any = matrices
    return torch.ops.dpcompile.sent_products(rows, cut.to_local(), expert, cut.device_mesh.get_group().group_name)
