"""Saved states that are whole: every entry there, of its kind, before anything is taken from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from dpcompile.accounting.events import rounds
from dpcompile.accounting.saved import saved_runs
from dpcompile.errors import PrivacyError

__all__ = ["LOADER", "OPTIMIZER", "refuse_malformed"]

_Kind = tuple[str, Callable[[Any], bool]]


def _whole(x: Any, below: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < below


def _is_accountant(x: Any) -> bool:
    if x is None:
        return True
    saved_runs(x)  # says itself what is wrong
    return True


def _are_draws(x: Any) -> bool:
    if x is None:
        return True
    return isinstance(x, Mapping) and isinstance(x.get("stream"), str) and _whole(x.get("next"), 2**32 + 1)


def _positive(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < math.inf


def _are_sizes(x: Any) -> bool:
    """One for all steps, or what tells those of many (:class:`dpcompile.accounting.by_step.RateSchedule`)."""
    if not isinstance(x, Mapping):
        return _positive(x)
    return _positive(x.get("first")) and _whole(x.get("steps"), 2**32) and isinstance(x.get("digest"), str)


_SEED: _Kind = ("an integer, 0 or more and below 2**256", lambda x: _whole(x, 2**256))
_STEP: _Kind = ("an integer, 0 or more and below 2**32", lambda x: _whole(x, 2**32))
_COUNT: _Kind = ("an integer, 0 or more", lambda x: _whole(x, 2**63))
_FLAG: _Kind = ("True or False", lambda x: isinstance(x, bool))
_SIZE: _Kind = ("a finite number above 0", _positive)
_SIZES: _Kind = ("a finite number above 0, or of batch sizes by the step their digest", _are_sizes)
_NOISE: _Kind = ("a finite number, 0 or more", lambda x: _positive(x) or (not isinstance(x, bool) and x == 0))

OPTIMIZER: Mapping[str, _Kind] = {
    "seed": _SEED,
    "logical_step": _STEP,
    "noise_multiplier": _NOISE,
    "expected_batch_size": _SIZE,
    "secure": _FLAG,
    "accountant": ("an accountant's state or None", _is_accountant),
    "draws": ("how far a loader's draws were used, or None", _are_draws),
}
LOADER: Mapping[str, _Kind] = {
    "seed": _SEED,
    "secure": _FLAG,
    "step": _STEP,
    "position": _COUNT,
    "dataset_size": _COUNT,
    "expected_batch_size": _SIZES,
}


def refuse_malformed(state: Any, kinds: Mapping[str, _Kind], whose: str) -> None:
    """Raise PrivacyError unless every entry that ``kinds`` names is there and of its kind.

    Args:
        state: what is to be loaded.
        kinds: the entries, with what they must be; others are passed over.
        whose: "DPOptimizer" or "PoissonLoader", for the message.

    **Guarantee.** What passes holds a seed, a step that the generators can count to, and an accountant's history that
    is a list of possible runs with at least as many steps as the optimizer took.
    """
    remedy = f"load what {whose}.state_dict() returned, unchanged"
    if not isinstance(state, Mapping):
        raise PrivacyError(f"the {whose}'s state is a {type(state).__name__}, not a dict", remedy=remedy)
    missing = [name for name in kinds if name not in state]
    if missing:
        raise PrivacyError(f"the {whose}'s state lacks {', '.join(map(repr, missing))}", remedy=remedy)
    for name, (kind, holds) in kinds.items():
        if not holds(state[name]):
            value = "something else" if name == "seed" else repr(state[name])  # a seed is a secret
            raise PrivacyError(f"{name!r} of the {whose}'s state is {value}, not {kind}", remedy=remedy)
    value = state.get("max_grad_norm")
    if value is not None and not _positive(value):
        raise PrivacyError(f"'max_grad_norm' of the {whose}'s state is {value!r}, not a bound", remedy=remedy)
    if not _whole(state.get("bands", 1), 2**63) or state.get("bands", 1) < 1:
        raise PrivacyError(f"'bands' of the {whose}'s state is {state['bands']!r}, no integer above 0", remedy=remedy)
    if not state["secure"] and state["seed"] >= 2**64:
        raise PrivacyError(f"the {whose}'s state holds a seed for the other generator", remedy=remedy)
    if state.get("accountant") is not None:
        counted = sum(run[2] for run in state["accountant"]["history"])
        if counted < rounds(state["logical_step"], state.get("bands", 1)):
            raise PrivacyError(
                f"the {whose}'s state stands at logical step {state['logical_step']}, and its accountant counted "
                f"{counted}: epsilon would leave steps out",
                remedy=remedy,
            )
    if state.get("position", 0) > state.get("step", 0):
        raise PrivacyError(
            f"the {whose}'s state stands at step {state['step']}, and {state['position']} steps into a pass",
            remedy=remedy,
        )
