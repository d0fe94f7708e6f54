"""Users: whose each example is, and which of a user's examples are in a step in which the user was drawn.

Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models" (arXiv:1710.06963), algorithm 1
(users are sampled, each with a bound on what they hold); Charles et al. 2024 (arXiv:2407.07737), for a fixed number of
examples from each user in a step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpcompile.data.padding import Request
from dpcompile.data.sampling import PoissonBatches
from dpcompile.errors import PrivacyError
from dpcompile.noise.counter import Stream
from dpcompile.noise.normal import uniform

__all__ = ["UserBatches", "Users"]


class Users:
    """Which examples belong to which user, and k of them for each step.

    Args:
        groups: for every example of the dataset, in order, whose it is: a tensor or an array of integers, or a list of
            anything that can be told apart (numbers, names).
        size: of the dataset.
        examples_per_user: k: rows that a user has in a batch.

    Attributes:
        count: how many users there are. Users are numbered in the order in which they first occur.
        examples_per_user: k.
        digest: of whose every example is.

    Raises:
        PrivacyError: not one user for each example, an example without a user, or a k that is no number of rows.

    **Guarantee.** Every example is its user's alone: a batch made by :meth:`request` has for each user that it asks for
    k rows, one after the other, of examples of that user, each of them once with mask True. A dataset's
    ``__getitems__`` is asked for one user's at a time, so that nothing rests on the order in which it answers.

    ==========================================  ==================================================================
    edge case                                   outcome
    ==========================================  ==================================================================
    a user of more than k examples              in each step k of them, at random, without replacement
    a user of fewer                             all of them; the other rows repeat them, with mask False
    users that differ in size                   each is drawn with the same chance, and clipped to the same C
    None, NaN, NaT or NA for a user             refused: nobody's example would be everybody's
    1 and 1.0, or True                          the same user, as Python has it
    1 and "1"                                   refused: it may be one user, twice
    ==========================================  ==================================================================
    """

    def __init__(self, groups: Any, size: int, examples_per_user: int) -> None:
        if isinstance(examples_per_user, bool) or not isinstance(examples_per_user, int) or examples_per_user < 1:
            raise PrivacyError(
                f"examples_per_user is {examples_per_user!r}",
                remedy="give an integer, 1 or more: so many rows of a batch are each user's",
            )
        of_example = _numbered(groups, size)
        self.examples_per_user = examples_per_user
        self.count = int(of_example.max()) + 1
        self._examples = torch.argsort(of_example, stable=True)  # user by user
        self._sizes = torch.bincount(of_example, minlength=self.count)
        self._starts = self._sizes.cumsum(0) - self._sizes
        self.digest = int.from_bytes(hashlib.sha256(of_example.numpy().tobytes()).digest()[:7], "big")

    @property
    def of_examples(self) -> Tensor:
        """The number of the user of each example, ``[size]``."""
        found = torch.empty_like(self._examples)
        found[self._examples] = torch.repeat_interleave(torch.arange(self.count), self._sizes)
        return found

    def request(self, users: Request, seed: int, *, secure: bool = False) -> Request:
        """The batch of examples for a batch of users.

        Args:
            users: its indices are users, its size is theirs.
            seed: of the draws.
            secure: ChaCha20 instead of Philox.
        """
        indices: list[int] = []
        counted: list[bool] = []
        k = self.examples_per_user
        for user in users.indices:
            chosen = self._chosen(user, users.step, seed, secure)
            indices += [chosen[i % len(chosen)] for i in range(k)]
            counted += [i < len(chosen) for i in range(k)]
        return users._replace(indices=indices, size=users.size * k, counted=counted, each=k)

    def _chosen(self, user: int, step: int, seed: int, secure: bool) -> list[int]:
        start, size = int(self._starts[user]), int(self._sizes[user])
        own = self._examples[start : start + size]
        if size > self.examples_per_user:
            u = uniform(seed, step=step, stream=Stream.USERS, numel=size, start=start, secure=secure)
            own = own[torch.argsort(u, stable=True)[: self.examples_per_user]]
        return own.tolist()


class UserBatches:
    """The batch sampler behind a DataLoader: requests of examples, for draws of users."""

    def __init__(self, draws: PoissonBatches, users: Users) -> None:
        self._draws, self._users = draws, users

    def __iter__(self) -> Iterator[Request]:
        return self._requests(iter(self._draws), self._draws.seed)  # bound now, as the draws bind theirs

    def _requests(self, draws: Iterator[Request], seed: int) -> Iterator[Request]:
        for users in draws:
            yield self._users.request(users, seed, secure=self._draws.secure)


def _numbered(groups: Any, size: int) -> Tensor:
    """The number of every example's user, int64 ``[size]``; users are numbered as they first occur."""
    if isinstance(groups, Tensor):
        groups = groups.detach().cpu().numpy()
    if isinstance(groups, (str, bytes)) or not isinstance(groups, Iterable):
        raise _no_groups(f"groups is {type(groups).__name__}")
    if isinstance(groups, np.ndarray) and groups.ndim != 1:
        raise _no_groups(f"groups is an array {list(groups.shape)}")
    values = groups.tolist() if isinstance(groups, np.ndarray) else list(groups)
    if len(values) != size:
        raise _no_groups(f"groups names the users of {len(values)} examples, and the dataset has {size}")
    numbers: dict[Any, int] = {}
    found = []
    for i, value in enumerate(values):
        value = value.item() if isinstance(value, (Tensor, np.generic)) else value
        if _is_nobody(value):
            raise PrivacyError(
                f"example {i} has no user: groups[{i}] is {value!r}",
                remedy="leave such examples out of the dataset, or give each a user of its own",
            )
        try:
            found.append(numbers.setdefault(value, len(numbers)))
        except TypeError:
            raise _no_groups(f"groups[{i}] is a {type(value).__name__}, which cannot be told from others") from None
    names = {value for value in numbers if isinstance(value, str)}
    for value in numbers:
        if not isinstance(value, str) and str(value) in names:
            raise PrivacyError(
                f"groups holds {value!r} and {str(value)!r}: if that is one user, it would count as two",
                remedy="give numbers or names, not both",
            )
    return torch.tensor(found)


def _is_nobody(value: Any) -> bool:
    """None, and what is not equal to itself: NaN, NaT, and NA, which does not say."""
    try:
        return value is None or bool(value != value)
    except TypeError:
        return True  # NA of pandas
    except ValueError:
        return False  # an array


def _no_groups(what: str) -> PrivacyError:
    return PrivacyError(
        what, remedy="give for every example of the dataset, in its order, whose it is: a number or a name"
    )
