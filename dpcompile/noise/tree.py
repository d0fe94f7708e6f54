"""Noise in a binary tree over the steps of one pass: for data that are taken in turn, each example once in a pass.

Sources: Kairouz et al. 2021, "Practical and Private (Deep) Learning without Sampling or Shuffling" (ICML; DP-FTRL),
algorithms 1 and 2 and section 4.1 (restarts); Dwork, Naor, Pitassi, Rothblum 2010, "Differential Privacy Under
Continual Observation" (STOC), for the tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpcompile.errors import PrivacyError
from dpcompile.noise.correlation import CorrelatedMechanism
from dpcompile.noise.counter import STEPS, Stream, check_range
from dpcompile.noise.mechanism import Release, add_noise_

__all__ = ["TreeMechanism", "nodes"]


class TreeMechanism(CorrelatedMechanism):
    """What is released of the first t steps of a pass, added up, is their sum with the noise of few nodes, log2(t) + 1.

    The steps of a pass are the leaves of a binary tree. Each node that is complete has noise of its own; the first t
    leaves are those of the nodes that are the ones of t's binary digits, so their sum has these nodes' noise. A step
    gets what its node adds, less what the smaller nodes that it takes in had: twice the noise of one node on average,
    which is drawn again from its number. Each pass has a tree of its own (restarts).

    Args:
        noise_multiplier: sigma, of one pass as a whole: each node has noise of ``sigma * sqrt(height) * C``, as an
            example is in ``height`` nodes. 0: no noise.
        max_grad_norm: C, the model's, which clips to it.
        expected_batch_size: the constant that divides the sums.
        seed: of the noise, a secret.
        secure: whether the noise is cryptographic.
        steps: of a pass, T: examples come again after T steps, not before. `PoissonLoader` with ``bands=T`` sees to
            that; with ``sample_rate=1`` each comes once in a pass.

    Attributes:
        height: in how many nodes an example is, at most: ``floor(log2(T)) + 1``.

    Raises:
        PrivacyError: steps that are no number of steps.

    **Guarantee.** With such a loader, and row t of the noise going with draw t, what is released up to step t - 1 costs
    ``rounds(t, T)`` times :meth:`event`, for "zero_out" and "add_remove".

    For: what is released tells, and is told by, the sums of all complete nodes, each with its noise. An example of part
    j may add to step j of each pass; what it adds there, g, computed from what was released before, enters the nodes
    over leaf j, at most ``height`` of them, together of norm ``sqrt(height) |g|``, and nothing that was released
    before. So each pass is, begun or whole, a Gaussian mechanism of noise multiplier sigma on a Poisson sample of the
    loader's rate, given the passes before; passes share no node. It is a statement about real numbers, as
    :func:`dpcompile.noise.mechanism.privatize_`'s.

    ==================================================  ==================================================
    edge case                                           outcome
    ==================================================  ==================================================
    a pass of one step                                  the Gaussian mechanism of sigma
    a step left out                                     its row is never released: costs no more
    a run that stops within a pass                      the pass counts whole
    sigma, C or the steps of a pass changed             refused: no bound is known
    another divisor                                     right: what is divided has its noise already
    ==================================================  ==================================================
    """

    def __init__(
        self,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        seed: int,
        secure: bool = False,
        *,
        steps: int,
    ) -> None:
        super().__init__(noise_multiplier, max_grad_norm, expected_batch_size, seed, secure)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < STEPS // 2:
            raise PrivacyError(f"steps of a pass is {steps!r}", remedy="give an integer, 1 or more")
        self.steps = steps

    @property
    def bands(self) -> int:
        """T: noise of steps that lie so far apart is added to no common example."""
        return self.steps

    @property
    def height(self) -> int:
        """See the class."""
        return self.steps.bit_length()

    @property
    def std(self) -> float:
        """Standard deviation of the noise of one node."""
        return self.noise_multiplier * self.max_grad_norm * self.height**0.5

    def release(self, release: Release) -> None:
        """See :class:`dpcompile.noise.mechanism.Mechanism`."""
        self.begin()
        if self.std > 0:
            for number, sign in nodes(release.step, self.steps):
                std = sign * self.std
                add_noise_(release, std=std, seed=self.seed, number=number, secure=self.secure, stream=Stream.TREE)
        for total in release.totals:
            total.div_(self.expected_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """See :class:`dpcompile.noise.mechanism.Mechanism`; no noise is in it."""
        return {**self.numbers(), "in_turn": "tree"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`dpcompile.noise.mechanism.Mechanism`: noise is a function of the seed and the step."""
        self.seed = state["seed"]
        self.go_on(state)

    @property
    def matrix(self) -> Any:
        """See :class:`dpcompile.noise.correlation.CorrelatedMechanism`."""
        return self.steps


def nodes(step: int, steps: int) -> Iterator[tuple[int, int]]:
    """The nodes whose noise a step brings in (1) and takes back (-1), each by its number.

    Args:
        step: from 0 on, over all passes.
        steps: of a pass.

    Raises:
        PrivacyError: a step so late that numbers of nodes would come again.

    **Guarantee.** Added up over the first t steps of a pass what is left is one node for each digit 1 of t, over its
    first t leaves. Numbers of nodes are in the order in which a walk from left to right meets them, pass after pass, so
    no two nodes have the same.
    """
    tree, leaf = divmod(step, steps)
    last, first = leaf + 1, tree * 2 * steps
    check_range("number of the node", first + 2 * steps, STEPS)
    level = (last & -last).bit_length() - 1
    yield first + 2 * last - (1 << level), 1
    for below in range(level):
        end = leaf >> below << below
        yield first + 2 * end - (1 << below), -1
