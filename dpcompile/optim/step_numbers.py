"""The numbers of the step at hand, where they are functions of the step: sigma, rate, and what divides the sum.

Between steps a mechanism has the numbers that it was made with, which are saved and compared; within a step, those of
the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from dpcompile.accounting.by_step import ByStep
from dpcompile.accounting.planned_steps import PlannedSteps
from dpcompile.batches.feed import Feed
from dpcompile.errors import PrivacyError
from dpcompile.noise.mechanism import GaussianMechanism, Mechanism

__all__ = [
    "numbers_at",
    "numbers_of_step",
    "refuse_moved_size",
    "refuse_other_schedule",
    "refuse_rows",
    "saved_schedule",
]


@contextmanager
def numbers_of_step(
    mechanism: Mechanism,
    feed: Feed | None,
    planned: PlannedSteps,
    logical_step: int,
    used: Mapping[str, Any] | None = None,
) -> Iterator[float | None]:
    """Give the mechanism sigma and expected batch size of the step at hand, and afterwards its own again.

    Args:
        mechanism: that is about to release the step.
        feed: what feeds the model; None: a loop of its own.
        planned: what was calibrated, with the schedule of the noise.
        logical_step: of the optimizer.
        used: how far which loader's draws were used, of earlier steps; None: of none.

    Yields:
        The rate of the draw; None: the one of all draws.

    Raises:
        PrivacyError: a draw beyond those that were calibrated, or before one that was stepped on, numbers that the
            mechanism cannot have, or noise that is correlated over steps. Nothing was released or counted then.

    **Guarantee.** Rate and divisor are those by which the draw was taken that the last backward was of. Where they go
    by the draw, so does sigma, so that the steps of a run are among those that were calibrated, each once; else it goes
    by the logical step.

    ==================================================  =====================================================
    edge case                                           outcome
    ==================================================  =====================================================
    draws that were left out                            cost nothing; the others keep their numbers
    a step without a backward                           noise, counted as one more of the last draw; with a target
                                                        refused where rates go by the draw
    another loader, or a state without the loader's     with a target and rates by the draw refused: draws counted
                                                        from 0 again would be of rates that were planned once
    constants                                           nothing is changed
    the step raises                                     the mechanism has its own numbers again
    ==================================================  =====================================================
    """
    by_draw = feed is not None and feed.schedule is not None
    if not by_draw and planned.noise is None:
        yield None
        return
    refuse_rows(mechanism.bands)
    if by_draw:
        planned.check_draw(_number(feed, logical_step), 0 if used is None else used["next"])
    own = mechanism.noise_multiplier, mechanism.expected_batch_size
    sigma, rate, size = numbers_at(mechanism, feed, planned, logical_step)
    if isinstance(mechanism, GaussianMechanism):
        replace(mechanism, noise_multiplier=sigma, expected_batch_size=size)  # raises where it cannot have them
    mechanism.noise_multiplier, mechanism.expected_batch_size = sigma, size
    try:
        yield rate if by_draw else None
    finally:
        mechanism.noise_multiplier, mechanism.expected_batch_size = own


def numbers_at(
    mechanism: Mechanism, feed: Feed | None, planned: PlannedSteps, logical_step: int
) -> tuple[float, float, float]:
    """Sigma, rate (0: the one of all draws) and expected batch size of the step at hand: :func:`numbers_of_step`."""
    sampled = None if feed is None else feed.sampled
    factor = 1.0 if planned.noise is None else planned.noise(_number(feed, logical_step))
    rate, size = (0.0, mechanism.expected_batch_size) if sampled is None else sampled
    return mechanism.noise_multiplier * factor, rate, size


def _number(feed: Feed | None, logical_step: int) -> int:
    """What the numbers go by."""
    return (feed.draw or 0) if feed is not None and feed.schedule is not None else logical_step


def refuse_rows(bands: int) -> None:
    """Rows of noise that belong together have one sigma and are of draws of one rate."""
    if bands > 1:
        raise PrivacyError(
            f"noise or batch size by the step, and noise that is correlated over {bands} steps: no bound is known for "
            "rows of several sizes",
            remedy="leave out noise_schedule and batch sizes by the step, or take bands=1",
        )


def refuse_moved_size(feed: Feed | None) -> None:
    """What divides the sums is the loader's affair, if it goes by the step."""
    if feed is not None and feed.schedule is not None:
        raise PrivacyError(
            "expected_batch_size was set on an optimizer whose loader has one for every step",
            remedy="leave it; the function is PoissonLoader's expected_batch_size",
        )


def saved_schedule(noise: ByStep | None, planned: int | None, logical_step: int) -> dict[str, Any]:
    """The entry of an optimizer's state that tells its noise schedule; empty without one."""
    return {} if noise is None else {"noise_schedule": noise.state(max(planned or 1, logical_step, 1))}


def refuse_other_schedule(noise: ByStep | None, own: Mapping[str, Any] | None) -> None:
    """A run goes on with the noise schedule that it had.

    Args:
        noise: of this optimizer.
        own: the state to be loaded; one without our entry is refused elsewhere.

    Raises:
        PrivacyError: the saved run had another one, or none, or it alone had one.
    """
    saved = own.get("noise_schedule") if isinstance(own, Mapping) else None
    if not isinstance(own, Mapping) or (saved is None and noise is None) or (noise is not None and noise.is_of(saved)):
        return
    if noise is None or saved is None:
        kinds = "without" if saved is None else "with", "without" if noise is None else "with"
        what = f"the saved run was made {kinds[0]} noise_schedule, and this one {kinds[1]}"
    else:
        what = "noise_schedule is another function than in the saved run"
    raise PrivacyError(
        f"{what}: steps would have other noise than was planned",
        remedy="call make_private with the noise_schedule of the saved run",
    )
