"""Noise, division and Adam's update in one pass over memory, where the inner optimizer is plain Adam or AdamW.

On a GPU it is one launch for each parameter group.

Source: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2 (decoupled weight decay).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from dpcompile._torch.optim import adam_state, add_one_, is_stepped_as_made, mark_stepped
from dpcompile.kernels import gaussian as native
from dpcompile.noise.banded import BandedMechanism
from dpcompile.noise.counter import Stream, counter_tag
from dpcompile.noise.exact import ExactMechanism
from dpcompile.noise.mechanism import GaussianMechanism, Mechanism, Release
from dpcompile.runtime.bystanders import refuse_bystander

__all__ = ["drawn_with", "on_host", "update_"]

_OFF = ("amsgrad", "maximize", "capturable", "differentiable")


def update_(
    optimizer: Optimizer,
    weights: Sequence[Tensor],
    release: Release,
    mechanism: Mechanism,
) -> bool:
    """The whole step of ``optimizer`` on the private means of a release, if this file knows how to do it.

    Independent noise is drawn in the same pass, and correlated noise added in it; what other mechanisms release is put
    there before.

    Args:
        optimizer: the inner one, with one pre-hook of its own (the guard of `DPOptimizer`).
        weights: all its parameters that get an update.
        release: their clipped sums, whole; they become the private means and the parameters' ``.grad``.
        mechanism: what releases them.

    Returns:
        Whether it was done. If not, nothing was changed.

    **Guarantee.** As of :func:`dpcompile.noise.mechanism.privatize_`: the update is a function of what that leaves in
    the totals, and the same noise is drawn whether this file takes the step or not.

    =============================================================  ============
    edge case                                                      outcome
    =============================================================  ============
    a subclass, another ``step``, hooks on the inner optimizer     not done here
    amsgrad, maximize, capturable, differentiable                  not done here
    another mechanism, exact or cryptographic noise                released first, then one pass
    weights narrower than float32, not contiguous                  not done here
    a GPU, and ``fused=True`` or numbers that lie there            not done here: it would wait for the device
    a learning-rate scheduler on the inner optimizer               done here
    =============================================================  ============
    """
    groups, totals = optimizer.param_groups, release.totals
    if type(optimizer) not in (Adam, AdamW) or not is_stepped_as_made(
        optimizer, hooks=1, everywhere=[refuse_bystander]
    ):
        return False
    if any(group[name] for group in groups for name in _OFF):
        return False
    states = [optimizer.state.get(w, {}) for w in weights]
    held = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq") if name in state]
    if not native.takes([*weights, *totals, *held]):
        return False
    if any(not on_host(state.get("step")) for state in states) or any(_waits(group, weights[0]) for group in groups):
        return False
    std, divisor, drawn = drawn_with(mechanism, release)
    for w, total in zip(weights, totals, strict=True):
        w.grad = total
    index = {id(w): parameter for w, parameter in zip(weights, release.parameters, strict=True)}
    for group in groups:
        params, grads, means, squares, steps = adam_state(optimizer, group)
        if not params:
            continue
        add_one_(steps)
        counts = [int(count) for count in steps]
        for count in sorted(set(counts)):
            members = [i for i, c in enumerate(counts) if c == count]
            chosen = [[kind[i] for i in members] for kind in (grads, params, means, squares)]
            native.adam_(
                *chosen,
                tags=[counter_tag(Stream.GRADIENT, index[id(params[i])]) for i in members],
                std=std,
                divisor=divisor,
                seed=mechanism.seed,
                step=release.step,
                drawn=None if drawn is None else [drawn[id(total)] for total in chosen[0]],
                rates=_rates(type(optimizer) is AdamW or group.get("decoupled_weight_decay", False), group, count),
            )
    mark_stepped(optimizer)
    return True


def drawn_with(mechanism: Mechanism, release: Release) -> tuple[float, float, dict[int, Tensor] | None]:
    """What is left for the pass of the update to do: a standard deviation, a divisor, and rows of noise.

    Returns:
        The noise's standard deviation, what to divide by, and, where noise is not drawn in the pass, the noise for each
        total by its ``id``. Where nothing is left to do, 0, 1, and None: the totals are released.
    """
    if isinstance(mechanism, GaussianMechanism) and not (mechanism.secure or isinstance(mechanism, ExactMechanism)):
        return mechanism.std, mechanism.expected_batch_size, None
    if isinstance(mechanism, BandedMechanism) and mechanism.bands > 1 and mechanism.std > 0:
        rows = {id(total): row for total, row in mechanism.noise(release)}
        return mechanism.std, mechanism.expected_batch_size, rows
    mechanism.release(release)
    return 0.0, 1.0, None


def on_host(*numbers: object) -> bool:
    """Whether none of these has to be waited for."""
    return all(not isinstance(x, Tensor) or x.device.type == "cpu" for x in numbers)


def _waits(group: dict, weight: Tensor) -> bool:
    on_device = bool(group.get("fused")) and weight.device.type != "cpu"  # its counts of steps lie there
    return on_device or not on_host(group["lr"], *group["betas"])


def _rates(decoupled: bool, group: dict, count: int) -> tuple[float, ...]:
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return (
        1 - lr * decay if decoupled else 1.0,
        0.0 if decoupled else decay,
        beta1,
        beta2,
        lr / (1 - beta1**count),
        math.sqrt(1 - beta2**count),
        float(group["eps"]),
    )
