"""Losses with one value per example, for models whose own loss is a mean over what the whole batch holds.

``F.cross_entropy`` with its default mean divides by the number of targets that count *in the batch*: then the share of
one example depends on the others, and its gradient is not its own. These divide by the example's own number.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["per_example_causal_lm", "per_example_cross_entropy"]


def per_example_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    divide_by: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of every example, a mean over its own positions: ``[B]``, in float32 or wider.

    For masked language models, sequence-to-sequence models, tagging (``T`` positions), segmentation, and plain
    classification (no positions). Take ``.mean()`` of it.

    Args:
        logits: ``[B, *positions, classes]``.
        labels: ``[B, *positions]``, class numbers; positions with ``ignore_index`` do not count.
        ignore_index: what marks a position that does not count. An example in which none counts has loss 0.
        divide_by: a public constant to divide each example's sum by, in place of its own number of positions; then
            long examples weigh more, as in a mean over all tokens.
        label_smoothing: as in ``F.cross_entropy``.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if logits.ndim != labels.ndim + 1 or logits.shape[:-1] != labels.shape or not labels.ndim:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not belong together: logits have the "
            "classes as one more, last dimension"
        )
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "none"}
    flat = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)
    total = flat.reshape(labels.shape[0], -1).sum(1)
    if divide_by is not None:
        return total / divide_by
    return total / (labels != ignore_index).reshape(labels.shape[0], -1).sum(1).clamp_min(1)


def per_example_causal_lm(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    divide_by: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Next-token cross entropy of every example, a mean over its own tokens: ``[B]``.

    What a Hugging Face decoder computes from ``labels=``, but example by example: position ``t`` predicts the label of
    position ``t + 1``. ``per_example_causal_lm(model(input_ids).logits, input_ids).mean()`` is a training loss.

    Args:
        logits: ``[B, T, vocabulary]``.
        labels: ``[B, T]``, most often the input tokens, with ``ignore_index`` for padding.
        ignore_index: as in :func:`per_example_cross_entropy`.
        divide_by: as in :func:`per_example_cross_entropy`.
        label_smoothing: as in ``F.cross_entropy``.

    Raises:
        ValueError: shapes that do not belong together, or fewer than two positions.
    """
    if labels.ndim != 2 or labels.shape[1] < 2:
        raise ValueError(f"labels must be [B, T] with T of 2 or more, not {list(labels.shape)}")
    options: dict[str, Any] = {"divide_by": divide_by, "label_smoothing": label_smoothing}
    return per_example_cross_entropy(logits[:, :-1], labels[:, 1:], ignore_index=ignore_index, **options)
