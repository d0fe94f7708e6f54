"""Seed, logical step and accountant among the parameter groups, for torch's own functions on optimizer states.

``torch.distributed.checkpoint.state_dict`` keeps "state" and "param_groups" of what an optimizer saves, flattens them
by parameter name where asked, and reads from the live groups which entries to take up again. So every group, live and
saved, has one entry more; in what is saved it is text, which survives any of these ways.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from dpcompile.errors import PrivacyError

__all__ = ["KEY", "asks_for_state", "carried", "mark_groups", "with_carried"]

KEY = "dpcompile"
_LIVE = "in state_dict()"  # a constant: compiled steps read the groups


def mark_groups(groups: Iterable[dict[str, Any]]) -> None:
    """Give live groups the entry, so that torch takes the saved one up."""
    for group in groups:
        group[KEY] = _LIVE


def with_carried(state_dict: Mapping[str, Any], private: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with ``private``: under a key of its own, and in every group as text."""
    text = json.dumps(private)
    groups = [{**group, KEY: text} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups, KEY: dict(private)}


def carried(state_dict: Any) -> tuple[Any, dict[str, Any]]:
    """What :func:`with_carried` added, None if nothing did, and the rest.

    Raises:
        PrivacyError: no state dict of an optimizer, or groups that come from different runs.
    """
    entries = dict(state_dict) if isinstance(state_dict, Mapping) else {}
    own = entries.pop(KEY, None)
    groups = entries.get("param_groups")
    if not isinstance(groups, (list, tuple)) or not isinstance(entries.get("state"), Mapping):
        raise PrivacyError(
            "what is to be loaded lacks 'state' or 'param_groups'", remedy="load what DPOptimizer.state_dict() returned"
        )
    if not all(isinstance(group, Mapping) for group in groups):
        raise PrivacyError("a parameter group to be loaded is no dict", remedy="load what was saved, unchanged")
    texts = {str(group[KEY]) for group in groups if group.get(KEY, _LIVE) != _LIVE}
    if own is None and len(texts) > 1:
        raise PrivacyError(
            "the parameter groups come from different runs or steps: which noise has been used is unknown",
            remedy="load all groups of one saved optimizer",
        )
    if own is None and texts:
        try:
            own = json.loads(texts.pop())
        except ValueError:
            own = None
    rest = {**entries, "param_groups": [{k: v for k, v in group.items() if k != KEY} for group in groups]}
    return own, rest


def asks_for_state(optimizer: Optimizer) -> bool:
    """Whether a step on this inner optimizer is only to make its state, as torch's functions on states do it.

    They step on zero gradients with rate 0, where there is no state yet. Nothing is released by such a step: it changes
    no parameter, and what it leaves as state is that of zero gradients.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    if optimizer.state or not rates or any(float(rate) for rate in rates):
        return False
    return bool(gradients) and all(g is not None and not _local(g).any() for g in gradients)


def _local(gradient: Any) -> Any:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient
