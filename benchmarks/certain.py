"""``python -m benchmarks.certain``: what it costs that norms are certain, and how many examples are done again.

Of the layers of transformers: milliseconds of the ghost norm by float32 products without any bound and by ours, of
every example's product with a float32 norm and by ours, and both differences as a part of the layer's own three
products (forward and backward). Of two small models at the first step and after some of training, for every rule: the
share of examples, over all parameters, that are done again. Processor time, the least of several runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpcompile
from benchmarks.machine import describe_machine
from benchmarks.markdown import markdown
from dpcompile.kernels import filter_op, gram, norms_torch
from dpcompile.kernels.fused_rates import unfused_ghost
from dpcompile.kernels.product_op import product_with_norms
from dpcompile.kernels.products import own_product
from dpcompile.kernels.rounding import CLOSE
from dpcompile.norms.ghost import Sides, ghost
from dpcompile.planning.choices import panels_of

SHAPES = [(16, 64, 768, 768), (8, 128, 768, 3072), (16, 197, 384, 1536), (8, 256, 512, 2048), (2, 1024, 768, 768)]


def seconds(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """The least processor time of each, by turns."""
    for call in calls:
        call()
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for i, call in enumerate(calls):
            start = time.process_time()
            call()
            best[i] = min(best[i], time.process_time() - start)
    return best


def measure(sizes: tuple[int, int, int, int], repeats: int) -> list[str]:
    """A row of the table for B, T, P, D."""
    batch, positions, p, d = sizes
    rows, cols, weight = torch.randn(batch, 1, positions, p), torch.randn(batch, 1, positions, d), torch.randn(p, d)
    flat_rows, flat_cols, panels = rows.view(-1, p), cols.view(-1, d), panels_of(positions)

    def layer() -> None:
        for a, b in ((flat_rows, weight), (flat_cols, weight.T), (flat_rows.T, flat_cols)):
            torch.mm(a, b)

    def products() -> Tensor:
        each = own_product(rows.mT.contiguous(), cols)
        return torch.linalg.vector_norm(each, dim=3).square().sum((1, 2))

    times = seconds(
        [
            layer,
            lambda: unfused_ghost(rows, cols),
            lambda: ghost([Sides(rows, cols)], panels),
            products,
            lambda: product_with_norms(rows, cols, True),
        ],
        repeats,
    )
    parts = [f"{100 * (after - before) / times[0]:+.1f} %" for before, after in (times[1:3], times[3:])]
    return [" x ".join(map(str, sizes)), *(f"{1e3 * t:.2f}" for t in times), *parts]


class Text(nn.Module):
    """A causal transformer of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(64, 64), nn.Parameter(torch.randn(48, 64) / 8)
        block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks, self.head = nn.TransformerEncoder(block, 2, enable_nested_tensor=False), nn.Linear(64, 64)

    def forward(self, words: Tensor) -> Tensor:  # noqa: D102
        h = self.table(words) + self.places
        return self.head(self.blocks(h, nn.Transformer.generate_square_subsequent_mask(48), is_causal=True))


def text() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """It predicts the next of words that follow a rule."""
    words = (torch.randint(0, 64, (16, 1)) + 3 * torch.arange(49)) % 64
    return Text(), words[:, :-1], lambda out: F.cross_entropy(out.mT, words[:, 1:], reduction="none").mean(1).mean()


def images() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """Two convolutions and two layers."""
    body = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)]
    labels = torch.randint(0, 10, (16,))
    return nn.Sequential(*body), torch.randn(16, 3, 16, 16), lambda out: F.cross_entropy(out, labels)


@contextmanager
def counted(found: list[int]) -> Iterator[None]:
    """Count the norms that are looked at, and those that are done again."""
    modules: list[Any] = [gram, norms_torch, filter_op]
    before = gram.settled

    def settled(squared: Tensor, slack: Tensor, sizes: Tensor, redo: Any) -> Tensor:
        found[0] += len(squared)
        found[1] += int((~(slack <= CLOSE * squared)).sum())
        return before(squared, slack, sizes, redo)

    for module in modules:
        module.settled = settled
    try:
        yield
    finally:
        for module in modules:
            module.settled = before


def share(make: Callable[[], Any], norm: str, steps: int) -> list[str]:
    """Of the norms at the first step, and at the last of some."""
    torch.manual_seed(0)
    model, inputs, loss = make()
    private: Any = dpcompile.dp_compile(model, norm=norm, backend="eager")
    optimizer, shares = torch.optim.Adam(private.parameters(), 3e-3), []
    for step in range(steps):
        found = [0, 0]
        with counted(found):
            private.zero_grad()
            loss(private(inputs)).backward()
        optimizer.step()
        if step in (0, steps - 1):
            shares.append(f"{found[1]} of {found[0]}")
    return [make.__name__, norm, *shares]


def main() -> None:
    """Print the machine and the tables."""
    parser = argparse.ArgumentParser("python -m benchmarks.certain", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=40)
    asked = parser.parse_args()
    machine = describe_machine(torch.get_num_threads())
    print(f"{machine['cpu']}, {machine['threads']} threads, torch {torch.__version__}; milliseconds of processor time")
    head = [
        "B x T x P x D", "layer", "ghost, float32", "ghost, ours", "each, float32", "each, ours", "ghost, of a layer",
        "each, of a layer",
    ]  # fmt: skip
    print(markdown(head, [measure(sizes, asked.repeats) for sizes in SHAPES]), flush=True)
    rows = [share(make, norm, asked.steps) for make in (text, images) for norm in ("ghost", "redo", "direct")]
    print(markdown(["model", "rule", "done again, first step", f"done again, step {asked.steps}"], rows))


if __name__ == "__main__":
    main()
