"""``python -m benchmarks.products``: what per-example products cost on a CPU besides the products.

Prints milliseconds: one summed product by torch and by oneDNN, the same work example by example by torch, into fresh
memory and into memory that stays mapped, and by oneDNN into the latter, and the squared norms of the result by
Inductor's own reduction and by ours.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.machine import describe_machine
from benchmarks.markdown import markdown
from benchmarks.measure import interleaved
from dpcompile.norms.product_op import squared_norms
from dpcompile.norms.products import own_product
from dpcompile.onednn import multiply_
from dpcompile.workspace import Workspace

SHAPES = [(16, 197, 384, 384), (16, 197, 1536, 384), (8, 256, 512, 2048), (8, 256, 8192, 512)]


def measure(sizes: tuple[int, int, int, int], repeats: int) -> list[str]:
    """A row of the table for B, T, P, D."""
    batch, positions, p, d = sizes
    rows, cols = torch.randn(batch, positions, p), torch.randn(batch, positions, d)
    work = Workspace()
    products = torch.bmm(rows.mT, cols)
    reduced = torch.compile(lambda x: x.square().reshape(len(x), -1).sum(1), dynamic=False)
    torch.testing.assert_close(own_product(rows.mT, cols), products, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(reduced(products), squared_norms(products), rtol=1e-4, atol=0)
    steps = [
        lambda: torch.mm(rows.view(-1, p).mT, cols.view(-1, d)),
        lambda: own_product(rows.view(-1, p).mT, cols.view(-1, d)),
        lambda: torch.bmm(rows.mT, cols),
        lambda: torch.bmm(rows.mT, cols, out=work.take((batch, p, d), rows)),
        lambda: multiply_(rows.mT, cols, out=work.take((batch, p, d), rows)),
        lambda: reduced(products),
        lambda: squared_norms(products),
    ]
    times = interleaved(steps, repeats=repeats)
    return [" x ".join(map(str, sizes)), *(f"{1e3 * statistics.median(t):.2f}" for t in times)]


def main() -> None:
    """Print the machine and the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.products", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    asked = parser.parse_args()
    machine = describe_machine(torch.get_num_threads())
    print(f"{machine['cpu']}, {machine['threads']} threads, torch {torch.__version__}; medians, milliseconds")
    rows = [measure(sizes, asked.repeats) for sizes in SHAPES]
    head = [
        "B x T x P x D", "summed, torch", "summed, oneDNN", "each, fresh", "each, mapped", "each, oneDNN",
        "norms, Inductor", "norms, ours",
    ]  # fmt: skip
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
