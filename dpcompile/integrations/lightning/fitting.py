"""What the strategies have in common: ``fit`` with model, optimizers and loader made private when it sets them up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from dpcompile.data.loader import PoissonLoader
from dpcompile.distributed.ranks import from_first
from dpcompile.errors import PrivacyError
from dpcompile.integrations.lightning.draws import DrawnEpochs, private_draws
from dpcompile.integrations.lightning.refusals import planned_steps, refuse_settings
from dpcompile.integrations.lightning.spent import LogsEpsilon
from dpcompile.integrations.stepped_together import SteppedTogether
from dpcompile.integrations.what_is_private import (
    Routed,
    private_part,
    refuse_batchnorm_beside,
    refuse_parameters_beside,
    without_frozen,
)
from dpcompile.module import engine_of
from dpcompile.noise.counter import fresh_seed
from dpcompile.private import make_private

__all__ = ["FitsPrivately"]

_SAVED = "dpcompile"  # key of a checkpoint

# For the type checker alone: the mixin stands before a strategy.
_Base: Any = Any if TYPE_CHECKING else object


class FitsPrivately(_Base):
    """Private training for a strategy of Lightning: stands first among the bases.

    Args:
        delta: where epsilon is logged.
        submodule: name of what is private.
        options: of :func:`dpcompile.make_private`.
        **of_strategy: of the strategy that stands behind.

    **Guarantee.** As of :func:`dpcompile.make_private`: each optimizer step is one step of its
    :class:`dpcompile.DPOptimizer`, on one whole draw of its loader.
    """

    def __init__(
        self, delta: float | None, submodule: str | None, options: Mapping[str, Any], **of_strategy: Any
    ) -> None:
        super().__init__(**of_strategy)
        self._options, self._submodule = dict(options), submodule
        self._delta: float | None = options.get("target_delta") if delta is None else delta
        self._routed: Routed | None = None
        self._draws: DrawnEpochs | None = None
        self._together: SteppedTogether | None = None
        self._seed, self._calls, self._part = 0, 0, ""
        self.private_model: Any = None
        self.private_optimizer: Any = None

    @property
    def private_loader(self) -> PoissonLoader | None:
        """The loader; None before ``fit``."""
        return None if self._draws is None else self._draws.loader

    # --- ranks -------------------------------------------------------------------------------------------------------

    def _ranks(self) -> tuple[int, int]:
        """Which rank this is, and how many there are, that examples are dealt out to."""
        return 0, 1

    def _private(self, module: nn.Module, optimizers: Any, loader: Any, options: Mapping[str, Any]) -> Any:
        """What ``make_private`` makes of them."""
        return make_private(module, optimizers, loader, **options)

    # --- fit ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any) -> None:
        """Refuse what cannot be private, before anything is made."""
        if trainer.state.fn == "fit":
            refuse_settings(trainer)
            if self.private_model is not None:
                raise PrivacyError(
                    f"a second fit with one {type(self).__name__}: it would begin another account, beside the first",
                    remedy="give max_epochs the whole number, or go on from a checkpoint with a new Trainer and "
                    "DPStrategy: fit(ckpt_path=...); what a tuner tries costs privacy each time",
                )
            trainer.callbacks.append(LogsEpsilon(self, self._delta))
        super().setup(trainer)

    def setup_optimizers(self, trainer: Any) -> None:
        """Make those of ``configure_optimizers`` private, with the model and the loader."""
        super().setup_optimizers(trainer)
        trainer.fit_loop.setup_data()
        if self._draws is None:
            raise PrivacyError(
                "there is no batch to train on", remedy="give fit a DataLoader, and a limit_train_batches above 0"
            )
        module = self.lightning_module
        name = private_part(module) if self._submodule is None else self._submodule
        part = module.get_submodule(name)
        refuse_parameters_beside(module, name)
        given = list(without_frozen(self.optimizers, part))
        options: dict[str, Any] = {k: v for k, v in self._options.items() if k not in ("groups", "batch_size_schedule")}
        if "target_epsilon" in options and not {"epochs", "steps"} & options.keys():
            options["steps"] = planned_steps(trainer)
        self._routed, self._part = Routed(part), name
        options["seed"] = self._seed
        model, optimizer, _ = self._private(self._routed.plain, given, self._draws.loader, options)
        self._routed.to(model)
        self.private_model, self.private_optimizer = model, optimizer
        self._together = SteppedTogether(optimizer, given) if len(given) > 1 else None
        self.optimizers = [optimizer] if self._together is None else [*self._together.handles]

    def process_dataloader(self, dataloader: Any) -> Any:
        """The training loader in private draws; others as they are."""
        trainer = self.lightning_module.trainer
        if trainer.state.fn != "fit" or not trainer.training:
            return dataloader
        if self._draws is not None:
            raise PrivacyError(
                "there is more than one loader to train on, or it was to be loaded anew: draws of all of them would "
                "have to be counted",
                remedy="give fit one DataLoader, and leave reload_dataloaders_every_n_epochs out",
            )
        given, ranks = self._options, self._ranks()
        secure = bool(given.get("secure") or given.get("exact"))
        drawn = from_first(fresh_seed(secure=secure))
        self._seed = drawn if given.get("seed") is None else given["seed"]
        self._draws = private_draws(dataloader, given, self._seed, secure, ranks)
        return self._draws

    # --- steps -------------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Of the LightningModule."""
        module = self.lightning_module
        refuse_settings(module.trainer)
        refuse_batchnorm_beside(module, module.get_submodule(self._part))
        if self._together is not None:
            self._together.check()
        self._calls = self._fed.calls
        output = super().training_step(*args, **kwargs)
        if output is None and module.automatic_optimization:
            raise PrivacyError(
                "training_step returned None, and whether a batch is left out would depend on its examples: one of "
                "them could take the sum of all others away",
                remedy="return the loss of every batch; weights of 0 leave examples out, each by itself",
            )
        return output

    def backward(self, closure_loss: Any, *args: Any, **kwargs: Any) -> Any:
        """Of a loss that came through the private model."""
        if self._fed.calls == self._calls:
            name = f"self.{self._part}" if self._part else "self"
            raise PrivacyError(
                f"training_step has not called what is private, {name}(...): nothing would clip this loss's gradients",
                remedy=f"call {name}(...) there, with everything that is trained in its forward; or say what "
                "training_step calls, if that holds all that is trained: DPStrategy(submodule='name')",
            )
        return super().backward(closure_loss, *args, **kwargs)

    @property
    def _fed(self) -> Any:
        return engine_of(self.private_model).draws

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """With how far the draws are used."""
        if "optimizer_states" in checkpoint and self._draws is not None:
            checkpoint[_SAVED] = {"loader": self._draws.loader.state_dict()}
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """With the draws."""
        if _SAVED in checkpoint:
            super().load_optimizer_state_dict(checkpoint)
        self.load_draws(checkpoint)

    def load_draws(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on with the draws of a checkpoint.

        Raises:
            PrivacyError: it is of no private run, or what the loader refuses.
        """
        if _SAVED not in checkpoint:
            raise PrivacyError(
                "the checkpoint is not of a private run: it does not say what was spent on its weights",
                remedy="resume from a checkpoint that a DPStrategy saved; to begin with weights alone, load them into "
                "the module: module.load_state_dict(torch.load(path)['state_dict'])",
            )
        assert self._draws is not None
        self._draws.loader.load_state_dict(checkpoint[_SAVED]["loader"])

    def teardown(self) -> None:
        """The LightningModule is as it was, with the weights that were trained."""
        super().teardown()
        if self._routed is not None:
            self._routed.undo()
