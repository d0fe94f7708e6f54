"""``python -m dpcompile.rates``: what plans take this machine's speed to be, and since when it is final."""

from __future__ import annotations

import argparse
from dataclasses import fields

import torch

from dpcompile.kernels.rates import Rates, rates_for, remeasure, settled

__all__ = ["describe_rates"]

_UNITS = {"traffic": "GB/s", "fresh": "GB/s", "call": "us"}


def describe_rates(rates: Rates) -> str:
    """A line for every rate: GFLOP/s of products and convolutions, GB/s of memory, microseconds of a call."""
    lines = []
    for name in (f.name for f in fields(Rates)):
        value, unit = getattr(rates, name), _UNITS.get(name, "GFLOP/s")
        lines.append(f"{name:16}{value * 1e6 if unit == 'us' else value / 1e9:12.4g} {unit}")
    return "\n".join(lines)


def main() -> None:
    """Print them, measured now if nothing is kept, or with ``--remeasure``."""
    parser = argparse.ArgumentParser("python -m dpcompile.rates", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="rates are kept for each number of threads; default: torch's own")
    parser.add_argument("--remeasure", action="store_true", help="forget what is kept, and measure again")
    asked = parser.parse_args()
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    if asked.remeasure:
        remeasure(device)
    print(describe_rates(rates_for(device)))
    if not settled(device):
        print("not final: the machine was busy, so the next processes that make a plan measure again")


if __name__ == "__main__":
    main()
