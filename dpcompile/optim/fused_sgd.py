"""Noise, division and the update of plain SGD in one launch for each parameter group, on GPUs.

On CPUs torch's own update follows the noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from dpcompile._torch.optim import is_stepped_as_made, mark_stepped, sgd_state
from dpcompile.kernels import gaussian as native
from dpcompile.kernels.on_gpu import runs_triton
from dpcompile.noise.counter import Stream, counter_tag
from dpcompile.noise.mechanism import Mechanism, Release
from dpcompile.optim.fused_adam import drawn_with, on_host
from dpcompile.runtime.bystanders import refuse_bystander

__all__ = ["update_"]


def update_(optimizer: Optimizer, weights: Sequence[Tensor], release: Release, mechanism: Mechanism) -> bool:
    """The same as :func:`dpcompile.optim.fused_adam.update_`, of SGD, with momentum or without.

    **Guarantee.** As there.

    =========================================================  =========================================
    edge case                                                  outcome
    =========================================================  =========================================
    a CPU, a subclass, another ``step``, hooks                 not done here
    maximize, differentiable                                   not done here
    a learning rate that lies on the GPU                       not done here: it would wait for it
    weights narrower than float32, not contiguous              not done here
    parameters without a momentum buffer, among such with one  one launch for each kind
    =========================================================  =========================================
    """
    groups, totals = optimizer.param_groups, release.totals
    if type(optimizer) is not SGD or not is_stepped_as_made(optimizer, hooks=1, everywhere=[refuse_bystander]):
        return False
    if any(group["maximize"] or group["differentiable"] or not on_host(group["lr"]) for group in groups):
        return False
    held = [optimizer.state.get(w, {}).get("momentum_buffer") for w in weights]
    tensors = [*weights, *totals, *(buffer for buffer in held if buffer is not None)]
    if not (tensors and runs_triton(tensors[0].device) and native.takes(tensors)):
        return False
    std, divisor, drawn = drawn_with(mechanism, release)
    for w, total in zip(weights, totals, strict=True):
        w.grad = total
    index = {id(w): parameter for w, parameter in zip(weights, release.parameters, strict=True)}
    for group in groups:
        params, grads, buffers = sgd_state(optimizer, group)
        for new in (False, True):
            members = [i for i in range(len(params)) if new is (group["momentum"] != 0 and buffers[i] is None)]
            if not members:
                continue
            native.sgd_(
                [grads[i] for i in members],
                [params[i] for i in members],
                [_buffer(optimizer, params[i], buffers[i]) for i in members] if buffers else [],
                tags=[counter_tag(Stream.GRADIENT, index[id(params[i])]) for i in members],
                std=std,
                divisor=divisor,
                seed=mechanism.seed,
                step=release.step,
                drawn=None if drawn is None else [drawn[id(grads[i])] for i in members],
                rates=_rates(group, new),
            )
    mark_stepped(optimizer)
    return True


def _buffer(optimizer: Optimizer, weight: Tensor, buffer: Tensor | None) -> Tensor:
    """The momentum buffer, or one that holds nothing yet."""
    if buffer is None:
        buffer = optimizer.state[weight]["momentum_buffer"] = torch.empty_like(weight.detach())
    return buffer


def _rates(group: dict, new: bool) -> tuple[float, ...]:
    plain = (float(group["lr"]), float(group["weight_decay"]))
    if not group["momentum"]:
        return plain
    return (*plain, float(group["momentum"]), 1 - float(group["dampening"]), float(new), float(group["nesterov"]))
