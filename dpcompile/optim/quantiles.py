"""What bounds that follow quantiles ask of the model: votes, and clip groups that stay those of the mechanism."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpcompile.clipping.groups import Bounds, clip_groups
from dpcompile.distributed.ranks import summed, world_size
from dpcompile.distributed.shards import computing_device
from dpcompile.errors import PrivacyError
from dpcompile.module import Engine
from dpcompile.noise.adaptive import AdaptiveClip, AdaptiveGaussianMechanism
from dpcompile.noise.mechanism import Mechanism

__all__ = ["adaptive_mechanism", "for_groups_of", "refuse_other_groups", "refuse_other_shares", "votes_of_all"]


def adaptive_mechanism(
    engine: Engine, numbers: tuple[float, float, float, int, bool], clip: AdaptiveClip
) -> AdaptiveGaussianMechanism:
    """One that moves a C for each clip group of the model; all begin with the same.

    Args:
        engine: of the model.
        numbers: the first of the mechanism's attributes.
        clip: how C moves.
    """
    return AdaptiveGaussianMechanism(*numbers, clip, shares=Bounds.equal(1.0, _groups(engine)).shares)


def for_groups_of(engine: Engine, mechanism: Mechanism) -> Mechanism:
    """The mechanism; if it moves bounds of clip groups, one for those of this model, from the beginning."""
    if not isinstance(mechanism, AdaptiveGaussianMechanism):
        return mechanism
    return replace(mechanism, first=0.0, shares=Bounds.equal(1.0, _groups(engine)).shares)


def votes_of_all(engine: Engine, votes: Tensor | None, groups: int) -> list[float]:
    """The votes of a step for each clip group, of all ranks' examples; every rank must call this.

    Args:
        engine: of the model.
        votes: int64 ``[groups]``, of this rank's examples; None: there were none.
        groups: how many there are.
    """
    if votes is None:
        device = computing_device(next(iter(engine.parameters().values())))
        votes = torch.zeros(groups, dtype=torch.int64, device=device)
    copies = 1
    if engine.distributed:
        votes, copies = summed(votes), world_size() // engine.data_ranks
    return [n / copies for n in votes.tolist()]


def refuse_other_groups(mechanism: Mechanism, engine: Engine) -> None:
    """Bounds that follow quantiles belong to the clip groups of what is trainable.

    Raises:
        PrivacyError: a group of the model has no bound, or a bound no group.
    """
    if not isinstance(mechanism, AdaptiveGaussianMechanism):
        return
    here, known = _groups(engine), tuple(mechanism.shares)
    if set(here) == set(known):
        return
    remedy = "make the DPOptimizer with adaptive_clip=AdaptiveClip(...), when everything that is to be trained, and "
    remedy += "nothing else, has requires_grad=True; a new one after freezing or unfreezing whole layers or blocks"
    raise PrivacyError(
        f"the mechanism moves the bounds of {_told(known)}, and the model has trainable parameters in {_told(here)}",
        remedy=remedy,
    )


def refuse_other_shares(own: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """A state to resume from has bounds of the same clip groups, or C was a number in the saved run.

    Raises:
        PrivacyError: it has others, or what it holds are none.
    """
    if "max_grad_norm" not in own or "max_grad_norm" not in current or current.get("bands", 1) > 1:
        return
    saved, here = own.get("clip_shares", {"": 1.0}), current.get("clip_shares", {"": 1.0})
    if not (isinstance(saved, Mapping) and all(isinstance(s, float) for s in saved.values())):
        raise PrivacyError(
            f"'clip_shares' of the DPOptimizer's state is {saved!r}, not a bound for each clip group",
            remedy="load what DPOptimizer.state_dict() returned, unchanged",
        )
    if set(saved) != set(here):
        raise PrivacyError(
            f"bounds followed quantiles of {_told(tuple(saved))} in the saved run, and do of {_told(tuple(here))} here",
            remedy="compile the model with the clipping of the saved run, and make the same layers trainable",
        )
    Bounds(1.0, saved)  # raises


def _groups(engine: Engine) -> tuple[str, ...]:
    return tuple(clip_groups(engine.trainable(), engine.options.clipping)) or ("",)


def _told(groups: tuple[str, ...]) -> str:
    if set(groups) == {""}:
        return "one clip group of all"
    few = ", ".join(map(repr, groups[:5]))
    return f"{len(groups)} clip groups ({few}{', …' if len(groups) > 5 else ''})"
