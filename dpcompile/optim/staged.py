"""What a step asks of a stage of a pipeline: sums that wait for all stages' norms, and noise by the whole model."""

from __future__ import annotations

from collections.abc import Sequence

from dpcompile.distributed.ranks import digest
from dpcompile.module import Engine
from dpcompile.optim.wrapping import WrappingOptimizer
from dpcompile.runtime.loss_scale import check_scaler

__all__ = ["complete_batch", "stream_of", "verify_sums"]


def complete_batch(optimizer: WrappingOptimizer) -> None:
    """Before a step: clipped sums of a pipeline's batch are computed, and the scale of the losses is looked at."""
    if optimizer.engine.stage is not None:
        optimizer.engine.stage.complete()
    check_scaler(optimizer, optimizer.engine.ledger.scales)


def verify_sums(engine: Engine, names: Sequence[str]) -> None:
    """Raise PrivacyError unless the gradients are the sums that backwards left; a stage's are put there first."""
    engine.ledger.hand_over(engine.trained())
    engine.ledger.verify(names)


def stream_of(seed: int, engine: Engine) -> str:
    """Tells the noise that is drawn for a model from that of others, without the secret; stages of one have theirs."""
    return digest(seed) + ("" if engine.stage is None else f" from parameter {engine.stage.first_parameter}")
