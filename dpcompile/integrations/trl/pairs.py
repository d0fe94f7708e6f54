"""A pair of a chosen and a rejected answer as one example: its rows in a batch, and the model that reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpcompile.errors import PrivacyError

__all__ = ["OF_MODEL", "PairRows", "Pairs", "of_trl"]

OF_MODEL = ("input_ids", "attention_mask", "completion_mask")
_REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")


class PairRows:
    """TRL's collation with a row for each pair.

    Args:
        collate_fn: pairs to tensors ``[2B, T]``, the chosen ones first.
    """

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """Tensors ``[B, 2, T]``, and those of the reference ``[B]``.

        Raises:
            PrivacyError: it returns something else.
        """
        batch, count = dict(self.collate_fn(items)), len(items)
        rows: dict[str, Tensor] = {}
        for name, value in batch.items():
            two = name in OF_MODEL and len(value) == 2 * count
            if not two and not (name in _REFERENCES and value.shape == (count,)):
                raise PrivacyError(
                    f"the data collator returns {name!r}, {list(getattr(value, 'shape', ()))} for {count} pairs: whose "
                    "it is is not known",
                    remedy=f"let it return {', '.join(OF_MODEL)} with 2 rows for each pair, the chosen ones first, or "
                    "leave data_collator out",
                )
            rows[name] = torch.stack(value.chunk(2), 1) if two else value
        return rows


def of_trl(rows: Tensor) -> Tensor:
    """``[B, 2, T]`` as TRL has it, ``[2B, T]``, the chosen ones first."""
    return rows.transpose(0, 1).flatten(0, 1)


class Pairs(nn.Module):
    """A causal language model on both answers of each pair.

    Args:
        model: it.
        squares: whether log Σ p² over the vocabulary is needed too.
    """

    def __init__(self, model: nn.Module, squares: bool = False) -> None:
        super().__init__()
        self.model, self.squares = model, squares

    def forward(self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> dict[str, Tensor]:
        """Of each token behind the first its log-probability, 0 outside of the answers.

        Args:
            input_ids: ``[B, 2, T]``.
            attention_mask: likewise.
            completion_mask: likewise.

        Returns:
            ``log_probs``, and ``log_sum_sq_probs`` if asked for, ``[B, 2, T - 1]`` in float32.
        """
        ids, length = input_ids.flatten(0, 1), input_ids.shape[2]
        outputs = self.model(input_ids=ids, attention_mask=attention_mask.flatten(0, 1), use_cache=False)
        # Behind the virtual tokens that adapters may put before a prompt.
        logits = outputs.logits[:, outputs.logits.shape[1] - length : -1].float().log_softmax(-1)
        picked = logits.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        counts, shape = completion_mask[:, :, 1:] != 0, (*input_ids.shape[:2], length - 1)
        found = {"log_probs": picked.reshape(shape).where(counts, 0.0)}
        if self.squares:
            squares = (2 * logits.detach()).logsumexp(-1)
            found["log_sum_sq_probs"] = squares.reshape(shape).where(counts, 0.0)
        return found
