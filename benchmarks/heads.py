"""``python -m benchmarks.heads``: the head of a language model without its logits, private and not.

A layer before the head, and the head with its loss, per example. By turns in one process: the logits as a whole,
compiled; torch's own chunked loss, eager, where this torch has it; our loss, not private, compiled; private with the
logits; private without. Losses and weights' gradients are compared first, private ones with each other. Prints medians
of seconds, and the peak of what a step allocates, over the least of the non-private ones without logits.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import describe_machine
from benchmarks.markdown import markdown
from benchmarks.measure import interleaved, peak_allocated
from dpcompile import dp_compile
from dpcompile.losses import per_example_cross_entropy, per_example_linear_cross_entropy

SHAPES = [(2, 2048, 256, 128_000), (8, 128, 768, 50_257)]
SMALL = [(2, 16, 8, 300)]


class Head(nn.Module):
    """A layer, and a head with its loss; ``how`` says what becomes of the logits: "whole", "chunks", "ours"."""

    def __init__(self, width: int, classes: int, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head, self.how = nn.Linear(width, width), nn.Linear(width, classes, bias=False), how

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """``[B, T, D]`` and ``[B, T]`` to ``[B]``, or to their mean."""
        hidden = self.layer(x)
        if self.how == "ours":
            return per_example_linear_cross_entropy(hidden, self.head.weight, labels)
        if self.how == "whole":
            return per_example_cross_entropy(self.head(hidden), labels)
        options: dict[str, Any] = {"options": nn.LinearCrossEntropyOptions()}  # type: ignore[attr-defined]
        return F.linear_cross_entropy(hidden.flatten(0, 1), self.head.weight, labels.flatten(), **options)  # type: ignore[attr-defined]


def steps_of(sizes: tuple[int, int, int, int]) -> dict[str, Callable[[], list[Tensor]]]:
    """Every way's step: it gives the loss, the gradients and, where it is private, the norms."""
    batch, positions, width, classes = sizes
    x, labels = torch.randn(batch, positions, width), torch.randint(0, classes, (batch, positions))
    ways: dict[str, Any] = {"logits": torch.compile(Head(width, classes, "whole"))}
    if hasattr(nn, "LinearCrossEntropyOptions"):
        ways["torch's chunks"] = Head(width, classes, "chunks")
    ways["ours"] = torch.compile(Head(width, classes, "ours"))
    ways["logits, private"] = dp_compile(Head(width, classes, "whole"), max_grad_norm=0.1)
    ways["ours, private"] = dp_compile(Head(width, classes, "ours"), max_grad_norm=0.1)

    def step(model: Any) -> list[Tensor]:
        model.zero_grad()
        loss = model(x, labels).mean()
        loss.backward()
        norms = [model.grad_norms] if hasattr(model, "grad_norms") else []
        return [loss.detach(), *(p.grad for p in model.parameters()), *norms]

    return {name: lambda model=model: step(model) for name, model in ways.items()}


def measure(sizes: tuple[int, int, int, int], repeats: int) -> list[list[str]]:
    """The rows of the table for B, T, D, V."""
    steps = steps_of(sizes)
    first = {name: [x.clone() for x in step()] for name, step in steps.items()}
    for kind in (", private", ""):
        others = [v for k, v in first.items() if k.endswith("private") == bool(kind)]
        for found in others:
            for ours, other in zip(found, others[0], strict=True):
                torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    peaks = {name: peak_allocated(step) for name, step in steps.items()}
    times = interleaved(list(steps.values()), repeats=repeats)
    medians = {name: statistics.median(t) for name, t in zip(steps, times, strict=True)}
    base = [k for k in steps if k in ("torch's chunks", "ours")]
    memory, seconds = min(peaks[k] for k in base), min(medians[k] for k in base)
    shape = " x ".join(map(str, sizes))
    return [
        [shape, k, f"{medians[k]:.2f}", f"{seconds / medians[k]:.2f}", f"{peaks[k] / 2**20:.0f}",
         f"{peaks[k] / memory:.2f}"] for k in steps
    ]  # fmt: skip


def main() -> None:
    """Print the machine and the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.heads", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="sizes that show nothing, to try the command")
    asked = parser.parse_args()
    machine = describe_machine(torch.get_num_threads())
    print(f"{machine['cpu']}, {machine['threads']} threads, torch {torch.__version__}; medians")
    head = ["B x T x D x V", "way", "s", "of the best without logits", "peak, MiB", "over the least without logits"]
    rows = [row for sizes in (SMALL if asked.small else SHAPES) for row in measure(sizes, asked.repeats)]
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
