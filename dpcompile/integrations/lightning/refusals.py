"""What of a Trainer of Lightning cannot be had with private training, and how many steps it will take."""

from __future__ import annotations

from typing import Any

from dpcompile.errors import PrivacyError

__all__ = ["planned_steps", "refuse_settings"]


def planned_steps(trainer: Any) -> int:
    """That ``fit`` takes, from the first to the last."""
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < float("inf"):
        raise PrivacyError(
            "target_epsilon, and a Trainer without an end: noise is calibrated for a number of steps",
            remedy="give the Trainer max_epochs or max_steps, or DPStrategy(steps=...)",
        )
    return int(steps)


def refuse_settings(trainer: Any) -> None:
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
