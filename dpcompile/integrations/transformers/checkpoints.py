"""The state of the draws in a Trainer's checkpoint, beside the optimizer's, which holds noise and accountant."""

from __future__ import annotations

import os

import torch

from dpcompile.data.loader import PoissonLoader
from dpcompile.errors import PrivacyError

__all__ = ["load_draws", "save_draws"]

_DRAWS = "private_loader.pt"
# The Trainer passes over what is not there. Of FSDP the optimizer's state is one file or a folder.
_NEEDED = (("optimizer.pt", "optimizer.bin", "optimizer_0"), ("scheduler.pt",), (_DRAWS,))


def save_draws(loader: PoissonLoader, checkpoint: str) -> None:
    """Write the loader's state, which holds a secret, into the folder of a checkpoint."""
    torch.save(loader.state_dict(), os.path.join(checkpoint, _DRAWS))


def load_draws(loader: PoissonLoader, checkpoint: str) -> None:
    """Go on with the draws of a checkpoint.

    Raises:
        PrivacyError: it is none of a private run, or not whole; or what the loader refuses.
    """
    for names in _NEEDED:
        if not any(os.path.exists(os.path.join(checkpoint, name)) for name in names):
            raise PrivacyError(
                f"{checkpoint} has no {names[0]}: what its steps have cost, and which noise and draws they used, is "
                "not known",
                remedy="resume from a checkpoint that DPTrainer saved with save_only_model=False; to train on from its "
                "weights alone, load them with from_pretrained and account for both runs",
            )
    loader.load_state_dict(torch.load(os.path.join(checkpoint, _DRAWS), weights_only=True))
