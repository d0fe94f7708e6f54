"""What DPOptimizer refuses: parameters that are not the model's, numbers without sense, states that repeat."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dpcompile.errors import PrivacyError
from dpcompile.privacy import PrivacyAccountant
from dpcompile.runtime import Engine
from dpcompile.state_checks import OPTIMIZER, refuse_malformed

__all__ = [
    "refuse_bad_numbers",
    "refuse_closure_only",
    "refuse_complex",
    "refuse_foreign",
    "refuse_missing",
    "refuse_other_accountant",
    "refuse_state",
    "refuse_stray",
]


def refuse_bad_numbers(noise_multiplier: float, expected_batch_size: float) -> None:
    """Sigma finite and not negative, batch size finite and positive."""
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise PrivacyError(
            f"noise_multiplier is {noise_multiplier}", remedy="give a finite number, 0 or more (0: no privacy)"
        )
    if not (math.isfinite(expected_batch_size) and expected_batch_size > 0):
        raise PrivacyError(
            f"expected_batch_size is {expected_batch_size}",
            remedy="give the sample rate times the size of the dataset, a positive number",
        )


def refuse_closure_only(optimizer: Optimizer) -> None:
    """An optimizer whose step cannot do without a closure (LBFGS) uses many gradients per step."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PrivacyError(
            f"{type(optimizer).__name__} evaluates the loss several times within a step",
            remedy="take an optimizer that uses one gradient per step, such as SGD or Adam",
        )


def refuse_other_accountant(noise_multiplier: float, accountant: PrivacyAccountant | None) -> None:
    """The accountant must count the noise that is added."""
    if accountant is not None and accountant.noise_multiplier != noise_multiplier:
        raise PrivacyError(
            f"the optimizer adds noise of multiplier {noise_multiplier}, its accountant counts "
            f"{accountant.noise_multiplier}",
            remedy="give both the same noise_multiplier",
        )


def refuse_foreign(engine: Engine, params: Iterable[Tensor]) -> None:
    """Every optimized parameter is one of the model's: any other would be updated outside the guarantee."""
    held = {id(p) for p in engine.parameters().values()}
    foreign = [tuple(p.shape) for p in params if id(p) not in held]
    if foreign:
        raise PrivacyError(
            f"the optimizer has {len(foreign)} parameter(s) that the model does not hold, of shape "
            + ", ".join(map(str, foreign[:5])),
            remedy="build it over model.parameters() of the compiled model and nothing else",
        )


def refuse_missing(engine: Engine, optimizer: Optimizer, trainable: Sequence[str]) -> None:
    """Every trainable parameter is optimized: its gradient was clipped and counted, so it is meant to be used."""
    optimized, parameters = _optimized(optimizer), engine.parameters()
    missing = [name for name in trainable if id(parameters[name]) not in optimized]
    if missing:
        raise PrivacyError(
            "trainable parameters of the model that the optimizer does not hold: " + ", ".join(map(repr, missing)),
            remedy="add them to the optimizer (add_param_group), or freeze them with requires_grad_(False)",
        )


def refuse_stray(engine: Engine, optimizer: Optimizer, trainable: Sequence[str]) -> None:
    """A frozen parameter gets no noise, so it must not have a gradient either."""
    optimized, names = _optimized(optimizer), set(trainable)
    for name, p in engine.parameters().items():
        if name not in names and p.grad is not None and id(p) in optimized:
            raise PrivacyError(
                f"the frozen parameter '{name}' has a gradient: the update would apply it without noise",
                remedy="call optimizer.zero_grad() after freezing it, or set its .grad to None",
            )


def refuse_complex(engine: Engine, trainable: Sequence[str]) -> None:
    """The noise is real."""
    parameters = engine.parameters()
    for name in trainable:
        if parameters[name].is_complex():
            raise PrivacyError(
                f"the trainable parameter '{name}' is complex, and the noise is real",
                remedy="hold it as a real parameter and use torch.view_as_complex in forward",
            )


def refuse_state(own: Mapping[str, Any] | None, current: Mapping[str, Any]) -> None:
    """A state to resume from has our entry, goes on where noise has not been used, and means the same mechanism."""
    if own is None:
        raise PrivacyError(
            "the state dict has no 'dpcompile' entry: seed and logical step of the run are unknown",
            remedy="load what DPOptimizer.state_dict(), torch's get_optimizer_state_dict or "
            "dpcompile.checkpoint.save_checkpoint saved; load a plain optimizer's state into .optimizer",
        )
    refuse_malformed(own, OPTIMIZER, "DPOptimizer")
    same = own["seed"] == current["seed"] and own["secure"] == current["secure"]
    if same and own["logical_step"] < current["logical_step"]:
        raise PrivacyError(
            f"the state dict stands at logical step {own['logical_step']}, this optimizer at "
            f"{current['logical_step']} of the same seed: the noise of the steps between would be used twice",
            remedy="resume from the latest state, or make a new DPOptimizer with another seed",
        )
    for name in ("noise_multiplier", "expected_batch_size", "secure"):
        if own[name] != current[name]:
            raise PrivacyError(
                f"{name} was {own[name]} in the saved run and is {current[name]} here",
                remedy=f"make the DPOptimizer with {name}={own[name]}",
            )
    if current["accountant"] is not None and own["accountant"] is None and own["logical_step"]:
        raise PrivacyError(
            f"the saved run took {own['logical_step']} steps without an accountant: epsilon would leave them out",
            remedy="load it into a DPOptimizer without accountant, or give the saving run an accountant",
        )


def _optimized(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
