"""Machine code of the Triton kernels for GPUs that are not there, and what it needs of them.

As a program it prints a table: ``python tests/support/triton_compiled.py``.
"""

from __future__ import annotations

import importlib
import itertools
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import dpcompile.kernels.triton as folder

TARGETS = {"sm_80": 80, "sm_90": 90}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_TYPES = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments that its caller gave it."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    def source(self) -> ASTSource:
        """Specialised as Triton does it when it starts a kernel: to sizes of 1, and to what 16 divides."""
        names = self.kernel.arg_names
        constant = {p.name for p in self.kernel.params if p.is_constexpr}
        signature, constants, hints = {}, {}, {}
        for i, name in enumerate(names):
            value = self.arguments[name]
            if name in constant or (type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name] = _TYPES[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
            if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0 and name not in constant):
                hints[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=hints)


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            options = {k: named.pop(k) for k in _OPTIONS if k in named}
            given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
            self.launches.append(Launch(self.kernel, given, options))

        return launch


def kernels() -> dict[str, Any]:
    """Every kernel in the package, by ``module.name``; not the functions that kernels are made of."""
    found = {}
    for info in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"{folder.__name__}.{info.name}")
        for name, value in vars(module).items():
            if (
                isinstance(value, triton.JITFunction)
                and name.endswith("kernel")
                and value.fn.__module__ == module.__name__
            ):
                found[f"{info.name}.{name}"] = value
    return found


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """What a call would start; nothing is run, and results are whatever the memory holds."""
    launches: list[Launch] = []
    places = [(key, *key.split(".")) for key in kernels()]
    own = {}
    for key, module, name in places:
        holder = importlib.import_module(f"{folder.__name__}.{module}")
        own[key] = getattr(holder, name)
        setattr(holder, name, _Recorder(own[key], launches))
    try:
        call()
    finally:
        for key, module, name in places:
            setattr(importlib.import_module(f"{folder.__name__}.{module}"), name, own[key])
    return launches


@dataclass(frozen=True)
class Needs:
    registers: int
    spills: int  # bytes
    shared: int  # bytes
    ptx: str


def needs(launch: Launch, target: str) -> Needs:
    """Of one kernel, compiled by Triton to machine code for the target; spills as the assembler tells them."""
    compiled = triton.compile(launch.source(), target=GPUTarget("cuda", TARGETS[target], 32), options=launch.options)
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    assert compiled.asm["cubin"], "there is machine code"
    name = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert name is not None
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "kernel.ptx"
        file.write_text(ptx)
        fused = [] if launch.options.get("enable_fp_fusion", True) else ["--fmad=false"]
        command = [
            str(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"),
            "-v",
            *fused,
            f"--gpu-name={name[1]}",
        ]
        told = subprocess.run(
            [*command, str(file), "-o", os.devnull], capture_output=True, text=True, check=True
        ).stderr
    (registers,) = re.findall(r"Used (\d+) registers", told)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", told))
    return Needs(int(registers), spills, int(metadata.shared), ptx)


@dataclass(frozen=True)
class Case:
    """Something that starts kernels.

    Attributes:
        call: what.
        often: whether its kernels differ so much from others that they are compiled in every run of the tests.
    """

    call: Callable[[], object]
    often: bool = True


def cases() -> dict[str, Case]:
    """Calls that start every kernel, in the tiles and dtypes that are used."""
    return {**_noise(), **_sums(), **_norms(), **_products()}


def _noise() -> dict[str, Case]:
    from dpcompile.kernels.triton import noise_rows, steps

    found, place = {}, cast(Any, {"tags": [5], "starts": [0]})
    kinds = (("mean", 0, 0), ("adam", 3, 8), ("sgd", 1, 2), ("momentum", 2, 6))
    for dtype in (torch.float32, torch.float64):
        x, name = torch.zeros(5, dtype=dtype), str(dtype).removeprefix("torch.")
        ways: dict[str, Any] = {"drawn": {"std": 1.0}, "given": {"std": 1.0, "drawn": [x]}, "none": {"std": 0.0}}
        for (kind, others, rates), (way, given) in itertools.product(kinds, ways.items()):
            numbers = {**place, "divisor": 2.0, "seed": 3, "step": 4, "rates": [0.0] * rates, **given}
            call = partial(steps.step_, kind, [x], [[x]] * others, **numbers)
            often = dtype == torch.float32 and way == "drawn" and kind != "sgd"
            found[f"{kind}, noise {way}, {name}"] = Case(call, often)
        more: Any = {**place, "factors": (1.0, 0.5), "seed": 1, "first": 0, "made": 0, "more": 1}
        found[f"rows of noise, {name}"] = Case(partial(noise_rows.rows_, [x[None]], **more), dtype == torch.float32)
    return found


def _sums() -> dict[str, Case]:
    from dpcompile.kernels.triton import kept, squares

    found = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x, name, often = torch.zeros(8, 64, dtype=dtype), str(dtype).removeprefix("torch."), dtype == torch.float32
        if dtype.itemsize > 2:
            call = partial(kept.weighted_sums, torch.zeros(1, 8, dtype=dtype), [0], [x])
            found[f"weighted sums, {name}"] = Case(call, often)
        found[f"norms of vectors, {name}"] = Case(partial(squares.norms_of_vectors, [x]), often)
        for rows, value in (("short", x), ("long", torch.zeros(1, 4096, dtype=dtype))):
            found[f"squares of {rows} rows, {name}"] = Case(partial(squares.squares_of, value), often)
    return found


def _norms() -> dict[str, Case]:
    from dpcompile.kernels.triton import direct, ghost

    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for t, p, d in ((1024, 256, 512), (40, 20, 9)):
            rows, cols = torch.zeros(1, 1, t, p, dtype=dtype), torch.zeros(1, 1, t, d, dtype=dtype)
            end, often = f"{str(dtype).removeprefix('torch.')}, T = {t}", dtype != torch.float16 and t > 512
            found[f"direct norm, {end}"] = Case(partial(direct.direct_norm, rows, cols), often)
            found[f"ghost norm, {end}"] = Case(partial(ghost.ghost_norm, rows, cols), often)
            index = torch.zeros(1, t, dtype=torch.int64)
            found[f"one-hot norm, {end}"] = Case(partial(ghost.ghost_norm_one_hot, index, cols), often)
    return found


def _products() -> dict[str, Case]:
    from dpcompile.kernels.triton import by_index, products

    found, which = {}, torch.zeros(2, dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows, cols = torch.zeros(2, 1, 64, 256, dtype=dtype), torch.zeros(2, 1, 64, 512, dtype=dtype)
        each, end = torch.zeros(2, 1, 256, 512), str(dtype).removeprefix("torch.")
        often = dtype == torch.bfloat16
        found[f"products, {end}"] = Case(partial(products.product_with_squares, rows, cols, each), often)
        found[f"products made again, {end}"] = Case(partial(products.made_again, rows, cols, which, each), often)
        found[f"norms made again, {end}"] = Case(partial(products.made_again, rows, cols, which), often)
        index = torch.zeros(2, 64, dtype=torch.int64)
        found[f"norms by index, {end}"] = Case(partial(_by_index, by_index, index, rows[:, 0]), often)
        found[f"some norms by index, {end}"] = Case(partial(_by_index, by_index, index, rows[:, 0], which), False)
    return found


def _by_index(module: Any, *arguments: Any) -> None:
    with patch.object(module, "squares_of", lambda values: torch.zeros(values.shape[:-1], dtype=torch.float64)):
        module.sums_and_sizes(*arguments)


def main() -> None:
    print("| kernel | " + " | ".join(f"{t}: registers, shared bytes, spilled bytes" for t in TARGETS) + " |")
    print("| --- |" + " --- |" * len(TARGETS))
    for name, case in cases().items():
        for launch in launches_of(case.call):
            found = [needs(launch, target) for target in TARGETS]
            print(
                f"| {name} | " + " | ".join(f"{n.registers}, {n.shared}, {n.spills}" for n in found) + " |", flush=True
            )


if __name__ == "__main__":
    sys.exit(main())
