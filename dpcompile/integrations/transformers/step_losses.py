"""The loss of a step: of each example by itself, compared with the model's own, and what of it is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dpcompile.distributed.ranks import any_rank, summed
from dpcompile.errors import UnsupportedGraphError
from dpcompile.integrations.transformers import losses
from dpcompile.integrations.transformers.draws import REAL

__all__ = ["StepLosses"]

_COMPARED = 2  # steps of a run: after the first the weights are no longer those of an initialisation


class StepLosses:
    """Losses of physical batches, for the backward and for the log.

    Args:
        model: the ordinary model.
        label_names: what of a batch is labels.
        per_example: outputs and labels to losses ``[B]``.
        source: what to call that function in messages; None: the losses are of the model's head, and compared with
            what the model computes itself.

    **Guarantee.** The loss that is differentiated is a mean of one loss for each row of the batch. Of the model's head
    each is a function of the outputs and labels of its own row.
    """

    def __init__(
        self,
        model: Any,
        label_names: list[str],
        per_example: Callable[[Any, Mapping[str, Tensor]], Any],
        source: str | None,
    ) -> None:
        self.model, self.label_names, self.per_example, self.source = model, label_names, per_example, source
        self._compared, self._due = 0, True
        self._total, self._count, self._last = 0.0, 0, 0.0

    def of(self, private_model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """The mean loss of a batch's rows, for the backward, and the outputs."""
        inputs = dict(inputs)
        real: Tensor = inputs.pop(REAL)
        checks = self._due and any_rank(bool(real.any()))  # of FSDP's shards all ranks run the model, or none
        values, outputs = self._rows(private_model, inputs, real, checks)
        self._compared, self._due = self._compared + checks, self._due and not checks
        self._total += float(values.detach().double()[real].sum())
        self._count += int(real.sum())
        return values.where(real, 0.0).mean(), outputs  # a padding row's loss may be no number

    def _rows(self, private_model: Any, inputs: dict[str, Any], real: Tensor, checks: bool) -> tuple[Tensor, Any]:
        """A loss for each row, and the outputs; ``checks``: whether they are compared with the model's own."""
        labels = {name: inputs.pop(name) for name in self.label_names if inputs.get(name) is not None}
        if checks and self.source is None:
            self._compare(inputs, labels, int(real.int().argmax()))
        outputs = private_model(**self._with_decoder_inputs(inputs, labels))
        values = losses.check_rows(self.per_example(outputs, labels), len(real), self.source or "per_example_loss")
        if checks and self.source is not None:
            losses.check_unmixed(values, outputs, self.source)
        return values, outputs

    def shown(self, device: torch.device | None = None) -> float:
        """The mean over the examples of the step that is over; of one without examples, of the step before.

        Args:
            device: where collectives work; every rank must call this.
        """
        total, count = summed(torch.tensor([self._total, self._count], dtype=torch.float64, device=device)).tolist()
        if count:
            self._last = total / count
        self._total, self._count, self._due = 0.0, 0, self._compared < _COMPARED
        return self._last

    def _compare(self, inputs: Mapping[str, Any], labels: Mapping[str, Tensor], row: int) -> None:
        if not labels:
            raise UnsupportedGraphError(
                f"a batch has none of the labels {self.label_names}",
                remedy="let the data collator return labels, say what they are called in "
                "TrainingArguments(label_names=), or give compute_loss_func=",
            )
        losses.check_own_loss(self.model, inputs, labels, row)

    def _with_decoder_inputs(self, inputs: dict[str, Any], labels: Mapping[str, Tensor]) -> dict[str, Any]:
        """With what an encoder-decoder makes of labels for its decoder, where the collator has not."""
        base = losses.without_adapters(self.model)
        given = {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs)
        if not getattr(getattr(base, "config", None), "is_encoder_decoder", False) or given or "labels" not in labels:
            return inputs
        shift = getattr(base, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            raise UnsupportedGraphError(
                f"{type(base).__name__} makes its decoder's inputs of the labels, in a way that is not known",
                remedy="let the data collator return decoder_input_ids",
            )
        return {**inputs, "decoder_input_ids": shift(labels=labels["labels"])}
