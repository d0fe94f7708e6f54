"""``python -m dpcompile.rates``: what plans take this machine's speed to be, or a named one's, and if that is final."""

from __future__ import annotations

import argparse
from dataclasses import fields

import torch

from dpcompile.errors import DPCompileError
from dpcompile.kernels.data_sheets import GROUPED, MACHINES, PRODUCTS, TRAFFIC, machine_of, rates_of
from dpcompile.kernels.rates import Rates, rates_for, remeasure, settled

__all__ = ["describe_rates", "describe_table"]

_UNITS = {"traffic": "GB/s", "fresh": "GB/s", "call": "us"}


def describe_rates(rates: Rates) -> str:
    """A line for every rate: GFLOP/s of products and convolutions, GB/s of memory, microseconds of a call."""
    lines = []
    for name in (f.name for f in fields(Rates)):
        value, unit = getattr(rates, name), _UNITS.get(name, "GFLOP/s")
        lines.append(f"{name:16}{value * 1e6 if unit == 'us' else value / 1e9:12.4g} {unit}")
    return "\n".join(lines)


def describe_table(name: str, *, tf32: bool = False) -> str:
    """The same for a machine of :data:`dpcompile.kernels.data_sheets.MACHINES`, and where its figures are from.

    Raises:
        DPCompileError: there is none of this name.
    """
    machine = machine_of(name)
    source = f"{machine.title}, {machine.memory / 1e9:.0f} GB; {machine.source}; nothing was measured"
    parts = f"of the peaks without sparsity: products {PRODUCTS}, grouped convolutions {GROUPED}, memory {TRAFFIC}"
    return f"{source}\n{parts}\n{describe_rates(rates_of(machine, tf32=tf32))}"


def main() -> None:
    """Print them, measured now if nothing is kept, or with ``--remeasure``."""
    parser = argparse.ArgumentParser("python -m dpcompile.rates", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="rates are kept for each number of threads; default: torch's own")
    parser.add_argument("--table", metavar="NAME", help=f"of a machine that need not be there: {', '.join(MACHINES)}")
    parser.add_argument("--tf32", action="store_true", help="with --table: the model's own products are allowed TF32")
    parser.add_argument("--remeasure", action="store_true", help="forget what is kept, and measure again")
    asked = parser.parse_args()
    if asked.table is not None:
        try:
            print(describe_table(asked.table, tf32=asked.tf32))
        except DPCompileError as unknown:
            parser.error(str(unknown))
        return
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
