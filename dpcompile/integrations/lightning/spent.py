"""A callback that logs epsilon."""

from __future__ import annotations

from typing import Any

from dpcompile.integrations.lightning.package import pl

__all__ = ["LogsEpsilon"]


class LogsEpsilon(pl.Callback):
    """Logs what was spent, as "epsilon".

    Args:
        strategy: whose ``private_optimizer`` counts.
        delta: where; None: nothing is logged.
    """

    def __init__(self, strategy: Any, delta: float | None) -> None:
        self._strategy, self._delta = strategy, delta

    def _log(self, module: Any) -> None:
        optimizer = self._strategy.private_optimizer
        if self._delta is not None and optimizer is not None and optimizer.accountant is not None:
            several = self._strategy.world_size > 1  # the same on all ranks
            module.log("epsilon", float(optimizer.accountant.epsilon(self._delta)), prog_bar=True, sync_dist=several)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Every ``log_every_n_steps``."""
        every = trainer.log_every_n_steps
        if every and trainer.global_step % every == 0:
            self._log(pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """At the end of an epoch."""
        self._log(pl_module)
