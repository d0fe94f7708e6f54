"""What noise that is correlated over steps asks of loader, accountant and loop, and which row of it a step takes.

An example must be in at most one of ``bands`` consecutive rows (:func:`dpcompile.accounting.events.rounds`). The loader
deals examples out to parts and draws from part d mod ``bands`` at draw d. So the row of a step is the number of its
draw, of one loader from the first step to the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpcompile.accounting.arguments import check_bands
from dpcompile.accounting.protocol import Accountant
from dpcompile.batches.feed import Feed
from dpcompile.errors import PrivacyError
from dpcompile.noise.banded import check_matrix
from dpcompile.noise.buffers import saved_powers
from dpcompile.noise.correlation import CorrelatedMechanism
from dpcompile.noise.mechanism import Mechanism

__all__ = ["check_step", "next_row", "refuse_move", "refuse_other_loader", "refuse_other_matrix", "refuse_other_parts"]


def check_step(
    mechanism: Mechanism, feed: Feed | None, accountant: Accountant | None, used: Mapping[str, Any] | None
) -> None:
    """Before a step: the loader is one of as many parts, and the same as before; the numbers are those of before.

    Args:
        mechanism: of the optimizer.
        feed: what feeds its model.
        accountant: of the optimizer.
        used: how far which loader's draws were used, of earlier steps; None: of none.

    Raises:
        PrivacyError: they are not; or no bound is known for the accountant's relation.
    """
    refuse_other_parts(mechanism, 1 if feed is None else feed.bands)
    if mechanism.bands == 1:
        return
    if accountant is not None:
        check_bands(mechanism.bands, accountant.relation)
    if isinstance(mechanism, CorrelatedMechanism):
        mechanism.check_numbers()
    if feed is not None and used is not None and feed.stream not in (None, used["stream"]):
        raise PrivacyError(
            "the steps before were on draws of another loader: it dealt examples out to other parts, and one example "
            f"may be in several of {mechanism.bands} steps, whose noise belongs together",
            remedy="go on with the loader of the run; when resuming, load its state too (loader.load_state_dict, or "
            "load_checkpoint with the loader), for as many examples",
        )


def refuse_other_parts(mechanism: Mechanism, bands: int) -> None:
    """Noise that is correlated over b steps needs a loader with b parts, and none other may have parts.

    Args:
        mechanism: that releases the sums.
        bands: the loader's; 1 also where there is no loader.
    """
    if mechanism.bands == bands:
        return
    own = "independent" if mechanism.bands == 1 else f"correlated over {mechanism.bands} steps"
    theirs = "does not deal examples out to parts" if bands == 1 else f"draws from {bands} parts by turns"
    raise PrivacyError(
        f"the noise is {own}, and the loader {'that feeds the model, if any, ' if bands == 1 else ''}{theirs}: how "
        "often an example is in steps whose noise belongs together is not what would be counted",
        remedy=f"give PoissonLoader bands={mechanism.bands} and attach it to model and optimizer, or give make_private "
        "bands= and a DataLoader",
    )


def next_row(mechanism: Mechanism, feed: Feed | None, logical_step: int) -> int:
    """The row of noise for the step at hand: with correlated noise the number of its draw, else the logical step.

    Rows of draws that were left out are used up, and released never.

    Raises:
        PrivacyError: with correlated noise, no draw since the last step, or one out of its order.
    """
    if mechanism.bands == 1:
        return logical_step
    draw = None if feed is None else feed.draw
    if draw is None or draw < logical_step:
        on = "is on no draw of the loader" if draw is None else f"is on draw {draw} of the loader"
        raise PrivacyError(
            f"the step {on}, and noise up to row {logical_step - 1} was used: row and draw are to have one number, or "
            f"an example may be in several of {mechanism.bands} steps, whose noise belongs together",
            remedy="step once after the backward of each batch, in the order in which the loader gives them; a batch "
            "that is left out (optimizer.discard()) is lost",
        )
    return draw


def refuse_move(mechanism: Mechanism, logical_step: int, name: str, before: float, after: float) -> None:
    """Sigma and C stay what they were at the first row."""
    if mechanism.bands > 1 and logical_step and after != before:
        raise PrivacyError(
            f"{name} was to go from {before} to {after} after {logical_step} steps of a run whose noise is correlated "
            f"over {mechanism.bands}: no bound is known for rows of several sizes",
            remedy="leave it; schedules of noise and C are for noise that is independent (bands=1)",
        )


def refuse_other_loader(mechanism: Mechanism, feed: Feed | None, logical_step: int, loader: Any) -> None:
    """With correlated noise a run has one loader, whose parts do not change."""
    if mechanism.bands > 1 and logical_step and feed is not None and not feed.is_of(loader):
        raise PrivacyError(
            f"another loader is attached after {logical_step} steps: it deals examples out to other parts, and the "
            f"noise of {mechanism.bands} steps belongs together",
            remedy="go on with the loader of the first step",
        )


def refuse_other_matrix(own: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """A state to resume from is of noise with as many bands, for the same C, and its matrix is one."""
    fixed = [("bands", 1), ("max_grad_norm", None)]
    for name, default in fixed[: 1 if current.get("bands", 1) == 1 else 2]:
        saved, here = own.get(name, default), current.get(name, default)
        if saved != here:
            raise PrivacyError(
                f"{name} was {saved} in the saved run and is {here} here: rows of its noise belong together",
                remedy=f"make the run with {name}={saved}"
                if saved is not None
                else "make it with the mechanism of the saved run",
            )
    kinds = [state.get("in_turn") or "bands" for state in (own, current)]
    if kinds[0] != kinds[1] and current.get("bands", 1) > 1:
        raise PrivacyError(
            f"the noise was made by {kinds[0]} in the saved run, and is by {kinds[1]} here: its rows belong together",
            remedy="make the run with the mechanism of the saved run",
        )
    if "powers" in current:
        saved_powers(own)
    if "coefficients" not in current:
        return
    coefficients, restart = own.get("coefficients"), own.get("restart")
    if not isinstance(coefficients, (list, tuple)) or len(coefficients) != own["bands"] or restart is None:
        raise PrivacyError(
            "the state of the mechanism lacks its matrix: 'coefficients', as many as 'bands', and 'restart'",
            remedy="load what DPOptimizer.state_dict() returned, unchanged",
        )
    check_matrix(coefficients, restart)
