"""``DPSFTTrainer``: TRL's ``SFTTrainer`` whose steps are private."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl.trainer.sft_trainer import SFTTrainer

from dpcompile.errors import PrivacyError
from dpcompile.integrations.transformers import DPTrainerMixin
from dpcompile.integrations.transformers.step_losses import StepLosses
from dpcompile.integrations.trl.refusals import refuse_config, refuse_made

__all__ = ["DPSFTTrainer"]


class DPSFTTrainer(DPTrainerMixin, SFTTrainer):
    """:class:`trl.SFTTrainer` with private steps.

    All of :class:`dpcompile.integrations.transformers.DPTrainerMixin` holds. A row of the prepared dataset is an
    example. Its loss is the mean over its own tokens that count, those of the completion or of the assistant where TRL
    says so, not a share of all tokens of the batch. Entropy and token accuracy are computed in evaluation only: of
    training batches they are not private, and are not logged. The logits are made whole, not in chunks.

    Args:
        *args: of the SFTTrainer.
        privacy: target or sigma, and the rest.
        **kwargs: of the SFTTrainer.

    Raises:
        PrivacyError: ``packing``, ``padding_free``, ``activation_offloading``, ``compute_loss_func``, a load-balancing
            loss, images; or what ``DPTrainer`` refuses.

    **Guarantee.** As of ``DPTrainerMixin``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for given in (*args, *kwargs.values()):
            refuse_config(given)
        super().__init__(*args, **kwargs)
        refuse_config(self.args)
        refuse_made(self)
        if self.compute_loss_func is not None:
            raise PrivacyError(
                "compute_loss_func in DPSFTTrainer: TRL takes its result for the loss of a whole batch",
                remedy="override per_example_loss(outputs, labels), which returns one loss for each example",
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the SFTTrainer.

        Raises:
            PrivacyError: arguments that were changed to what cannot be had.
        """
        refuse_config(self.args)
        return super().train(*args, **kwargs)

    def _step_losses(self) -> StepLosses:
        args: Any = self.args
        if args.loss_type == "dft" and type(self).per_example_loss is DPTrainerMixin.per_example_loss:
            return StepLosses(self.model, self.label_names, _dynamic, "loss_type='dft'")
        return super()._step_losses()


def _dynamic(outputs: Mapping[str, Any], labels: Mapping[str, Tensor]) -> Tensor:
    """Tokens weighted by their own probability (Wu et al. 2025, arXiv:2508.05629), a mean for each example: ``[B]``."""
    target = labels["labels"][:, 1:]
    counts = target != -100
    chances = outputs["logits"][:, :-1].float().log_softmax(-1)
    picked = torch.gather(chances, -1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    weighted = (picked.detach().exp() * picked).where(counts, 0.0)
    return -weighted.sum(1) / counts.sum(1).clamp_min(1)
