"""One loss for each example, by the kind of the model's head.

What a model of Transformers computes from ``labels=`` is a mean over all that the batch holds: over its tokens, for
most. These are means over what one example holds. For a batch of one example both are the same number, and that is
checked against the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpcompile._torch import pytree
from dpcompile._torch.autograd import remove_forward_hooks
from dpcompile.errors import ExampleMixingError, UnsupportedGraphError
from dpcompile.losses import per_example_causal_lm, per_example_cross_entropy

__all__ = [
    "check_own_loss",
    "check_rows",
    "check_unmixed",
    "head_losses",
    "kind_of",
    "without_adapters",
    "without_input_gradients",
]

_BY_LOSS_TYPE = {
    "ForCausalLM": "causal",
    "ForMaskedLM": "tokens",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "span",
    "ForSequenceClassification": "classes",
    "ForImageClassification": "classes",
    "ForVideoClassification": "classes",
    "ForAudioClassification": "classes",
}
_OWN = (
    "give compute_loss_func=, a function of (outputs, labels, num_items_in_batch) that returns one loss for each "
    "example, [B], or override per_example_loss"
)


def without_adapters(model: Any) -> Any:
    """The model that PEFT's adapters are in."""
    get = getattr(model, "get_base_model", None)
    return model if get is None else get()


def without_input_gradients(model: nn.Module) -> None:
    """Take off embeddings what makes their outputs require a gradient, for reentrant checkpoints: no graph holds that.

    Args:
        model: of Transformers, with adapters or without.
    """
    for module in model.modules():
        remove_forward_hooks(module, ("make_inputs_require_grads", "make_inputs_require_grad"))


def kind_of(model: nn.Module, labels: Mapping[str, Tensor], outputs: Mapping[str, Any]) -> str:
    """What the head predicts: "causal" (the next token), "tokens" (at each position), "classes", "regression",
    "labels" (several at once) or "span" (start and end).

    Args:
        model: of Transformers, with adapters or without.
        labels: by name.
        outputs: of the model.

    Raises:
        UnsupportedGraphError: a head of another kind.
    """
    base: Any = without_adapters(model)
    config = getattr(base, "config", None)
    if set(labels) == {"start_positions", "end_positions"} and {"start_logits", "end_logits"} <= set(outputs):
        return "span"
    if set(labels) != {"labels"} or not isinstance(outputs.get("logits"), Tensor):
        raise _unknown(base, f"labels {sorted(labels)} and outputs {sorted(outputs)}")
    target, logits = labels["labels"], outputs["logits"]
    if getattr(config, "is_encoder_decoder", False) and target.ndim == 2 and logits.ndim == 3:
        return "tokens"
    kind = _BY_LOSS_TYPE.get(getattr(base, "loss_type", None) or "")
    if kind in (None, "classes") and logits.ndim == 2:
        return _of_classes(config, target, logits)
    if kind is None and target.ndim == 2 and logits.ndim == 3:
        return "causal"  # what Transformers takes where a class does not say: the check below tells
    if kind in (None, "classes", "span"):
        raise _unknown(base, f"labels {list(target.shape)} and logits {list(logits.shape)}")
    return kind


def _of_classes(config: Any, target: Tensor, logits: Tensor) -> str:
    problem = getattr(config, "problem_type", None)
    if problem is None:
        whole = not target.is_floating_point()
        problem = "regression" if logits.shape[1] == 1 else "single_label_classification" if whole else "multi"
    kinds = {"regression": "regression", "single_label_classification": "classes"}
    return kinds.get(problem, "labels")


def head_losses(
    kind: str, outputs: Mapping[str, Any], labels: Mapping[str, Tensor], label_smoothing: float = 0.0
) -> Tensor:
    """One loss for each example, ``[B]``, in float32 or wider.

    Args:
        kind: of the head (:func:`kind_of`).
        outputs: of the model: ``logits``, or ``start_logits`` and ``end_logits``.
        labels: by name, each with a row for each example; -100 does not count.
        label_smoothing: as in ``F.cross_entropy``; not of numbers and of several labels at once.
    """
    if kind == "span":
        return sum(_place(outputs[f"{end}_logits"], labels[f"{end}_positions"]) for end in ("start", "end")) / 2  # type: ignore[return-value]
    logits, target = outputs["logits"], labels["labels"]
    if kind == "causal":
        return per_example_causal_lm(logits, target, label_smoothing=label_smoothing)
    if kind in ("tokens", "classes"):
        target = target.reshape(logits.shape[:-1])
        return per_example_cross_entropy(logits, target, label_smoothing=label_smoothing)
    if label_smoothing:
        raise UnsupportedGraphError(
            "label_smoothing_factor, and a head that predicts numbers or several labels at once",
            remedy="set label_smoothing_factor=0",
        )
    logits, target = logits.float(), target.float().reshape(logits.shape)
    if kind == "regression":
        return (logits - target).square().flatten(1).mean(1)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).mean(1)


def _place(logits: Tensor, positions: Tensor) -> Tensor:
    """Positions outside the input do not count."""
    length = logits.shape[1]
    return per_example_cross_entropy(logits, positions.reshape(len(logits)).clamp(0, length), ignore_index=length)


def check_own_loss(model: nn.Module, inputs: Mapping[str, Any], labels: Mapping[str, Tensor], row: int) -> None:
    """Compare with what the model itself computes for one example, where the batch is that example.

    Args:
        model: the ordinary model.
        inputs: of a batch, with what the model is called with beside labels.
        labels: by name.
        row: the example.

    Raises:
        UnsupportedGraphError: another loss: a term more, weights, or labels that mean something else.
    """
    of_one = {name: _row(value, row, labels) for name, value in inputs.items()}
    targets = {name: value[row : row + 1] for name, value in labels.items()}
    training = [module for module in model.modules() if module.training]
    devices = [p.device for p in model.parameters() if p.is_cuda][:1]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices):
            outputs: Any = model(**of_one, **targets)
    finally:
        for module in training:
            module.training = True
    if not isinstance(outputs, Mapping) or not isinstance(outputs.get("loss"), Tensor):
        raise _unknown(without_adapters(model), "no loss among its outputs")
    own = outputs["loss"].float()
    rounding = 2e-2 if outputs["loss"].dtype in (torch.bfloat16, torch.float16) else 1e-4
    ours = head_losses(kind_of(model, targets, outputs), outputs, targets).squeeze()
    if own.isnan() or torch.allclose(own, ours, rtol=rounding, atol=1e-5):  # not a number: none of its labels counts
        return
    name = type(without_adapters(model)).__name__
    raise UnsupportedGraphError(
        f"the loss of {name} for one example is not the mean over its own labels: it has other terms, weights, or "
        "another meaning of labels, and cannot be taken example by example from the outputs alone",
        remedy=_OWN,
    )


def _row(value: Any, row: int, labels: Mapping[str, Tensor]) -> Any:
    count = len(next(iter(labels.values())))
    return value[row : row + 1] if _has_rows(value, count) else value


def _has_rows(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == count


def check_rows(losses: Any, count: int, source: str) -> Tensor:
    """One loss for each of ``count`` examples, which depends on the outputs of no other.

    Args:
        losses: what a function of the user returned.
        count: rows of the batch.
        source: what to call the function.

    Raises:
        ExampleMixingError: a number for the whole batch, or another shape.
    """
    if isinstance(losses, Tensor) and losses.shape == (count,):
        return losses
    found = f"a tensor {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
    raise ExampleMixingError(
        f"{source} returned {found} for a batch of {count}: examples that were averaged cannot be clipped one by one",
        remedy=f"return one loss for each example, [{count}] here, each a function of its own outputs and labels: "
        "reduction='none', then a mean over what belongs to one example; num_items_in_batch is None",
    )


def check_unmixed(losses: Tensor, outputs: Any, source: str) -> None:
    """Of the first and the last example, whether their losses depend on the outputs of others.

    Args:
        losses: ``[B]``.
        outputs: of the model.
        source: what to call the function that they are of.

    Raises:
        ExampleMixingError: they do.
    """
    tensors = [t for t in pytree.tree_leaves(outputs) if _has_rows(t, len(losses)) and t.requires_grad]
    for row in {0, len(losses) - 1}:
        slopes = torch.autograd.grad(losses[row], tensors, retain_graph=True, allow_unused=True)
        for slope in slopes:
            if slope is not None and slope.abs().flatten(1).sum(1).index_fill(0, _at(row, slope), 0.0).any():
                raise ExampleMixingError(
                    f"{source} mixes examples: the loss of one changes with the outputs of another",
                    remedy="let each loss be a function of the outputs and labels of its own example: divide by what "
                    "it holds itself, or by a constant",
                )


def _at(row: int, like: Tensor) -> Tensor:
    return torch.tensor([row], device=like.device)


def _unknown(model: Any, found: str) -> UnsupportedGraphError:
    return UnsupportedGraphError(
        f"the loss of {type(model).__name__} is not known example by example ({found})", remedy=_OWN
    )
