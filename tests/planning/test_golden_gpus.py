"""What is chosen on an H100 and an A100 for ViT-B/16, GPT-2 small and a block of Llama 3, by their data sheets.

A change here is to be read, then accepted with ``EXPECTTEST_ACCEPT=1 pytest tests/planning/test_golden_gpus.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import TestCase
from torch import Tensor, nn

from benchmarks.models import ViT
from benchmarks.scale.models import LanguageModel, LlamaBlock
from dpcompile import dp_compile
from dpcompile.planning.plan import Plan

DTYPES = ("float32", "TF32", "bfloat16")


def vit(depth: int) -> tuple[nn.Module, Tensor]:
    """ViT-B/16 on 64 images."""
    return ViT(768, depth, 12), torch.empty(64, 3, 224, 224)


def gpt2(depth: int) -> tuple[nn.Module, Tensor]:
    """GPT-2 small on 8 texts of 1024 tokens."""
    return LanguageModel(768, depth, 12, 1024, 50257), torch.empty(8, 1024, dtype=torch.int64)


def llama(depth: int) -> tuple[nn.Module, Tensor]:
    """One block of Llama-3-8B, all of it trained, on two texts of 4096 tokens; its numbers are of ``dtype``."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
    return LlamaBlock(4096, 32, 8, 14336, 0, dtype), torch.empty(2, 4096, 4096, dtype=dtype)


def planned(make: Callable[[int], tuple[nn.Module, Tensor]], machine: str, dtype: str, depth: int = 1) -> Plan:
    """The plan of a model whose tensors have no content."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "TF32" else "highest")
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            with torch.device("meta"):
                model, x = make(depth)
            private: Any = dp_compile(model)
            found = private.trace(x, rates=machine)
    finally:
        torch.set_float32_matmul_precision(before)
    assert isinstance(found, Plan)
    return found


def chosen(make: Callable[[int], tuple[nn.Module, Tensor]], machine: str, *dtypes: str) -> str:
    """What stands in the plans of products, and what is expected of the step."""
    lines = []
    for dtype in dtypes:
        plan = planned(make, machine, dtype)
        lines.append(f"{dtype}:")
        for row in plan.rows():
            if "sums" not in row["why"] and "with site 1" not in row["why"]:
                lines.append(f"  {row['parameter'].removeprefix('blocks.0.'):20} {row['rule']:6} {row['why']}")
        lines.append("  " + str(plan).splitlines()[-2])
    return "\n".join(lines) + "\n"


class Golden(TestCase):
    maxDiff = None

    def test_vit(self) -> None:
        """One block of twelve."""
        self.assertExpectedInline(
            chosen(vit, "h100", *DTYPES),
            """\
float32:
  patches.weight       ghost  0.372 ms; keep 0.447 ms
  attention.q.weight   keep   0.174 ms; ghost 0.346 ms
  attention.k.weight   keep   0.174 ms; ghost 0.346 ms
  attention.v.weight   keep   0.174 ms; ghost 0.346 ms
  attention.out.weight keep   0.174 ms; ghost 0.346 ms
  mlp.0.weight         ghost  0.54 ms; keep 0.652 ms
  mlp.2.weight         ghost  0.54 ms; keep 0.652 ms
  head.weight          outer  0.0151 ms; keep 0.0171 ms
  expected: 17.7 ms a step, 2.37 ms of them for privacy; peak 1.3GB, 1.45 of the plain step's
TF32:
  patches.weight       ghost  0.372 ms; keep 0.447 ms
  attention.q.weight   keep   0.448 ms; ghost 0.621 ms
  attention.k.weight   keep   0.448 ms; ghost 0.621 ms
  attention.v.weight   keep   0.448 ms; ghost 0.621 ms
  attention.out.weight keep   0.448 ms; ghost 0.621 ms
  mlp.0.weight         ghost  1.64 ms; keep 1.75 ms
  mlp.2.weight         ghost  1.64 ms; keep 1.75 ms
  head.weight          outer  0.0151 ms; keep 0.0171 ms
  expected: 10.6 ms a step, 5.66 ms of them for privacy; peak 1.3GB, 1.45 of the plain step's
bfloat16:
  patches.weight       keep   0.153 ms; ghost 0.372 ms
  attention.q.weight   keep   0.174 ms; ghost 0.642 ms
  attention.k.weight   keep   0.174 ms; ghost 0.642 ms
  attention.v.weight   keep   0.174 ms; ghost 0.642 ms
  attention.out.weight keep   0.174 ms; ghost 0.642 ms
  mlp.0.weight         keep   0.652 ms; ghost 1.72 ms
  mlp.2.weight         keep   0.652 ms; ghost 1.72 ms
  head.weight          outer  0.0151 ms; keep 0.0171 ms
  expected: 5.62 ms a step, 2.37 ms of them for privacy; peak 2.11GB, 3.71 of the plain step's
""",
        )

    def test_gpt2(self) -> None:
        """One block of twelve, and the tied head."""
        self.assertExpectedInline(
            chosen(gpt2, "h100", "TF32", "bfloat16"),
            """\
TF32:
  tokens.weight        keep   13 ms; ghost 23.9 ms
  attention.q.weight   keep   0.213 ms; redo 0.435 ms
  attention.k.weight   keep   0.213 ms; redo 0.435 ms
  attention.v.weight   keep   0.213 ms; redo 0.435 ms
  attention.out.weight keep   0.213 ms; redo 0.435 ms
  mlp.0.weight         keep   0.807 ms; redo 1.63 ms
  mlp.2.weight         keep   0.807 ms; redo 1.63 ms
  expected: 28.7 ms a step, 15.6 ms of them for privacy; peak 2.44GB, 1.00 of the plain step's
bfloat16:
  tokens.weight        keep   13.9 ms; ghost 24.8 ms
  attention.q.weight   keep   0.0349 ms; redo 0.449 ms
  attention.k.weight   keep   0.0349 ms; redo 0.449 ms
  attention.v.weight   keep   0.0349 ms; redo 0.449 ms
  attention.out.weight keep   0.0349 ms; redo 0.449 ms
  mlp.0.weight         keep   0.0946 ms; redo 1.68 ms
  mlp.2.weight         keep   0.0946 ms; redo 1.68 ms
  expected: 21.6 ms a step, 14.4 ms of them for privacy; peak 1.83GB, 1.26 of the plain step's
""",
        )

    def test_llama(self) -> None:
        """One block of 32."""
        self.assertExpectedInline(
            chosen(llama, "h100", "TF32", "bfloat16"),
            """\
TF32:
  q.weight             keep   5.22 ms; redo 11.1 ms
  k.weight             keep   1.32 ms; redo 2.8 ms
  v.weight             keep   1.32 ms; redo 2.8 ms
  o.weight             keep   5.22 ms; redo 11.1 ms
  gate.weight          keep   18.2 ms; ghost 33.7 ms
  up.weight            keep   18.2 ms; ghost 33.7 ms
  down.weight          keep   18.2 ms; ghost 33.7 ms
  expected: 116 ms a step, 67.8 ms of them for privacy; peak 4.56GB, 1.05 of the plain step's
bfloat16:
  q.weight             keep   0.157 ms; redo 11.5 ms
  k.weight             keep   0.0504 ms; redo 2.9 ms
  v.weight             keep   0.0504 ms; redo 2.9 ms
  o.weight             keep   0.157 ms; redo 11.5 ms
  gate.weight          keep   0.51 ms; ghost 35.1 ms
  up.weight            keep   0.51 ms; ghost 35.1 ms
  down.weight          keep   0.51 ms; ghost 35.1 ms
  expected: 26.8 ms a step, 1.97 ms of them for privacy; peak 3.69GB, 1.32 of the plain step's
""",
        )

    def test_llama_on_an_older_machine(self) -> None:
        self.assertExpectedInline(
            chosen(llama, "a100", "bfloat16"),
            """\
bfloat16:
  q.weight             keep   0.247 ms; redo 39.3 ms
  k.weight             keep   0.0731 ms; redo 9.85 ms
  v.weight             keep   0.0731 ms; redo 9.85 ms
  o.weight             keep   0.247 ms; redo 39.3 ms
  gate.weight          keep   0.829 ms; ghost 119 ms
  up.weight            keep   0.829 ms; ghost 119 ms
  down.weight          keep   0.829 ms; ghost 119 ms
  expected: 71.3 ms a step, 3.15 ms of them for privacy; peak 3.69GB, 1.32 of the plain step's
""",
        )


@pytest.mark.slow
@pytest.mark.parametrize("make", [vit, gpt2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_block_is_planned_like_the_first(make: Callable[[int], tuple[nn.Module, Tensor]], dtype: str) -> None:
    """The whole models, of twelve blocks."""
    one, whole = planned(make, "h100", dtype).rules(), planned(make, "h100", dtype, depth=12).rules()
    for name, rule in whole.items():
        parts = name.split(".")
        first = ".".join(["blocks", "0", *parts[2:]]) if parts[0] == "blocks" else name
        assert rule == one[first], name
    assert len(whole) == len(one) + 11 * sum(name.startswith("blocks.") for name in one)
