"""What Triton's interpreter makes of the kernels, with the CPU in the place of a GPU: checks of test_triton.py.

A program of its own: the interpreter is chosen by ``TRITON_INTERPRET=1`` before Triton is imported. It prints, as JSON,
for each check None or what went wrong.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable

import numpy as np
import torch
import triton_noise
import triton_products
import triton_steps
import triton_sums

from dpcompile.kernels import on_gpu

CHECKS: dict[str, Callable[[], None]] = {
    f"{module.__name__.removeprefix('triton_')}: {name.removeprefix('check_').replace('_', ' ')}": check
    for module in (triton_noise, triton_steps, triton_sums, triton_products)
    for name, check in vars(module).items()
    if name.startswith("check_")
}


def main() -> None:
    warnings.simplefilter("error")
    np.seterr(all="ignore")  # integers wrap, and elements outside of a tensor are divided by 0
    warnings.filterwarnings("ignore", "two DPOptimizers of one seed")
    torch.set_num_threads(1)
    on_gpu._DEVICES.add("cpu")
    found: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            check()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
