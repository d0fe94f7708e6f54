"""Losses with one value per example, for models whose own loss is a mean over what the whole batch holds.

``F.cross_entropy`` with its default mean divides by the number of targets that count *in the batch*: then the share of
one example depends on the others, and its gradient is not its own. These divide by the example's own number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpcompile.kernels.head import head_losses

__all__ = [
    "per_example_causal_lm",
    "per_example_cross_entropy",
    "per_example_linear_causal_lm",
    "per_example_linear_cross_entropy",
    "per_example_load_balancing",
]


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
    return _of_examples(
        F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options), labels, ignore_index, divide_by
    )


def _of_examples(flat: Tensor, labels: Tensor, ignore_index: int, divide_by: float | None) -> Tensor:
    """From the losses of all positions, one after the other, to those of examples."""
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


def per_example_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    divide_by: float | None = None,
) -> Tensor:
    """``per_example_cross_entropy(F.linear(hidden, weight, bias), labels)`` without the logits: ``[B]``.

    Logits of a large vocabulary are the largest tensor of a fine-tune. Here they are made for a part of the classes at
    a time, forward and backward, and so are the norm and the clipped sum of ``weight``'s gradient, which may be tied to
    an embedding. To be called within the private model, as ``weight`` is a parameter of it. Memory is won, and time
    lost: a private step makes the logits four times in place of once.

    Under autocast the product is in its dtype. Logits are added up in float32.

    Args:
        hidden: ``[B, *positions, D]``, what the last layer is given.
        weight: ``[classes, D]``, of the last layer.
        labels: ``[B, *positions]``, class numbers; positions with ``ignore_index`` do not count.
        bias: ``[classes]``, of the last layer.
        ignore_index: as in :func:`per_example_cross_entropy`.
        divide_by: as in :func:`per_example_cross_entropy`.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
        IndexError: a label that is no class, on CPUs; elsewhere the example's loss is NaN.
    """
    if hidden.ndim != labels.ndim + 1 or hidden.shape[:-1] != labels.shape or not labels.ndim:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)} do not belong together: hidden has the "
            "features as one more, last dimension"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and the layer {tuple(weight.shape)} do not belong together: weight is "
            "[classes, features], bias [classes]"
        )
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    elif hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight is {weight.dtype}: cast one of them, or use autocast")
    flat, _ = head_losses(hidden.flatten(0, -2), weight, bias, labels.flatten(), ignore_index)
    return _of_examples(flat, labels, ignore_index, divide_by)


def per_example_linear_causal_lm(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    divide_by: float | None = None,
) -> Tensor:
    """:func:`per_example_causal_lm` without the logits: ``[B]``.

    For a Hugging Face decoder ``lm``, in a module that is made private as a whole:
    ``per_example_linear_causal_lm(lm.model(ids).last_hidden_state, lm.get_output_embeddings().weight, ids)``.

    Args:
        hidden: ``[B, T, D]``.
        weight: ``[vocabulary, D]``; it may be the embedding's.
        labels: ``[B, T]``, as in :func:`per_example_causal_lm`.
        bias: as in :func:`per_example_linear_cross_entropy`.
        ignore_index: as in :func:`per_example_cross_entropy`.
        divide_by: as in :func:`per_example_cross_entropy`.

    Raises:
        ValueError: shapes or dtypes that do not belong together, or fewer than two positions.
        IndexError: see :func:`per_example_linear_cross_entropy`.
    """
    if labels.ndim != 2 or labels.shape[1] < 2:
        raise ValueError(f"labels must be [B, T] with T of 2 or more, not {list(labels.shape)}")
    shifted = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
    options: dict[str, Any] = {"bias": bias, "divide_by": divide_by}
    return per_example_linear_cross_entropy(hidden, weight, shifted, ignore_index=ignore_index, **options)


def per_example_load_balancing(
    router_logits: Tensor | Sequence[Tensor], batch: int, top_k: int, mask: Tensor | None = None
) -> Tensor:
    """How unevenly every example's own tokens are spread over the experts: ``[B]``, 1 where they are spread evenly.

    The auxiliary loss of Fedus et al. 2022 (arXiv:2101.03961, equation 4), for ``top_k`` experts a token, with the
    fractions f and P taken over the tokens of one example in place of the batch: E sum_e f_e P_e. Add its ``.mean()``,
    times a factor, to the loss.

    Args:
        router_logits: ``[B * T, E]`` or ``[B, T, E]``, of one layer or a list of several, whose tokens count alike.
        batch: B.
        top_k: how many experts a token goes to.
        mask: ``[B, T]``, 0 for tokens that do not count.

    Raises:
        ValueError: logits that are not those of ``batch`` examples.
    """
    layers = [router_logits] if isinstance(router_logits, Tensor) else list(router_logits)
    if not layers or any(x.ndim < 2 or x.shape[:-1].numel() % batch for x in layers):
        raise ValueError(f"router_logits must be [B * T, experts] of B = {batch} examples, of one layer or more")
    logits = torch.cat([x.reshape(batch, -1, x.shape[-1]) for x in layers], 1).float()
    experts = logits.shape[-1]
    counts = torch.ones_like(logits[..., :1]) if mask is None else mask.repeat(1, len(layers)).unsqueeze(-1).float()
    tokens = counts.sum(1).clamp_min(1)
    probabilities = (logits.softmax(-1) * counts).sum(1) / tokens
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(top_k, -1).indices, 1.0)
    return experts * ((chosen * counts).sum(1) / tokens * probabilities).sum(1) / top_k
