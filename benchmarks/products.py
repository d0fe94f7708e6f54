"""``python -m benchmarks.products``: what per-example products cost on a CPU besides the products.

Prints milliseconds. Of matrices: one summed product by torch and by oneDNN, the same work example by example by torch,
into fresh memory and into memory that stays mapped, and by oneDNN into the latter, the squared norms of the result by
Inductor's own reduction and by ours, and its weighted sum by torch and by ours. Of bfloat16 matrices: one summed
product and every example's as torch makes them, rounded to bfloat16, and every example's in float32 with its squared
norm, of widened operands by oneDNN and by our kernel. Of convolutions: the filters' gradient
as the plain step makes it, every example's by torch and by our kernel, and their norms alone. Of embeddings: the
gradient as the plain step makes it, and every example's norm by Gram matrices, by torch's sums by index and by ours.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.machine import describe_machine
from benchmarks.markdown import markdown
from benchmarks.measure import interleaved
from dpcompile.kernels.by_index import sums_and_sizes
from dpcompile.kernels.filter_op import filter_gradients, filter_norms
from dpcompile.kernels.kept import squared_norms, weighted_sums
from dpcompile.kernels.narrow import has_narrow, narrow_products
from dpcompile.kernels.onednn import multiply_
from dpcompile.kernels.products import own_product
from dpcompile.kernels.workspace import Workspace
from dpcompile.norms.ghost import Sides, ghost

WORDS = 8192
TEXTS = [(64, 256, 64), (8, 256, 512), (4, 1024, 256), (8, 1024, 768)]
IMAGES = [(64, 3, 32, 32), (64, 32, 32, 32), (64, 64, 64, 16), (64, 128, 128, 8), (64, 128, 256, 4)]
SHAPES = [(16, 197, 384, 384), (16, 197, 1536, 384), (8, 256, 512, 2048), (8, 256, 8192, 512)]


def measure(sizes: tuple[int, int, int, int], repeats: int) -> list[str]:
    """A row of the table for B, T, P, D."""
    batch, positions, p, d = sizes
    rows, cols = torch.randn(batch, positions, p), torch.randn(batch, positions, d)
    work = Workspace()
    products = torch.bmm(rows.mT, cols)
    weights = torch.rand(1, batch)
    reduced = torch.compile(lambda x: x.square().reshape(len(x), -1).sum(1), dynamic=False)
    torch.testing.assert_close(own_product(rows.mT, cols), products, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(reduced(products).double(), squared_norms(products), rtol=1e-4, atol=0)
    steps = [
        lambda: torch.mm(rows.view(-1, p).mT, cols.view(-1, d)),
        lambda: own_product(rows.view(-1, p).mT, cols.view(-1, d)),
        lambda: torch.bmm(rows.mT, cols),
        lambda: torch.bmm(rows.mT, cols, out=work.take((batch, p, d), rows)),
        lambda: multiply_(rows.mT, cols, out=work.take((batch, p, d), rows)),
        lambda: reduced(products),
        lambda: squared_norms(products),
        lambda: torch.mv(products.view(batch, -1).mT, weights[0]),
        lambda: weighted_sums(weights, [0], [products]),
    ]
    times = interleaved(steps, repeats=repeats)
    return [" x ".join(map(str, sizes)), *(f"{1e3 * statistics.median(t):.2f}" for t in times)]


def measure_narrow(sizes: tuple[int, int, int, int], repeats: int) -> list[str]:
    """A row of the table for B, T, P, D, in bfloat16."""
    batch, positions, p, d = sizes
    rows = torch.randn(batch, positions, p, dtype=torch.bfloat16)
    cols = torch.randn(batch, positions, d, dtype=torch.bfloat16)
    each, rounded, work = torch.empty(batch, p, d), torch.empty(batch, p, d, dtype=torch.bfloat16), Workspace()
    narrow_products(rows, cols, each)
    torch.testing.assert_close(each, own_product(rows.float().mT, cols.float()), rtol=1e-3, atol=1e-3)

    def widened() -> torch.Tensor:
        out = work.take((batch, p, d), each)
        multiply_(rows.float().mT, cols.float(), out=out)
        return squared_norms(out)

    steps = [
        lambda: torch.mm(rows.view(-1, p).mT, cols.view(-1, d)),
        lambda: torch.bmm(rows.mT, cols, out=rounded),
        widened,
        lambda: narrow_products(rows, cols, each),
    ]
    times = interleaved(steps, repeats=repeats)
    return [" x ".join(map(str, sizes)), *(f"{1e3 * statistics.median(t):.2f}" for t in times)]


def measure_filters(sizes: tuple[int, int, int, int], repeats: int) -> list[str]:
    """A row of the table for B, channels, filters of 3 x 3, width and height, in memory as Inductor lays them out."""
    batch, channels, filters, width = sizes
    shape, options = [filters, channels, 3, 3], ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    def draw(*lengths: int) -> torch.Tensor:
        return torch.randn(lengths).to(memory_format=torch.channels_last)

    weights, images, cotangents = draw(*shape), draw(batch, channels, width, width), draw(batch, filters, width, width)
    x, g = images.unsqueeze(1), cotangents.unsqueeze(1)

    def plain() -> torch.Tensor:
        wanted = [False, True, False]
        return torch.ops.aten.convolution_backward(cotangents, images, weights, None, *options, wanted)[1]

    each, norms = filter_gradients(g, x, shape, *options, True, True)
    for other, squared in (filter_gradients(g, x, shape, *options, False, True), (each, norms)):
        torch.testing.assert_close(other.sum(0), plain(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(squared, filter_norms(g, x, shape, *options), rtol=1e-4, atol=0)
    steps = [
        plain,
        lambda: filter_gradients(g, x, shape, *options, False, True),
        lambda: filter_gradients(g, x, shape, *options, True, True),
        lambda: filter_norms(g, x, shape, *options),
    ]
    times = interleaved(steps, repeats=repeats)
    return [" x ".join(map(str, sizes)), *(f"{1e3 * statistics.median(t):.2f}" for t in times)]


def measure_embedding(sizes: tuple[int, int, int], repeats: int) -> list[str]:
    """A row of the table for B, T, D, with words drawn as in a text: half of them are one of 128."""
    batch, positions, width = sizes
    words = (WORDS * torch.rand(batch, positions).pow(6)).long()
    cotangents = torch.randn(batch, positions, width)

    def grams() -> torch.Tensor:
        products = own_product(cotangents, cotangents.mT)
        return (products * (words.unsqueeze(2) == words.unsqueeze(1))).flatten(1).sum(1)

    plain = torch.compile(lambda i, g: g.new_zeros(WORDS, width).index_put((i,), g, accumulate=True), dynamic=False)
    compiled = torch.compile(grams, dynamic=False)
    sums = torch.compile(lambda i, g: sums_and_sizes(i, g)[0], dynamic=False)
    sides = [Sides(words, cotangents.unsqueeze(1), "rows")]
    for found in (compiled(), sums(words, cotangents)):
        torch.testing.assert_close(found.double(), ghost(sides), rtol=1e-4, atol=0)
    steps = [
        lambda: plain(words, cotangents),
        compiled,
        lambda: sums(words, cotangents),
        lambda: ghost(sides),
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
        "norms, Inductor", "norms, ours", "weighted sum, torch", "weighted sum, ours",
    ]  # fmt: skip
    print(markdown(head, rows))
    if has_narrow(torch.bfloat16):
        rows = [measure_narrow(sizes, asked.repeats) for sizes in SHAPES]
        head = ["B x T x P x D", "summed, torch", "each, torch", "each and norms, widened", "each and norms, ours"]
        print("bfloat16")
        print(markdown(head, rows))
    rows = [measure_filters(sizes, asked.repeats) for sizes in IMAGES]
    head = ["B x channels x filters x width", "summed, torch", "each, torch", "each, ours", "norms alone, ours"]
    print(markdown(head, rows))
    rows = [measure_embedding(sizes, asked.repeats) for sizes in TEXTS]
    print(markdown(["B x T x D", "summed", "norms, Gram", "norms, torch's sums", "norms, ours"], rows))


if __name__ == "__main__":
    main()
