"""``python -m benchmarks.kernels``: norm operators against plain matrix products, on the device at hand.

Prints, for every rule, dtype and shape, the times of the plain products, of the tensor functions that graphs hold
otherwise, and of the operator, and the ratio of the first to the last (above 1: the operator is faster).
Answers are compared before times are. Takes less than a minute on a CPU.
"""

from __future__ import annotations

import argparse

import torch

from dpcompile.kernels.fused_rates import unfused_direct, unfused_ghost
from dpcompile.kernels.measured import Stopwatch
from dpcompile.kernels.norms import direct_norm, ghost_norm
from dpcompile.kernels.product_op import product_norms
from dpcompile.norms.ghost import Sides, ghost

SHAPES = [  # B, T, P, D
    (8, 64, 1024, 1024),
    (16, 197, 384, 1536),
    (8, 256, 512, 512),
    (8, 256, 512, 2048),
    (4, 1024, 256, 1024),
    (2, 2048, 512, 512),
]


def main() -> None:
    """Print one row per rule, dtype and shape."""
    parser = argparse.ArgumentParser(description="Norm operators against plain matrix products.")
    parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, times in ms")
    print("rule    dtype     B x T x P x D        products  tensor functions  operator  products/operator")
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    rules = {
        "direct": (unfused_direct, lambda r, c: product_norms(r.float(), c.float()), direct_norm),
        "ghost": (unfused_ghost, lambda r, c: ghost([Sides(r.float(), c.float())]), ghost_norm),
    }
    for rule, functions in rules.items():
        for dtype in dtypes:
            for b, t, p, d in SHAPES:
                torch.manual_seed(0)
                rows, cols = (torch.randn(b, 1, t, n, device=device).to(dtype) for n in (p, d))
                answers = [f(rows, cols) for f in functions]
                for answer in answers[1:]:
                    torch.testing.assert_close(answer, answers[0].double(), rtol=1e-2, atol=0)
                times = [1e3 * Stopwatch().seconds(lambda f=f: f(rows, cols), device) for f in functions]  # noqa: B023
                shape, kind = f"{b} x {t} x {p} x {d}", str(dtype).removeprefix("torch.")
                print(
                    f"{rule:7s} {kind:9s} {shape:20s} {times[0]:8.2f}  {times[1]:16.2f}  {times[2]:8.2f}"
                    f"  {times[0] / times[2]:17.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
