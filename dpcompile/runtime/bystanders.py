"""Optimizers that are no DPOptimizer must not apply clipped sums, which have no noise yet; hooks would not see them."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dpcompile._torch.autograd import has_gradient_hooks
from dpcompile.errors import PrivacyError, PrivacyWarning, running_line
from dpcompile.runtime.ledger import GradientLedger
from dpcompile.runtime.optimizer_hooks import HookedOptimizer

__all__ = ["refuse_bystander", "refuse_hooks", "watch"]

_LEDGERS: weakref.WeakSet[GradientLedger] = weakref.WeakSet()
_TOLD: weakref.WeakSet[GradientLedger] = weakref.WeakSet()


def watch(ledger: GradientLedger) -> None:
    """From now on steps of torch optimizers on sums of this ledger are seen.

    **Guarantee.** A ``torch.optim.Optimizer`` that steps while a clipped sum stands in the ``p.grad`` of one of its
    parameters raises PrivacyError before it changes anything, or, where no DPOptimizer was made for the model, warns.

    ===============================================  ============================================
    edge case                                        outcome
    ===============================================  ============================================
    a DPOptimizer, or one that holds one to step it  nothing
    the inner optimizer, stepped by its DPOptimizer  nothing
    what a DPOptimizer left in ``p.grad``            nothing: it has its noise
    gradients of the undecorated model, public data  nothing, as long as no sum waits in ``p.grad``
    several private models over one module           each one's sums are seen
    no DPOptimizer: noise of one's own, or none      a PrivacyWarning, once for a model
    an update that no torch optimizer makes          not seen
    ===============================================  ============================================
    """
    _hook_steps()
    _LEDGERS.add(ledger)


@functools.lru_cache(maxsize=1)
def _hook_steps() -> None:
    register_optimizer_step_pre_hook(refuse_bystander)


def refuse_bystander(optimizer: Optimizer, *_: Any) -> None:
    """Before a step of any optimizer: see :func:`watch`."""
    if isinstance(optimizer, HookedOptimizer) or any(isinstance(v, HookedOptimizer) for v in vars(optimizer).values()):
        return
    ledgers = [ledger for ledger in _LEDGERS if ledger.deliveries and not ledger.applied]
    if not ledgers:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for ledger in ledgers:
        name = ledger.waiting(stepped)
        if name is not None:
            _refuse(ledger, name, optimizer)


def _refuse(ledger: GradientLedger, name: str, optimizer: Optimizer) -> None:
    kind = type(optimizer).__name__
    what = f"{kind}.step() on the clipped sum of parameter '{name}': its update would have no noise"
    remedy = "step the DPOptimizer, and no other optimizer over the parameters of the private model"
    if ledger.owned:
        raise PrivacyError(what, where=running_line(), remedy=remedy)
    if ledger not in _TOLD:
        _TOLD.add(ledger)
        warnings.warn(
            f"{what}. Right if you add noise of your own to p.grad; else DPOptimizer({kind.lower()}, model, "
            "noise_multiplier=.., expected_batch_size=..)",
            PrivacyWarning,
            stacklevel=4,
        )


def refuse_hooks(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise PrivacyError if one of these parameters has a hook on its gradient."""
    for name, parameter in named:
        if has_gradient_hooks(parameter):
            raise PrivacyError(
                f"parameter '{name}' has a hook on its gradient, which would not run: the clipped sum does not "
                "pass through autograd",
                remedy="remove the hook; change clipped sums in p.grad only through DPOptimizer",
            )
