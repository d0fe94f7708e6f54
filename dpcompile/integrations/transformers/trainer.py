"""``DPTrainer``: ``transformers.Trainer`` whose steps are private.

The Trainer keeps its loop. What it trains is a private view of the model, as a model under DistributedDataParallel
would be: ``model_wrapped`` is the view, ``model`` the ordinary one, that is evaluated, saved and loaded. One item of
its DataLoader is one logical draw, and one optimizer step.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

from dpcompile.errors import PrivacyError
from dpcompile.integrations.transformers import losses
from dpcompile.integrations.transformers.arguments import PrivacyArguments
from dpcompile.integrations.transformers.checkpoints import load_draws, save_draws
from dpcompile.integrations.transformers.draws import DrawnStep
from dpcompile.integrations.transformers.making import Private, made_of, made_private, refuse_stream, sampled
from dpcompile.integrations.transformers.ranks import OnRanks
from dpcompile.integrations.transformers.refusals import refuse_arguments, refuse_mixed, refuse_overridden
from dpcompile.integrations.transformers.step_losses import StepLosses
from dpcompile.module import PrivateModule
from dpcompile.reporting.report import Report
from dpcompile.runtime.replicas import inner_module

__all__ = ["DPSeq2SeqTrainer", "DPTrainer", "DPTrainerMixin"]


class DPTrainerMixin(OnRanks):
    """Private training for :class:`transformers.Trainer`, and for classes made of it: stands first among their bases.

    Args:
        *args: of the Trainer.
        privacy: target or sigma, and the rest (:class:`PrivacyArguments`).
        **kwargs: of the Trainer.

    What of the Trainer means something else:

    =================================  =============================================================================
    ``max_grad_norm``                  C, to which each example's gradient is clipped. The noisy gradient is not
                                       clipped a second time.
    per-device batch size,             their product is the expected batch size of one draw; the former is what one
    ``gradient_accumulation_steps``    forward takes where it is smaller. One draw is one step.
    the loss                           one for each example, a mean over what it holds itself
                                       (:meth:`per_example_loss`); not divided by the tokens of the batch
    ``seed``, ``data_seed``            have no part in noise and draws
    ``grad_norm`` in the logs          is not there: the norm before the noise is not private
    ``total_flos``                     is 0: it would tell the sizes of draws
    ``epsilon`` in the logs            spent so far, at ``target_delta``
    ``loss`` and metrics               are printed as ever: epsilon does not cover them
    a second ``train()``               goes on with the same accountant, noise and draws
    =================================  =============================================================================

    Raises:
        PrivacyError: no ``privacy``, or what cannot be had with private training.

    **Guarantee.** The weights are those of :func:`dpcompile.make_private`'s loop: each optimizer step of the Trainer is
    one step of its :class:`dpcompile.DPOptimizer`, on one whole draw of its loader; there are as many as the noise was
    calibrated for. A checkpoint is resumed with the noise, draws and accountant that it was saved with, or not at all.
    """

    _private: Private | None = None
    _losses: StepLosses
    _given: Any = None  # TrainingArguments, while a run has its own

    def __init__(self, *args: Any, privacy: PrivacyArguments | None = None, **kwargs: Any) -> None:
        if not isinstance(privacy, PrivacyArguments):
            raise PrivacyError(
                f"{type(self).__name__} without privacy=",
                remedy="give privacy=PrivacyArguments(target_epsilon=..., target_delta=...)",
            )
        self.privacy = privacy
        refuse_overridden(self, DPTrainerMixin, _OVERRIDDEN)
        refuse_mixed(self)
        for given in (*args, *kwargs.values()):  # before the Trainer takes them apart
            if isinstance(given, TrainingArguments):
                refuse_arguments(given)
        super().__init__(*args, **kwargs)
        refuse_arguments(self.args)
        if isinstance(self.model, PrivateModule):
            raise PrivacyError(
                "the model is private already, and would be evaluated and saved as such",
                remedy="pass the ordinary model: the Trainer makes it private",
            )

    @property
    def epsilon(self) -> float:
        """Spent so far, at ``target_delta``."""
        if self._private is None:
            return 0.0
        accountant: Any = self._private.optimizer.accountant
        return accountant.epsilon(self.privacy.target_delta)

    def report(self, delta: float | None = None) -> Report:
        """The page for the person who must sign: :meth:`dpcompile.DPOptimizer.report`.

        Raises:
            PrivacyError: nothing was trained.
        """
        if self._private is None:
            raise PrivacyError("there is nothing to report before training", remedy="call train() first")
        return self._private.optimizer.report(self.privacy.target_delta if delta is None else delta)  # type: ignore[arg-type]

    # The run: from TrainingArguments to make_private, once.

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer. Within it ``args`` are those of the loop: no clipping of its own, no accumulation.

        Raises:
            PrivacyError: arguments that were changed to what cannot be had, or a second run from ``model_init``.
        """
        refuse_arguments(self.args)
        if self._private is not None and self.model_init is not None:
            raise PrivacyError(
                "a second run from model_init on the same data: epsilon is that of both together",
                remedy="leave model_init out and give the model; or make another DPTrainer, and compose the two "
                "(docs/sharp_edges.md, What else was released)",
            )
        self._losses = self._step_losses()
        given = self.args
        self.args = copy.copy(given)
        self.args.gradient_accumulation_steps, self.args.max_grad_norm = 1, 0.0
        self._given = given
        try:
            return super().train(*args, **kwargs)
        finally:
            self.args, self._given = given, None

    def _step_losses(self) -> StepLosses:
        source = None if self.compute_loss_func is None else "compute_loss_func"
        if type(self).per_example_loss is not DPTrainerMixin.per_example_loss:
            source = "per_example_loss"
        return StepLosses(self.model, self.label_names, self.per_example_loss, source)

    def _trained_module(self) -> nn.Module:
        """What is made private: it holds the model's parameters."""
        return self.model  # type: ignore[return-value]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A step for each item; the first call makes model, optimizer and loader private."""
        args = self.args if self._given is None else self._given
        if self._private is None:
            refuse_stream(self.train_dataset)
            self.sharded()
            data = sampled(super().get_train_dataloader(), args, self.privacy.padding_example)
            self._private = made_private(self, self._trained_module(), super().create_optimizer(), data, args)
            self.optimizer = self._private.optimizer
        self._private.refuse_changed(made_of(self, args))
        return self._private.steps

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The private optimizer, around the one that ``TrainingArguments`` or ``optimizers=`` say."""
        self.get_train_dataloader()
        assert self._private is not None
        private = self._private.optimizer
        if self.optimizer is not private and getattr(self.optimizer, "optimizer", None) is not private:
            raise PrivacyError(
                f"the Trainer's optimizer was replaced by {type(self.optimizer).__name__}: its steps would have no "
                "noise",
                remedy="give optimizers=(optimizer, None) to DPTrainer, which makes it private",
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As in the Trainer; there must be as many steps as the noise was calibrated for.

        Raises:
            PrivacyError: there are others.
        """
        private = self._private
        if private is not None and self.privacy.target_epsilon is not None and num_training_steps != private.planned:
            raise PrivacyError(
                f"{num_training_steps} steps of training, and the noise was calibrated for {private.planned}",
                remedy="make a new DPTrainer with the new max_steps or num_train_epochs",
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """The private view to train; to evaluate, the model itself, as it is.

        Accelerate would put automatic mixed precision into the model's own ``forward``, which the view shares, before
        the first evaluation, if it had prepared no model by then.
        """
        if training:
            assert self._private is not None
            return self._private.model
        self.accelerator.prepare_model(nn.Identity(), evaluation_mode=True)
        return self.sharded() if model is self.model and self._private is None else model

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Automatic mixed precision, around model and loss, where the Trainer leaves it to Accelerate."""
        if not self.args.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, dtype=torch.bfloat16)

    # A step.

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        """The next draw. Nothing is counted in it: no loss is divided by what others in the batch hold.

        Raises:
            PrivacyError: it is no draw of the private loader.
        """
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not all(isinstance(sample, DrawnStep) for sample in samples):
            raise PrivacyError(
                "the Trainer's loop was given a batch that is no draw of the private loader",
                remedy="leave get_train_dataloader as DPTrainer has it; give train_dataset and data_collator",
            )
        return samples, None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one draw, physical batch by physical batch."""
        losses.without_input_gradients(self.model)  # type: ignore[arg-type]
        for part in inputs.parts():
            super().training_step(model, part)
        return torch.tensor(self._losses.shown(self.args.device), device=self.args.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In training the mean of :meth:`per_example_loss`, in evaluation what the Trainer has."""
        if not isinstance(inner_module(model), PrivateModule):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = self._losses.of(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def per_example_loss(self, outputs: Any, labels: Mapping[str, Tensor]) -> Tensor:
        """One loss for each example: that of ``compute_loss_func``, or of the model's head; override it for another.

        Args:
            outputs: of the model, which was called without labels.
            labels: what of the batch stands under ``label_names``.

        Returns:
            ``[B]``, each a function of the outputs and labels of its own example.
        """
        if self.compute_loss_func is not None:
            given = dict(labels) if len(labels) > 1 else next(iter(labels.values()), None)
            return self.compute_loss_func(outputs, given, num_items_in_batch=None)
        kind = losses.kind_of(self.model, labels, outputs)  # type: ignore[arg-type]
        return losses.head_losses(kind, outputs, labels, self.args.label_smoothing_factor)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """None: the norm of the clipped sum, before the noise, is not private."""
        return None

    # What is written down.

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in the Trainer, with ``epsilon`` while it trains."""
        if self._given is not None:
            logs["epsilon"] = self.epsilon
        super().log(logs, *args, **kwargs)

    def num_examples(self, dataloader: Any) -> int:
        """How many examples a pass draws from."""
        if self._private is not None and dataloader is self._private.steps:
            return self._private.loader.dataset_size
        return super().num_examples(dataloader)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused.

        Raises:
            PrivacyError: always.
        """
        raise PrivacyError(
            "hyperparameter_search trains many times on the same data: epsilon is that of all runs, and of the choice",
            remedy="search on public data, or make a DPTrainer for each run and account for the choice "
            "(docs/sharp_edges.md, What else was released)",
        )

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """``training_args.bin`` holds the arguments as they were given."""
        of_the_loop, self.args = self.args, self.args if self._given is None else self._given
        try:
            super()._save(*args, **kwargs)
        finally:
            self.args = of_the_loop

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The loader's state beside the optimizer's, which has the seed, the noise that is used up and the accountant.

        Keep checkpoints as secret as the data; the weights beside them are what may be published.
        """
        super()._save_optimizer_and_scheduler(output_dir)
        if self._private is not None and self.args.should_save:
            save_draws(self._private.loader, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Go on with the draws, the noise and the accountant of the checkpoint.

        Raises:
            PrivacyError: it has none, or what loader and optimizer refuse.
        """
        if checkpoint is not None and self._private is not None:
            load_draws(self._private.loader, checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)


_OVERRIDDEN = {
    "compute_loss": "override per_example_loss(outputs, labels), which returns one loss for each example, or give "
    "compute_loss_func=",
    "get_train_dataloader": "give train_dataset= and data_collator=",
    "get_batch_samples": "leave it as DPTrainer has it",
    "training_step": "override per_example_loss for another loss; a TrainerCallback sees every step",
    "create_optimizer": "give optimizers=(optimizer, None), or optimizer_cls_and_kwargs=",
}


class DPTrainer(DPTrainerMixin, Trainer):
    """:class:`transformers.Trainer` with private steps: see :class:`DPTrainerMixin`."""


class DPSeq2SeqTrainer(DPTrainerMixin, Seq2SeqTrainer):
    """:class:`transformers.Seq2SeqTrainer` with private steps: see :class:`DPTrainerMixin`."""
