"""What exact noise asks of the model: whose sums are rounded where, and how many numbers are released."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpcompile.distributed.shards import is_distributed
from dpcompile.errors import PrivacyError
from dpcompile.module import Engine
from dpcompile.noise.exact import ExactMechanism
from dpcompile.noise.grid import default_bits
from dpcompile.noise.mechanism import Mechanism

__all__ = ["check_rounding", "let_round", "refuse_other_grid"]


def let_round(mechanism: Mechanism, engine: Engine) -> None:
    """From now on sums over replicas are of integers, if the mechanism is exact.

    Raises:
        PrivacyError: it is, and the model is sharded; or the noise does not fit the grid.
    """
    if isinstance(mechanism, ExactMechanism) or engine.distributed:
        engine.replicas.rounding = mechanism if isinstance(mechanism, ExactMechanism) else None
    check_rounding(mechanism, engine)


def check_rounding(mechanism: Mechanism, engine: Engine) -> None:
    """Before a step: an exact mechanism gets sums that were rounded to its grid on each rank.

    Raises:
        PrivacyError: it does not; or the noise does not fit the grid.
    """
    if not isinstance(mechanism, ExactMechanism):
        return
    parameters = engine.parameters()
    if any(map(is_distributed, parameters.values())):
        raise PrivacyError(
            "exact noise for a model whose parameters are cut over ranks (FSDP2, tensor parallelism): its sums over "
            "ranks are of floating-point numbers",
            remedy="use DistributedDataParallel around dp_compile(model), whose sums are then of integers; or leave "
            "exact=True out",
        )
    if engine.replicas.rounding is not mechanism:
        raise PrivacyError(
            "the exact mechanism took another's place: sums over replicas would not be of integers on its grid",
            remedy="make a DPOptimizer with it",
        )
    mechanism.units(sum(parameters[name].numel() for name in engine.trainable()))


def refuse_other_grid(own: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """A state to resume from is of the same grid, or both have none."""
    saved, here = own.get("grid_bits"), current.get("grid_bits")
    if saved == here:
        return
    told = ["without a grid" if bits is None else f"on a grid of {bits!r} bits" for bits in (saved, here)]
    how = "without exact" if saved is None else f"mechanism=ExactMechanism(..., bits={saved!r})"
    if saved == default_bits(own["expected_batch_size"]):
        how += ", or with exact=True"
    raise PrivacyError(
        f"sums were released {told[0]} in the saved run, and are {told[1]} here",
        remedy=f"make the DPOptimizer {'' if saved is None else 'with '}{how}",
    )
