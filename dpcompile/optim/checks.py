"""What DPOptimizer refuses: parameters that are not the model's, numbers without sense, states that repeat."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dpcompile.accounting.arguments import Relation
from dpcompile.accounting.events import rounds
from dpcompile.accounting.protocol import Accountant, check_accountant, counted
from dpcompile.errors import PrivacyError, PrivacyWarning
from dpcompile.module import Engine
from dpcompile.noise.mechanism import Mechanism
from dpcompile.optim.correlated import refuse_other_matrix
from dpcompile.optim.exactness import refuse_other_grid
from dpcompile.optim.quantiles import refuse_other_shares
from dpcompile.optim.state_checks import OPTIMIZER, refuse_malformed

__all__ = [
    "refuse_bad_accountant",
    "refuse_bad_numbers",
    "refuse_closure_only",
    "refuse_complex",
    "refuse_foreign",
    "refuse_foreign_parameters",
    "refuse_forgetful",
    "refuse_missing",
    "refuse_other_accountant",
    "refuse_other_mechanism",
    "refuse_other_rate",
    "refuse_replaced",
    "refuse_state",
    "refuse_stray",
    "refuse_used_noise",
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


_MECHANISM = (*(n for n in vars(Mechanism) if not n.startswith("_")), *Mechanism.__annotations__)


def refuse_other_mechanism(mechanism: Mechanism, engine: Engine) -> None:
    """It has what a mechanism must have, its numbers make sense, and its C is the one that the model clips to."""
    missing = [name for name in _MECHANISM if not hasattr(mechanism, name)]
    if missing:
        raise PrivacyError(
            f"the mechanism, a {type(mechanism).__name__}, lacks {', '.join(missing)}",
            remedy="give it what dpcompile.noise.mechanism.Mechanism names (bands: 1, if its noise is independent from "
            "step to step)",
        )
    refuse_bad_numbers(mechanism.noise_multiplier, mechanism.expected_batch_size)
    if mechanism.max_grad_norm != engine.max_grad_norm:
        raise PrivacyError(
            f"the mechanism adds noise for sums clipped to {mechanism.max_grad_norm}, the model clips to "
            f"{engine.max_grad_norm}",
            remedy="give both the same max_grad_norm",
        )


def refuse_closure_only(optimizer: Optimizer) -> None:
    """An optimizer whose step cannot do without a closure (LBFGS) uses many gradients per step."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PrivacyError(
            f"{type(optimizer).__name__} evaluates the loss several times within a step",
            remedy="take an optimizer that uses one gradient per step, such as SGD or Adam",
        )


def refuse_bad_accountant(noise_multiplier: float, accountant: Accountant | None) -> None:
    """It is an accountant, and counts the noise that is added."""
    if accountant is not None:
        check_accountant(accountant)
    refuse_other_accountant(noise_multiplier, accountant)


def refuse_other_accountant(noise_multiplier: float, accountant: Accountant | None) -> None:
    """The accountant must count the noise that is added."""
    if accountant is not None and accountant.noise_multiplier != noise_multiplier:
        raise PrivacyError(
            f"the optimizer adds noise of multiplier {noise_multiplier}, its accountant counts "
            f"{accountant.noise_multiplier}",
            remedy="give both the same noise_multiplier; to change it on the way, take "
            "dpcompile.schedules.NoiseSchedule, which tells the accountant",
        )


def refuse_other_rate(accountant: Accountant | None, feed: Any) -> None:
    """The accountant must count draws at the rate of the loader that feeds the model, for a relation that allows it."""
    if accountant is None:
        return
    by_step = getattr(feed, "schedule", None) is not None  # then each step is counted by its event
    if not by_step and not math.isclose(accountant.sample_rate, feed.sample_rate, rel_tol=1e-9):
        raise PrivacyError(
            f"the loader samples at rate {feed.sample_rate}, the accountant assumes {accountant.sample_rate}",
            remedy="make the PrivacyAccountant with sample_rate=loader.sample_rate",
        )
    _refuse_other_truncation(getattr(accountant, "truncation", None), getattr(feed, "truncation", None))
    refuse_rate_from_size(accountant.relation, feed)


def _refuse_other_truncation(counted: Any, drawn: Any) -> None:
    """The accountant must count draws of the loader's cap, from as many examples, or whole ones."""
    if counted != drawn:
        raise PrivacyError(
            f"the loader keeps {_kept(drawn)}, the accountant assumes {_kept(counted)}",
            remedy="make the PrivacyAccountant with truncation=loader.truncation",
        )


def _kept(truncation: Any) -> str:
    return "all of a draw" if truncation is None else f"at most {truncation[1]} of a draw from {truncation[0]} examples"


def refuse_rate_from_size(relation: Relation, feed: Any) -> None:
    """Where the dataset's size is protected, the sample rate may not come from it."""
    if relation == "add_remove" and feed.from_size:
        raise PrivacyError(
            "the loader's sample rate comes from the size of the dataset, which relation='add_remove' protects: with "
            "one example more, all the others would be drawn less often",
            remedy="give PoissonLoader both sample_rate= and expected_batch_size=, numbers that were fixed without "
            "looking at the data (and steps=, if not one pass is 1 / sample_rate of them); or take "
            "relation='zero_out', which has the same epsilon and takes the size as public",
        )


def refuse_forgetful(accountant: Accountant | None, before: Counter[Any]) -> None:
    """What was counted stays so, each step and each other release as what it was."""
    if accountant is None:
        return
    now = counted(accountant)
    for what, count in before.items():
        if now[what] < count:
            kind = f"releases {what}"
            if isinstance(what, tuple):
                kind = f"steps of noise multiplier {what[0]} and sample rate {what[1]}"
            raise PrivacyError(
                f"the accountant counts {now[what]} {kind}, and counted {count} after the last step: epsilon would "
                "leave some out",
                remedy="load accountant states through load_state_dict of a new DPOptimizer only",
            )


def refuse_replaced(old: Accountant | None, new: Accountant | None, steps: int) -> None:
    """An accountant that takes another's place goes on where that one is."""
    if new is None and old is not None:
        raise PrivacyError(
            "the accountant was taken away: steps would not be counted",
            remedy="leave it; to train without one, make the DPOptimizer without",
        )
    if new is None:
        return
    check_accountant(new)
    known = steps if old is None else old.steps
    rates = new.sample_rate if old is None else old.sample_rate
    if old is not None and new.relation != old.relation:
        raise PrivacyError(
            f"another accountant, for relation {new.relation!r}, in place of one for {old.relation!r}: its epsilon is "
            "another promise",
            remedy=f"make it with relation={old.relation!r}",
        )
    caps = [getattr(a, "truncation", None) for a in (new, old)]
    if old is not None and caps[0] != caps[1]:
        raise PrivacyError(
            f"another accountant, that counts {_kept(caps[0])}, in place of one for {_kept(caps[1])}",
            remedy=f"make it with truncation={caps[1]}",
        )
    if new.sample_rate != rates or new.steps < known:
        raise PrivacyError(
            f"another accountant, of sample rate {new.sample_rate} and {new.steps} steps, in place of one of sample "
            f"rate {rates} and {known} steps",
            remedy="make it with the same sample_rate and load the old one's state_dict into it",
        )
    refuse_forgetful(new, Counter({k: n for k, n in counted(old).items() if not isinstance(k, tuple)}))


def refuse_foreign(engine: Engine, optimizer: Optimizer) -> None:
    """Every optimized parameter is one of the model's, and in one group: see :func:`refuse_foreign_parameters`."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    refuse_foreign_parameters(engine, held)
    if len({id(p) for p in held}) < len(held):
        names = {id(p): name for name, p in engine.parameters().items()}
        twice = next(p for i, p in enumerate(held) if any(p is q for q in held[:i]))
        raise PrivacyError(
            f"parameter '{names[id(twice)]}' is in two groups of the optimizer: it would be updated twice in a step",
            remedy="leave it in one group",
        )


def refuse_foreign_parameters(engine: Engine, params: Iterable[Tensor]) -> None:
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
            remedy="add them to the optimizer (add_param_group); give several optimizers for parts of the model as one "
            "list, DPOptimizer([first, second], model, ...); or freeze them with requires_grad_(False)",
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


def refuse_state(
    own: Mapping[str, Any] | None, current: Mapping[str, Any], accountant: Accountant | None = None
) -> None:
    """A state to resume from has our entry, goes on where noise has not been used, and means the same mechanism.

    What ``accountant`` refuses of it is refused before anything is loaded.
    """
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
                remedy=f"make the DPOptimizer with {name}={own[name]}"
                + ("; with a NoiseSchedule, load the schedule's state first" if name == "noise_multiplier" else ""),
            )
    refuse_other_matrix(own, current)
    refuse_other_grid(own, current)
    refuse_other_shares(own, current)
    if current["accountant"] is not None and current["logical_step"] and own["seed"] != current["seed"]:
        raise PrivacyError(
            f"this optimizer has taken {current['logical_step']} steps, and the state is of another run: the "
            "accountant would forget them",
            remedy="load it into a new DPOptimizer with a new accountant, and the weights of that run into the model",
        )
    if current["accountant"] is not None and own["accountant"] is None and own["logical_step"]:
        raise PrivacyError(
            f"the saved run took {own['logical_step']} steps without an accountant: epsilon would leave them out",
            remedy="load it into a DPOptimizer without accountant, or give the saving run an accountant",
        )
    if accountant is not None and own["accountant"] is not None:
        trial = copy.deepcopy(accountant)
        trial.load_state_dict(own["accountant"])
        if trial.steps < rounds(own["logical_step"], own.get("bands", 1)):
            raise PrivacyError(
                f"the accountant, a {type(accountant).__name__}, counts {trial.steps} steps after loading the state of "
                f"{own['logical_step']}: epsilon would leave steps out",
                remedy="let load_state_dict take up what state_dict returned",
            )


_DRAWN: dict[tuple[str, bool], tuple[weakref.ref[Any], int]] = {}  # stream of noise -> who drew last, and which step
_WARNED: set[tuple[str, bool]] = set()


def refuse_used_noise(owner: Any, stream: str, *, secure: bool, step: int, correlated: bool = False) -> None:
    """Warn once per stream if another optimizer of this process drew the same noise; refuse it if it is correlated.

    Args:
        owner: the optimizer that is about to draw.
        stream: a digest of its seed.
        secure: of which generator.
        step: the logical step that is drawn for.
        correlated: the noise is correlated over steps.

    Raises:
        PrivacyError: it is, and the other optimizer is still there.
    """
    key = stream, secure
    known = _DRAWN.get(key)
    if correlated and known is not None and known[0]() not in (None, owner) and step <= known[1]:
        raise PrivacyError(
            f"two DPOptimizers of one seed, and noise that is correlated over steps: row {step} would be drawn again",
            remedy="leave the seed out, or give each run its own; to repeat an experiment, delete the other optimizer",
        )
    if known is not None and known[0]() is not owner and step <= known[1] and key not in _WARNED:
        _WARNED.add(key)
        warnings.warn(
            f"two DPOptimizers of one seed: the noise of logical step {step} is drawn a second time, and the "
            "difference of the two models has none. Right to repeat an experiment; to publish both, leave seed out",
            PrivacyWarning,
            stacklevel=4,
        )
    _DRAWN[key] = weakref.ref(owner), max(step, -1 if known is None else known[1])


def _optimized(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
