"""``DPDPOTrainer``: TRL's ``DPOTrainer`` whose steps are private; an example is a pair."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import use_adapter

from dpcompile.errors import PrivacyError, UnsupportedGraphError
from dpcompile.integrations.transformers import DPTrainerMixin, losses
from dpcompile.integrations.transformers.step_losses import StepLosses
from dpcompile.integrations.trl.pairs import OF_MODEL, PairRows, Pairs, of_trl
from dpcompile.integrations.trl.refusals import refuse_config, refuse_made

__all__ = ["DPDPOTrainer"]


class _OfPairs(DPOTrainer):
    """What DPTrainer makes private: a row of a batch is a pair."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader: Any = super().get_train_dataloader()
        loader.collate_fn = PairRows(loader.collate_fn)
        return loader


class DPDPOTrainer(DPTrainerMixin, _OfPairs):
    """:class:`trl.DPOTrainer` with private steps.

    All of :class:`dpcompile.integrations.transformers.DPTrainerMixin` holds. An example is a pair, the chosen and the
    rejected answer together: its loss is what TRL computes for a batch that holds this pair alone, whatever
    ``loss_type``, and its gradient, through both answers, is clipped as one. The reference is frozen: precomputed
    (``precompute_ref_log_probs=True``), a ``ref_model``, or the model itself without its adapters. Rewards and other
    metrics are computed in evaluation only: of training batches they are not private, and are not logged.

    Args:
        *args: of the DPOTrainer.
        privacy: target or sigma, and the rest.
        **kwargs: of the DPOTrainer.

    Raises:
        PrivacyError: ``loss_type`` "aot" and "aot_unpaired", which sort the pairs of a batch, ``sync_ref_model``,
            ``activation_offloading``, several ranks, a load-balancing loss, images, a reference that is trained; or
            what ``DPTrainer`` refuses.

    **Guarantee.** As of ``DPTrainerMixin``. The loss of a pair is computed from the outputs of its own two rows, those
    of the frozen reference among them, and nothing else.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for given in (*args, *kwargs.values()):
            refuse_config(given)
        super().__init__(*args, **kwargs)
        refuse_config(self.args)
        refuse_made(self)
        _refuse_shared(self)

    def create_accelerator_and_postprocess(self) -> None:
        """As in ``DPTrainer``.

        Raises:
            PrivacyError: several ranks.
        """
        super().create_accelerator_and_postprocess()
        if self.args.world_size > 1:
            raise PrivacyError(
                f"DPO on {self.args.world_size} ranks: TRL gathers metrics for every pair, and ranks have different "
                "numbers of pairs in a draw: they would wait for each other",
                remedy="train on one device; adapters (peft_config) and gradient_accumulation_steps keep it small",
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the DPOTrainer.

        Raises:
            PrivacyError: arguments that were changed to what cannot be had.
        """
        refuse_config(self.args)
        _refuse_shared(self)
        return super().train(*args, **kwargs)

    def _step_losses(self) -> StepLosses:
        if type(self).per_example_loss is not DPTrainerMixin.per_example_loss:
            raise PrivacyError(
                "per_example_loss of a DPDPOTrainer was overridden, and it would not be called",
                remedy="choose among TRL's losses by loss_type and loss_weights",
            )
        return _PairLosses(self)

    def _trained_module(self) -> nn.Module:
        return Pairs(self.model, self.use_weighting)  # type: ignore[arg-type]


def _refuse_shared(trainer: Any) -> None:
    """A reference that moves with the model is none."""
    if trainer.ref_model is None:
        return
    trained = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    name = next((n for n, p in trainer.ref_model.named_parameters() if id(p) in trained), None)
    if name is not None:
        raise PrivacyError(
            f"parameter {name!r} of ref_model is one of the model that is trained",
            remedy="give ref_model a copy of its own (copy.deepcopy), or leave it out",
        )


class _PairLosses(StepLosses):
    """Losses of pairs: for each pair what TRL computes for a batch that holds it alone."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer.model, [], self._refuse, None)
        self._trainer = trainer

    @staticmethod
    def _refuse(*_: Any) -> Tensor:
        raise NotImplementedError

    def _rows(self, private_model: Any, inputs: dict[str, Any], real: Tensor, checks: bool) -> tuple[Tensor, Any]:
        rows = {name: inputs.pop(name) for name in OF_MODEL}
        if checks:
            self._compare_pair(rows, inputs, int(real.int().argmax()))
        reference = self._reference(rows)
        outputs = private_model(**rows)
        values = [
            self._loss(i, rows, inputs, outputs, reference) if there else outputs["log_probs"][i].sum() * 0
            for i, there in enumerate(real.tolist())
        ]
        return torch.stack(values).float(), outputs

    def _reference(self, rows: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """Log-probabilities by the frozen model; None where TRL has them already."""
        trainer = self._trainer
        if trainer.precompute_ref_logps:
            return None
        separate, model = trainer.ref_model, trainer.model
        adapters = contextlib.nullcontext()
        if separate is None:
            adapters = use_adapter(model, "ref" if "ref" in model.peft_config else None)
        with torch.no_grad(), adapters:
            return Pairs(model if separate is None else separate)(**rows)

    def _loss(
        self,
        row: int,
        rows: Mapping[str, Tensor],
        known: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        reference: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """Of one pair."""
        one = {name: value[row] for name, value in rows.items()}
        one |= {name: value[row : row + 1] for name, value in known.items()}
        with _aside(self._trainer):
            self._trainer.model = _Nothing()
            self._trainer.ref_model = None if reference is None else _answers(reference, row)
            return self._trainer.compute_loss(_answers(outputs, row), one)

    def _compare_pair(self, rows: Mapping[str, Tensor], known: Mapping[str, Tensor], row: int) -> None:
        """With what TRL computes from the model itself.

        Raises:
            UnsupportedGraphError: its log-probabilities are not those of the logits.
        """
        model, trainer = self.model, self._trainer
        training = [module for module in model.modules() if module.training]
        one = {name: value[row : row + 1] for name, value in rows.items()}
        devices = [p.device for p in model.parameters() if p.is_cuda][:1]
        try:
            model.eval()
            with torch.no_grad(), torch.random.fork_rng(devices):
                found = Pairs(model, trainer.use_weighting)(**one)
                ours = self._loss(0, one, {n: v[row : row + 1] for n, v in known.items()}, found, self._reference(one))
                theirs = {name: of_trl(value) for name, value in one.items()}
                theirs |= {name: value[row : row + 1] for name, value in known.items()}
                with _aside(trainer):
                    own = trainer.compute_loss(model, theirs)
        finally:
            for module in training:
                module.training = True
            losses.without_input_gradients(model)  # TRL switches checkpoints off and on again
        rounding = 2e-2 if trainer.args.bf16 or trainer.args.bf16_full_eval else 1e-3
        if not own.isnan() and not torch.allclose(own.float(), ours.float(), rtol=rounding, atol=rounding / 10):
            raise UnsupportedGraphError(
                f"the loss of one pair is {float(own):.6g} by TRL and {float(ours):.6g} from the logits of "
                f"{type(losses.without_adapters(model)).__name__}",
                remedy="write the loop with make_private, with a loss from what the model returns",
            )


class _Nothing(nn.Module):
    """What stands for the trainer's model: nothing but what TRL's loss asks of it."""

    is_gradient_checkpointing = False


def _answers(outputs: Mapping[str, Tensor], row: int) -> Any:
    """What stands for a model in TRL's loss: it has answered already."""
    of_pair = {name: value[row] for name, value in outputs.items()}
    nothing = torch.zeros_like(of_pair["log_probs"], requires_grad=False)
    shown = {"entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool(), "aux_loss": None}

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(**of_pair, **shown)

    return model


@contextlib.contextmanager
def _aside(trainer: Any) -> Iterator[None]:
    """TRL's loss notes metrics of the batch, which are not private: they are forgotten."""
    names = ("_metrics", "_total_train_tokens", "model", "ref_model")
    before = {name: getattr(trainer, name) for name in names}
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)
