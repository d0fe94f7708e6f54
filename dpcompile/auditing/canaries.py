"""Canaries: examples that are in the run or out of it by a coin, and how they come into an ordinary compiled step.

Sources: Nasr et al. 2023 (arXiv:2302.07956) for gradients of one coordinate ("Dirac"); Steinke et al. 2023
(arXiv:2305.08846) for many canaries in one run, in gradients and among the data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from dpcompile.errors import PrivacyError

__all__ = ["OWN", "AuditedData", "AuditedModel", "Collation", "coins", "sign", "spread_places"]

OWN = "canaries"  # the parameter that belongs to canaries alone


class AuditedModel(nn.Module):
    """A model with, beside its outputs, a loss for every row whose gradient is chosen.

    That loss is a sum of single elements of parameters, so its gradient is ``norm`` at these places and 0 elsewhere,
    whatever the weights are. It is part of the same graph as the model: what is proved, planned, clipped, summed,
    noised and stepped on is what it always is.

    Args:
        model: of the user.
        targets: names of parameters of this module; each row has one place, or none, in each of them.
        norm: of every entry of the gradient, before clipping.
        own: how many elements the parameter ``canaries`` has; 0: there is none.
    """

    sign: Tensor

    def __init__(self, model: nn.Module, targets: list[str], norm: float, own: int = 0) -> None:
        super().__init__()
        self.model, self.targets, self.norm = model, targets, norm
        if own:
            like = next(iter(model.parameters()))
            self.canaries = nn.Parameter(torch.zeros(own, device=like.device))
        device = next(iter(self.parameters())).device
        self.register_buffer("sign", torch.ones((), device=device))

    def forward(self, places: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """The model's outputs for the rest of the arguments, and ``[B]``, for ``places`` ``[B, targets]``; -1: none."""
        found = self.model(*args, **kwargs)
        taken = [
            self.get_parameter(name).reshape(-1)[places[:, i].clamp_min(0)] * (places[:, i] >= 0)
            for i, name in enumerate(self.targets)
        ]
        return found, torch.stack([t.float() for t in taken]).sum(0) * (self.sign * self.norm)


class AuditedData:
    """Rows of a dataset, each with its canary's places and the weights of its two losses.

    A canary that is out is a row that counts nothing, so every run has as many rows.

    Args:
        dataset: of the user.
        rows: index in the dataset, for each row.
        places: ``[rows, targets]``, see :class:`AuditedModel`.
        weights: ``[rows, 2]``, 0 or 1: of the user's loss, and of the canary's.
        owners: ``[rows]``, whose each row is; None: every row is one's own.
    """

    def __init__(
        self, dataset: Any, rows: list[int], places: Tensor, weights: Tensor, owners: Tensor | None = None
    ) -> None:
        self.dataset, self.rows, self.places, self.weights = dataset, rows, places, weights
        self.owners = torch.arange(len(rows)) if owners is None else owners

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Tensor, Tensor]:
        return self.dataset[self.rows[index]], self.places[index], self.weights[index]


class Collation:
    """The user's collation of the rows, and that of places and weights."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, items: list[Any]) -> tuple[Any, Tensor, Tensor]:
        """The batch of the user, places ``[B, targets]`` and weights ``[B, 2]``."""
        rows, places, weights = zip(*items, strict=True)
        return self.collate_fn(list(rows)), default_collate(list(places)), default_collate(list(weights))


def coins(count: int, generator: torch.Generator) -> Tensor:
    """Which canaries are in: bool ``[count]``, a fair coin each."""
    return torch.rand(count, generator=generator) < 0.5


def sign(step: int) -> float:
    """The sign of all canaries' gradients in a step: of the Thue and Morse sequence.

    Whoever adds up the updates with these signs has the canaries' gradients, and of noise that is the same in two, four
    or eight steps nothing.
    """
    return -1.0 if step.bit_count() % 2 else 1.0


def spread_places(sizes: list[int], count: int, generator: torch.Generator) -> Tensor:
    """For each canary one place in every parameter, no two the same: ``[count, parameters]``.

    Of a parameter with fewer elements than canaries, chosen ones have a place, and the rest -1.

    Raises:
        PrivacyError: more canaries than elements in the largest parameter.
    """
    if count > max(sizes):
        raise PrivacyError(
            f"{count} canaries cannot each have an element of the largest parameter, which has {max(sizes)}",
            remedy="take fewer canaries, or kind='dirac', which gives them a parameter of their own",
        )
    places = torch.full((count, len(sizes)), -1)
    for i, size in enumerate(sizes):
        holders = torch.randperm(count, generator=generator)[:size]
        places[holders, i] = torch.randperm(size, generator=generator)[: len(holders)]
    return places
