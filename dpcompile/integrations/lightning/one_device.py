"""Lightning on one device: ``Trainer(strategy=DPStrategy(...))`` trains a ``LightningModule`` privately, as it is."""

from __future__ import annotations

from typing import Any

from dpcompile.errors import PrivacyError
from dpcompile.integrations.lightning.fitting import FitsPrivately
from dpcompile.integrations.lightning.package import pl

__all__ = ["DPStrategy"]

_SEVERAL = "DPDDPStrategy or DPModelParallelStrategy of dpcompile.integrations.lightning, with the same options"


class DPStrategy(FitsPrivately, pl.strategies.SingleDeviceStrategy):
    """Private training on one device: ``Trainer(strategy=DPStrategy(target_epsilon=3.0, target_delta=1e-5))``.

    The ``LightningModule`` and the DataLoader given to ``fit`` stay as they are. Model, optimizers and loader are made
    private when ``fit`` sets them up, for the steps that ``max_epochs``, ``max_steps`` and ``limit_train_batches`` of
    the Trainer say. A batch is one draw and one step. ``validate``, ``test`` and ``predict`` are not touched.

    What is private is the one child that holds all trainable parameters (``self.net``), whether ``training_step`` calls
    it or ``self(x)``; where several do, the module itself, and then ``training_step`` calls ``self(x)``. The loss is
    computed in ``training_step``, one value per example and then their mean.

    A checkpoint has weights, optimizers, accountant, noise and draws, and ``fit(ckpt_path=...)`` goes on exactly. It
    holds the seed: keep it as secret as the data, and publish one saved with ``save_weights_only=True``.

    Args:
        delta: where epsilon is logged, as "epsilon", after every epoch and ``log_every_n_steps``; None:
            ``target_delta``, and without one epsilon is not logged.
        submodule: name of what is private, as in ``named_modules()``; "" is the module itself, None as above.
        **options: of :func:`dpcompile.make_private`; ``steps`` only where the Trainer does not know them.

    Attributes:
        private_model: what is private, while and after ``fit``; it has ``plan``, ``certificate``, ``grad_norms``.
        private_optimizer: the DPOptimizer, whose ``report(delta)`` and ``accountant`` tell what it has cost.
        private_loader: the PoissonLoader.

    Raises:
        PrivacyError: in ``fit``, see the table, or whatever ``make_private`` refuses.

    **Guarantee.** As of :func:`dpcompile.make_private`.

    ==================================================  =====================================================
    edge case                                           outcome
    ==================================================  =====================================================
    ``accumulate_grad_batches``                         refused: give a larger batch, and physical_batch_size
    ``gradient_clip_val``, ``overfit_batches``          refused
    ``training_step`` returns None                      refused: one example could drop the sum of a batch
    ``training_step`` calls parts of what is private    refused
    several optimizers, in manual optimization          one private step, when all of them were stepped
    one of them not stepped                             refused
    frozen BatchNorm beside what is private             refused in training mode
    a second ``fit``, a tuner's trials                  refused: each would be an account of its own
    more steps than were planned                        refused by the optimizer
    several devices                                     refused here: :class:`DPDDPStrategy`
    ==================================================  =====================================================
    """

    strategy_name = "dpcompile"

    def __init__(self, *, delta: float | None = None, submodule: str | None = None, **options: Any) -> None:
        super().__init__(delta, submodule, options)

    @property
    def parallel_devices(self) -> list[Any]:
        """What the Trainer was told to use."""
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[Any]) -> None:
        if len(devices) > 1:
            raise PrivacyError(
                f"DPStrategy, and {len(devices)} devices",
                remedy=f"Trainer(devices=1); on several, {_SEVERAL}",
            )
        self._root_device = devices[0]

    @property
    def num_nodes(self) -> int:
        """One."""
        return 1

    @num_nodes.setter
    def num_nodes(self, number: int) -> None:
        if number != 1:
            raise PrivacyError(
                f"DPStrategy, and {number} nodes: each would train a model of its own",
                remedy=f"Trainer(num_nodes=1); on several, {_SEVERAL}",
            )
