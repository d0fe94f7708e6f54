"""The advice itself: numbers, what each is for, and a page of plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpcompile.accounting.sweeps import SweepCost
from dpcompile.advising.physical import PhysicalBatch

__all__ = ["Advice"]

_WIDTH = 100


@dataclass(frozen=True)
class Advice:
    """What to begin with. ``print`` it: it says why.

    Attributes:
        dataset_size: n.
        target_epsilon: of all ``runs`` together.
        target_delta: likewise.
        batch_size: expected, of a logical step: of the DataLoader.
        epochs: passes over the data.
        steps: logical steps of them.
        noise_multiplier: sigma of each run.
        epsilon: of each run; the target, if there is one run.
        max_grad_norm: C.
        learning_rate: to begin with.
        optimizer: for which it is: "adam" or "sgd".
        runs: trainings on the same data that the target is for.
        physical_batch: what fits in memory; None: nobody asked.
        sweep: what 1, 2, 4, 8 and 16 trainings of this noise cost.
        reasons: name of a number -> why it is that.
        settings: keyword arguments of :func:`dpcompile.make_private`, beside model, optimizer and loader.
    """

    dataset_size: int
    target_epsilon: float
    target_delta: float
    batch_size: int
    epochs: int
    steps: int
    noise_multiplier: float
    epsilon: float
    max_grad_norm: float
    learning_rate: float
    optimizer: str
    runs: int
    physical_batch: PhysicalBatch | None
    sweep: Sequence[SweepCost]
    reasons: Mapping[str, str]
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        values = {
            "batch size": f"{self.batch_size}",
            "length": f"{self.epochs} epochs, {self.steps:,} steps",
            "noise multiplier": f"{self.noise_multiplier:.4g}",
            "C": f"{self.max_grad_norm:g}",
            "learning rate": f"{self.learning_rate:g} ({self.optimizer})",
        }
        if self.physical_batch is not None:
            values["physical batch"] = f"{self.physical_batch.rows} rows"
        whole = "" if self.runs == 1 else f" for {self.runs} runs together"
        lines = [
            f"{self.dataset_size:,} examples, epsilon {self.target_epsilon:g} at delta {self.target_delta:g}{whole}",
            "",
        ]
        for name, value in values.items():
            lines.append(f"{name}: {value}")
            lines += textwrap.wrap(self.reasons[name], _WIDTH, initial_indent="    ", subsequent_indent="    ")
        lines += ["", "looks at the data", *_wrapped(self.reasons["looks"]), ""]
        lines.append("    runs  all of them seen  a random number, the best alone seen")
        lines += [f"    {c.runs:4}  {c.composed:16.3f}  {c.random_number:36.3f}" for c in self.sweep]
        given = ", ".join(f"{k}={v!r}" for k, v in self.settings.items())
        lines += [
            "",
            f"loader = DataLoader(dataset, batch_size={self.batch_size}), and then",
            *_wrapped(f"make_private(model, optimizer, loader, {given})"),
        ]
        return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="    ", subsequent_indent="    ", break_long_words=False)
