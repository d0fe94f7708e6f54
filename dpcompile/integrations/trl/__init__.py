"""TRL's trainers with private training, ``DPSFTTrainer`` and ``DPDPOTrainer``, and ``PrivacyArguments`` for them."""

from dpcompile.integrations.transformers.arguments import PrivacyArguments
from dpcompile.integrations.trl.dpo import DPDPOTrainer
from dpcompile.integrations.trl.sft import DPSFTTrainer

__all__ = ["DPDPOTrainer", "DPSFTTrainer", "PrivacyArguments"]
