"""``transformers.Trainer`` with private training: ``DPTrainer``, and ``PrivacyArguments`` for what it needs to know."""

from dpcompile.integrations.transformers.arguments import PrivacyArguments
from dpcompile.integrations.transformers.trainer import DPSeq2SeqTrainer, DPTrainer, DPTrainerMixin

__all__ = ["DPSeq2SeqTrainer", "DPTrainer", "DPTrainerMixin", "PrivacyArguments"]
