"""Lightning: ``Trainer(strategy=DPStrategy(...))`` trains a ``LightningModule`` privately, as it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch.utils.data import DataLoader

from dpcompile.data.loader import PoissonLoader
from dpcompile.data.making import private_loader_of
from dpcompile.errors import PrivacyError
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

__all__ = ["DPStrategy"]

# What `make_private` hands on to the loader.
_OF_LOADER = ("physical_batch_size", "max_batch_size", "bands", "examples_per_user")
_SAVED = "dpcompile"  # key of a checkpoint


def _lightning() -> Any:
    """The package that the program uses: ``lightning`` and ``pytorch_lightning`` hold the same classes twice."""
    older = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
    return import_module("pytorch_lightning" if older or find_spec("lightning") is None else "lightning.pytorch")


_pl: Any = _lightning()


class DPStrategy(_pl.strategies.SingleDeviceStrategy):
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
    several devices                                     refused
    ==================================================  =====================================================
    """

    strategy_name = "dpcompile"

    def __init__(self, *, delta: float | None = None, submodule: str | None = None, **options: Any) -> None:
        super().__init__()
        self._options, self._submodule = options, submodule
        self._delta: float | None = options.get("target_delta") if delta is None else delta
        self._routed: Routed | None = None
        self._draws: _Draws | None = None
        self._together: SteppedTogether | None = None
        self._seed, self._calls, self._part = 0, 0, ""
        self.private_model: Any = None
        self.private_optimizer: Any = None

    @property
    def private_loader(self) -> PoissonLoader | None:
        """The loader; None before ``fit``."""
        return None if self._draws is None else self._draws.loader

    @property
    def parallel_devices(self) -> list[Any]:
        """What the Trainer was told to use."""
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[Any]) -> None:
        if len(devices) > 1:
            raise PrivacyError(
                f"DPStrategy, and {len(devices)} devices",
                remedy="Trainer(devices=1); on several, the loop of docs/distributed.md",
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
                remedy="Trainer(num_nodes=1); on several, the loop of docs/distributed.md",
            )

    # --- fit ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any) -> None:
        """Refuse what cannot be private, before anything is made."""
        if trainer.state.fn == "fit":
            _refuse_settings(trainer)
            if self.private_model is not None:
                raise PrivacyError(
                    "a second fit with one DPStrategy: it would begin another account, beside the first",
                    remedy="give max_epochs the whole number, or go on from a checkpoint with a new Trainer and "
                    "DPStrategy: fit(ckpt_path=...); what a tuner tries costs privacy each time",
                )
            trainer.callbacks.append(_Epsilon(self, self._delta))
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
            options["steps"] = _steps(trainer)
        self._routed, self._part = Routed(part), name
        options["seed"] = self._seed
        model, optimizer, _ = make_private(self._routed.plain, given, self._draws.loader, **options)
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
        self._draws = _Draws(self._private_loader(dataloader))
        return self._draws

    def _private_loader(self, dataloader: Any) -> PoissonLoader:
        o = self._options
        if o.get("max_batch_size") == "auto":
            raise PrivacyError("max_batch_size is 'auto' in a DPStrategy", remedy="give it a number")
        if not isinstance(dataloader, (DataLoader, PoissonLoader)):
            raise PrivacyError(
                f"fit was given a {type(dataloader).__name__} to train on",
                remedy="give it a DataLoader over the examples, or a PoissonLoader",
            )
        secure = bool(o.get("secure") or o.get("exact"))
        self._seed = fresh_seed(secure=secure) if o.get("seed") is None else o["seed"]
        numbers = {name: o.get(name) for name in _OF_LOADER} | {"in_turn": o.get("in_turn") is not None or None}
        groups, filling, schedule = (o.get(name) for name in ("groups", "padding_example", "batch_size_schedule"))
        return private_loader_of(dataloader, groups, filling, schedule, self._seed, secure, None, numbers)

    # --- steps -------------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Of the LightningModule."""
        module = self.lightning_module
        _refuse_settings(module.trainer)
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
        if _SAVED not in checkpoint:
            raise PrivacyError(
                "the checkpoint is not of a private run: it does not say what was spent on its weights",
                remedy="resume from a checkpoint that a DPStrategy saved; to begin with weights alone, load them into "
                "the module: module.load_state_dict(torch.load(path)['state_dict'])",
            )
        super().load_optimizer_state_dict(checkpoint)
        assert self._draws is not None
        self._draws.loader.load_state_dict(checkpoint[_SAVED]["loader"])

    def teardown(self) -> None:
        """The LightningModule is as it was, with the weights that were trained."""
        super().teardown()
        if self._routed is not None:
            self._routed.undo()


class _Draws:
    """What the Trainer iterates over: an epoch is ``len(loader)`` draws, wherever in a pass it begins."""

    def __init__(self, loader: PoissonLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        left = len(self.loader)
        while left:
            for batch in self.loader:
                left -= 1
                yield batch
                if not left:
                    break

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loader.load_state_dict(state)


class _Epsilon(_pl.Callback):
    """Logs what was spent."""

    def __init__(self, strategy: DPStrategy, delta: float | None) -> None:
        self._strategy, self._delta = strategy, delta

    def _log(self, module: Any) -> None:
        optimizer = self._strategy.private_optimizer
        if self._delta is not None and optimizer is not None and optimizer.accountant is not None:
            module.log("epsilon", float(optimizer.accountant.epsilon(self._delta)), prog_bar=True)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        every = trainer.log_every_n_steps
        if every and trainer.global_step % every == 0:
            self._log(pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log(pl_module)


def _steps(trainer: Any) -> int:
    """That ``fit`` takes, from the first to the last."""
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < float("inf"):
        raise PrivacyError(
            "target_epsilon, and a Trainer without an end: noise is calibrated for a number of steps",
            remedy="give the Trainer max_epochs or max_steps, or DPStrategy(steps=...)",
        )
    return int(steps)


def _refuse_settings(trainer: Any) -> None:
    """Of the Trainer."""
    if trainer.accumulate_grad_batches != 1:
        raise PrivacyError(
            f"accumulate_grad_batches is {trainer.accumulate_grad_batches}: a step is one draw, not several",
            remedy="leave it out, and give the DataLoader the batch size of a whole step and DPStrategy "
            "physical_batch_size=, what fits into memory: a draw runs in such parts",
        )
    if trainer.gradient_clip_val:
        raise PrivacyError(
            f"gradient_clip_val is {trainer.gradient_clip_val}: it would change the noised sum's scale",
            remedy="leave it out: DPStrategy(max_grad_norm=C) clips, the gradient of every example",
        )
    if trainer.overfit_batches:
        raise PrivacyError(
            "overfit_batches takes the same batches again and again, and draws are independent",
            remedy="leave it out, and give fit a DataLoader over torch.utils.data.Subset(dataset, range(n))",
        )
