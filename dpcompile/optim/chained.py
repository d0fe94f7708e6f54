"""Several optimizers for parts of one model, as one: ``Muon`` for its matrices, say, and ``AdamW`` for the rest."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpcompile.errors import PrivacyError

__all__ = ["Chained", "as_one", "parts_of"]


def as_one(optimizer: Optimizer | Sequence[Optimizer]) -> Optimizer:
    """The optimizer, or several in a list as one."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    parts = list(optimizer) if isinstance(optimizer, (list, tuple)) else []
    if not parts or not all(isinstance(part, Optimizer) for part in parts):
        raise PrivacyError(
            f"the optimizer is a {type(optimizer).__name__}",
            remedy="give a torch.optim.Optimizer, or a list of them for parts of the model",
        )
    return parts[0] if len(parts) == 1 else Chained(parts)


def parts_of(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """The optimizer and, of several as one, each of them."""
    return (optimizer, *optimizer.parts) if isinstance(optimizer, Chained) else (optimizer,)


class Chained(Optimizer):
    """Steps optimizers one after the other.

    Groups are all of theirs, live; the state dict is that of one optimizer that has these groups. Options of a group
    that only one of them knows stay where they are, so a scheduler that sets momentum needs all to have one.

    Args:
        parts: over different parameters.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = tuple(parts)
        # Not __init__, which would build groups and state of its own: this sets up the step hooks and no more.
        super().__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parts' groups, live; the list itself is a copy."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """The parts' states, live; the dict itself is a copy."""
        return {p: value for part in self.parts for p, value in part.state.items()}

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """What all parts agree on."""
        first, *others = (part.defaults for part in self.parts)
        return {k: v for k, v in first.items() if all(k in o and o[k] == v for o in others)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every part."""
        assert closure is None, "DPOptimizer has run it"
        for part in self.parts:
            if torch.compiler.is_compiling():  # torch wraps a step in a profiler and in a deliberate graph break
                inspect.unwrap(type(part).step)(part)
            else:
                part.step()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: nothing says which of the parts it is for."""
        raise PrivacyError(
            "a group added to several optimizers at once",
            remedy="add it to the one that it is for: optimizer.optimizer.parts[i].add_param_group(...)",
        )

    def state_dict(self) -> dict[str, Any]:
        """As of one optimizer with the groups of all parts, in order."""
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        offset = 0
        for part in self.parts:
            own = part.state_dict()
            state |= {k + offset if isinstance(k, int) else k: v for k, v in own["state"].items()}
            groups += [{**g, "params": [i + offset for i in g["params"]]} for g in own["param_groups"]]
            offset += sum(len(g["params"]) for g in own["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hand every part its own.

        Raises:
            ValueError: other groups, as torch's optimizers do.
        """
        state, groups = state_dict["state"], list(state_dict["param_groups"])
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("the state dict has other parameter groups than the optimizers together")
        offset = 0
        for part in self.parts:
            own, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            count = sum(len(g["params"]) for g in own)
            positions = {position: offset + i for i, position in enumerate(_positions(part))}
            mine = {p: state[k] for p, k in positions.items() if k in state}
            renumbered = [
                {**g, "params": h["params"]} for g, h in zip(own, part.state_dict()["param_groups"], strict=True)
            ]
            part.load_state_dict({"state": mine, "param_groups": renumbered})
            offset += count


def _positions(part: Optimizer) -> list[int]:
    """The numbers that the state dict of an optimizer has for its parameters, in order."""
    return [i for group in part.state_dict()["param_groups"] for i in group["params"]]
