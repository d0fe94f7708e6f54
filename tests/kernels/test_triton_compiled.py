"""Every Triton kernel becomes machine code for two GPUs that are not there, and spills no register on them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if (Path(sys.modules["triton"].__file__ or "").parent / "backends/nvidia/bin/ptxas").exists():
    import triton_compiled
    from triton_compiled import Launch, cases, kernels, launches_of, needs
else:
    pytest.skip("this Triton has no assembler for CUDA", allow_module_level=True)

CASES = [pytest.param(name, marks=() if case.often else pytest.mark.slow, id=name) for name, case in cases().items()]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


@pytest.mark.parametrize("target", triton_compiled.TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_no_register_is_spilled(name: str, target: str) -> None:
    launches = launches_of(cases()[name].call)
    assert launches
    for launch in launches[:1]:  # others have cases of their own
        found = needs(launch, target)
        print(f"{name}, {target}: {found.registers} registers, {found.shared} bytes shared, {found.spills} spilled")
        assert found.spills == 0
        assert found.shared <= 160 * 1024  # of a block, on both


def test_every_kernel_is_compiled() -> None:
    started = {launch.kernel for case in cases().values() for launch in launches_of(case.call)}
    left_out = [name for name, kernel in kernels().items() if kernel not in started]
    assert not left_out, f"no case of tests/support/triton_compiled.py starts {left_out}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_rounded_as_on_a_cpu(dtype: torch.dtype) -> None:
    """Products and sums of float64 are fused only where it is written, and all are rounded to nearest."""
    name = f"mean, noise drawn, {str(dtype).removeprefix('torch.')}"
    (launch,) = launches_of(cases()[name].call)
    ptx = needs(launch, "sm_80").ptx
    code = re.findall(r"\b(fma|mul|add|sub|div|sqrt)((?:\.\w+)*\.f(?:32|64))\b", ptx)
    assert code and all(kind == f".rn{kind[-4:]}" for _, kind in code), set(code)
    pairs = 1024 // 2 // 128  # that a thread draws
    fused = sum(operation == "fma" and kind == ".rn.f64" for operation, kind in code)
    written = 25 + 2 * (dtype == torch.float64)  # in `normals.py`, and two additions of noise to sums in `steps.py`
    assert fused == written * pairs, "another number of fused operations than are written"
    free = Launch(launch.kernel, launch.arguments, {**launch.options, "enable_fp_fusion": True})
    assert needs(free, "sm_80").ptx.count("fma.rn.f64") > fused or "mul.f64" in needs(free, "sm_80").ptx


@pytest.mark.parametrize("target", triton_compiled.TARGETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_products_are_added_up_in_float32(dtype: str, target: str) -> None:
    """By tensor cores, whose sums are float32 numbers, of operands as they are."""
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    launch, *_ = launches_of(cases()[f"direct norm, {dtype}, T = 1024"].call)
    ptx = needs(launch, target).ptx
    products = set(re.findall(r"\bmma\.sync[\w.]+|\bwgmma\.mma_async[\w.]+", ptx))
    assert products and all(f".f32.{short}.{short}" in product for product in products), products


def test_a_spill_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the assembler says is read as it says it."""
    (launch,) = launches_of(cases()["mean, noise none, float32"].call)
    own = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        done = own(command, **options)
        if options.get("capture_output"):  # Triton's own call of it does not
            done.stderr = done.stderr.replace("0 bytes spill stores", "24 bytes spill stores")
        return done

    monkeypatch.setattr(triton_compiled.subprocess, "run", run)
    assert needs(launch, "sm_90").spills == 24
