"""What a captured graph is given beside its own inputs: mask, norms, weights or bounds, and sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dpcompile._torch.aot import add_inputs
from dpcompile._torch.tensors import detect_fake_mode
from dpcompile.capture.outputs import separate_outputs
from dpcompile.capture.roles import Roles

__all__ = ["extend"]
MASK, NORMS, SUM, WEIGHTS = "dpcompile_mask", "dpcompile_norms", "dpcompile_sum", "dpcompile_weights"
BOUNDS = "dpcompile_bounds"


def extend(gm: fx.GraphModule, roles: Roles) -> tuple[fx.GraphModule, list[Tensor]]:
    """Append inputs: the padding mask ``[B]``, and some whose only use is to receive a gradient.

    The norms leave the compiled backward as the gradient of the second one, ``[B]``. One more float32 input for every
    parameter of a narrower dtype receives its clipped sum: autograd would round the parameter's own gradient. Outputs
    that overlap in memory are copied. In a region norms are squared and ``[parameters, B]``, float64, and so is one
    input more: the clip weights, or, clipped at once, the bound C of every parameter's group. A model in one graph and
    several clip groups has the groups' bounds as an input, ``[groups, B]``, float64; its gradient is their norms.
    """
    position, dim = roles.batch_from
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    like = placeholders[position].meta["example_value"]
    fake_mode = detect_fake_mode([like])
    assert fake_mode is not None
    axis = roles.layouts.get(position)
    batch: Any = like.shape[dim] if axis is None else roles.batch
    with fake_mode:
        mask = torch.empty(batch, device=like.device, dtype=torch.float32)
        if roles.lowering is not None:
            norms = mask.new_empty((len(roles.parameters), batch), dtype=torch.float64, requires_grad=True)
            weights = {WEIGHTS: torch.empty_like(norms, requires_grad=False)}
        else:
            norms, weights = torch.empty_like(mask, requires_grad=True), {}
            if roles.groups:
                shape = len(roles.groups), batch
                weights = {BOUNDS: mask.new_empty(shape, dtype=torch.float64, requires_grad=True)}
        wide = [
            torch.zeros((), device=fake.device, dtype=torch.float32).expand(fake.shape).requires_grad_()
            for fake in (placeholders[p].meta["example_value"] for p in roles.narrow)
        ]
    named = {MASK: mask, NORMS: norms} | weights | {f"{SUM}_{i}": w for i, w in enumerate(wide)}
    extended = add_inputs(gm, named)
    separate_outputs(extended)
    extended.recompile()
    return extended, list(named.values())
