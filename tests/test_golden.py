"""Rewritten graphs, a plan and a certificate, as a person reads them.

They show what the machine does to four small models. A change here is to be read, then accepted with
``EXPECTTEST_ACCEPT=1 pytest tests/test_golden.py``.
"""

from __future__ import annotations

import textwrap
from typing import Any

import torch
from expecttest import TestCase
from torch import Tensor, fx, nn

from dpcompile import dp_compile

B, T, D = 4, 3, 2


VIEWS = {"view", "permute", "unsqueeze", "squeeze", "expand", "clone"}


def readable(private: Any) -> str:
    """One line for each node: name, shape, operation and operands; views stand with their operand, as ``x:4x2``."""
    lines, names = [], {}

    def text(argument: Any) -> str:
        return str(fx.map_arg(argument, lambda n: _Name(names[n]))).replace("torch.", "")

    for node in private.graph.graph.nodes:
        value = node.meta.get("val")
        shape = "x".join(map(str, value.shape)) if isinstance(value, Tensor) else ""
        operation = str(getattr(node.target, "overloadpacket", node.target)).replace("aten.", "")
        names[node] = node.name
        if node.op == "placeholder":
            lines.append(f"{node.name} [{shape}]")
        elif node.op == "output":
            lines.append(f"return {text(list(node.args[0]))}")
        elif operation in VIEWS:
            names[node] = names[node.args[0]].partition(":")[0] + ":" + shape
        else:
            lines.append(f"{node.name} [{shape}] = {operation}({', '.join(map(text, node.args))})")
    return "\n".join(lines) + "\n"


class _Name(str):
    def __repr__(self) -> str:
        return str(self)


def traced(model: nn.Module, *args: Tensor, **options: Any) -> Any:
    private: Any = dp_compile(model, backend="eager", dynamic=False, **options)
    private.trace(*args)
    return private


def folded(text: str) -> str:
    """Long lines broken."""
    broken = [
        textwrap.fill(line, 110, subsequent_indent="        ", drop_whitespace=True) for line in text.splitlines()
    ]
    return "\n".join(broken) + "\n"


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, D)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) @ self.table.weight.T


class Golden(TestCase):
    maxDiff = None

    def test_outer(self) -> None:
        """One position: the norm of an outer product."""
        model = nn.Linear(D, 3, bias=False)
        self.assertExpectedInline(
            readable(traced(model, torch.zeros(B, D), norm="ghost")),
            """\
primals_1 [3x2]
primals_2 [4x2]
primals_3 [4]
primals_4 [4]
tangents_1 [4x3]
mm [4x3] = mm(primals_2, primals_1:2x3)
convert_element_type [4x1x1x2] = prims.convert_element_type(primals_2:4x1x1x2, float64)
pow_1 [4x1x1x2] = pow(convert_element_type, 2)
sum_1 [4x1x1] = sum(pow_1, [-1])
convert_element_type_1 [4x1x1x3] = prims.convert_element_type(tangents_1:4x1x1x3, float64)
pow_2 [4x1x1x3] = pow(convert_element_type_1, 2)
sum_2 [4x1x1] = sum(pow_2, [-1])
mul [4x1x1] = mul(sum_1, sum_2)
sum_3 [4] = sum(mul:4x1, [1])
sqrt_2 [4] = sqrt(sum_3)
gt_2 [4] = gt(primals_3, 0)
convert_element_type_6 [4] = prims.convert_element_type(primals_3, float64)
scalar_tensor_2 [] = scalar_tensor(1.0)
where_5 [4] = where(gt_2, convert_element_type_6, scalar_tensor_2)
mul_10 [4] = mul(where_5, 4)
mul_11 [4] = mul(sqrt_2, mul_10)
convert_element_type_7 [4] = prims.convert_element_type(mul_11, float32)
gt [4] = gt(primals_3, 0)
convert_element_type_2 [4] = prims.convert_element_type(primals_3, float64)
scalar_tensor [] = scalar_tensor(1.0)
where [4] = where(gt, convert_element_type_2, scalar_tensor)
mul_1 [4] = mul(where, 4)
sqrt [4] = sqrt(sum_3)
mul_2 [4] = mul(sqrt, mul_1)
sqrt_1 [4] = sqrt(sum_3)
clamp_min [4] = clamp_min(sqrt_1, 1e-28)
mul_3 [4] = mul(clamp_min, mul_1)
reciprocal [4] = reciprocal(mul_3)
mul_4 [4] = mul(reciprocal, 1.0)
clamp_max [4] = clamp_max(mul_4, 1.0)
convert_element_type_3 [4] = prims.convert_element_type(mul_2, float32)
abs_1 [4] = abs(convert_element_type_3)
ne [4] = ne(abs_1, inf)
eq [4] = eq(convert_element_type_3, convert_element_type_3)
mul_5 [4] = mul(eq, ne)
abs_2 [4] = abs(clamp_max)
ne_1 [4] = ne(abs_2, inf)
eq_1 [4] = eq(clamp_max, clamp_max)
mul_6 [4] = mul(eq_1, ne_1)
bitwise_and [4] = bitwise_and(mul_5, mul_6)
gt_1 [4] = gt(primals_3, 0)
bitwise_and_1 [4] = bitwise_and(bitwise_and, gt_1)
mul_7 [4] = mul(clamp_max, mul_1)
full [4] = full([4], 0)
where_1 [4] = where(bitwise_and_1, mul_7, full)
lt [4] = lt(where_1, 1.1754943508222875e-38)
clamp_max_1 [4] = clamp_max(where_1, 3.4028234663852886e+38)
scalar_tensor_1 [] = scalar_tensor(0.0)
where_2 [4] = where(lt, scalar_tensor_1, clamp_max_1)
convert_element_type_4 [4] = prims.convert_element_type(where_2, float32)
ne_2 [4] = ne(convert_element_type_4, 0)
convert_element_type_5 [4] = prims.convert_element_type(ne_2, float32)
eq_2 [4x1x1] = eq(convert_element_type_4:4x1x1, 0)
full_1 [] = full([], 0)
mul_8 [1x4x1x3] = mul(tangents_1:1x4x1x3, convert_element_type_4:4x1x1)
where_3 [1x4x1x3] = where(eq_2, full_1, mul_8)
eq_3 [4x1x1] = eq(convert_element_type_5:4x1x1, 0)
full_2 [] = full([], 0)
mul_9 [1x4x1x2] = mul(primals_2:1x4x1x2, convert_element_type_5:4x1x1)
where_4 [1x4x1x2] = where(eq_3, full_2, mul_9)
product [3x2] = dpcompile.product(where_3:3x4, where_4:4x2)
return [mm, product:3x2, None, None, convert_element_type_7]
""",
        )

    def test_kept_sum(self) -> None:
        """A parameter that multiplies: per-example gradients on the way to the sum."""
        self.assertExpectedInline(
            readable(traced(Scale(), torch.zeros(B, T, D), loss_reduction="sum")),
            """\
primals_1 [2]
primals_2 [4x3x2]
primals_3 [4]
primals_4 [4]
tangents_1 [4x3x2]
mul [4x3x2] = mul(primals_2, primals_1)
mul_1 [4x3x2] = mul(tangents_1, primals_2)
sum_2 [4x1x1x2] = sum(mul_1:4x1x3x2, [1, 2], True)
convert_element_type [4x2] = prims.convert_element_type(sum_2:4x2, float64)
pow_1 [4x2] = pow(convert_element_type, 2)
sum_3 [4] = sum(pow_1:4x2, [1])
sqrt_2 [4] = sqrt(sum_3)
gt_2 [4] = gt(primals_3, 0)
convert_element_type_4 [4] = prims.convert_element_type(primals_3, float64)
scalar_tensor_2 [] = scalar_tensor(1.0)
where_4 [4] = where(gt_2, convert_element_type_4, scalar_tensor_2)
mul_10 [4] = mul(where_4, 1)
mul_11 [4] = mul(sqrt_2, mul_10)
convert_element_type_5 [4] = prims.convert_element_type(mul_11, float32)
gt [4] = gt(primals_3, 0)
convert_element_type_1 [4] = prims.convert_element_type(primals_3, float64)
scalar_tensor [] = scalar_tensor(1.0)
where [4] = where(gt, convert_element_type_1, scalar_tensor)
mul_2 [4] = mul(where, 1)
sqrt [4] = sqrt(sum_3)
mul_3 [4] = mul(sqrt, mul_2)
sqrt_1 [4] = sqrt(sum_3)
clamp_min [4] = clamp_min(sqrt_1, 1e-28)
mul_4 [4] = mul(clamp_min, mul_2)
reciprocal [4] = reciprocal(mul_4)
mul_5 [4] = mul(reciprocal, 1.0)
clamp_max [4] = clamp_max(mul_5, 1.0)
convert_element_type_2 [4] = prims.convert_element_type(mul_3, float32)
abs_1 [4] = abs(convert_element_type_2)
ne [4] = ne(abs_1, inf)
eq [4] = eq(convert_element_type_2, convert_element_type_2)
mul_6 [4] = mul(eq, ne)
abs_2 [4] = abs(clamp_max)
ne_1 [4] = ne(abs_2, inf)
eq_1 [4] = eq(clamp_max, clamp_max)
mul_7 [4] = mul(eq_1, ne_1)
bitwise_and [4] = bitwise_and(mul_6, mul_7)
gt_1 [4] = gt(primals_3, 0)
bitwise_and_1 [4] = bitwise_and(bitwise_and, gt_1)
mul_8 [4] = mul(clamp_max, mul_2)
full [4] = full([4], 0)
where_1 [4] = where(bitwise_and_1, mul_8, full)
lt [4] = lt(where_1, 1.1754943508222875e-38)
clamp_max_1 [4] = clamp_max(where_1, 3.4028234663852886e+38)
scalar_tensor_1 [] = scalar_tensor(0.0)
where_2 [4] = where(lt, scalar_tensor_1, clamp_max_1)
convert_element_type_3 [4] = prims.convert_element_type(where_2, float32)
eq_2 [4x1x1] = eq(convert_element_type_3:4x1x1, 0)
full_1 [] = full([], 0)
mul_9 [1x4x1x2] = mul(sum_2:1x4x1x2, convert_element_type_3:4x1x1)
where_3 [1x4x1x2] = where(eq_2, full_1, mul_9)
sum_4 [2] = sum(where_3:4x2, [0])
return [mul, sum_4, None, None, convert_element_type_5]
""",
        )

    def test_instantiate(self) -> None:
        """Several positions: a batched product makes every example's gradient; their sum replaces the other."""
        model = nn.Linear(D, 3, bias=False)
        self.assertExpectedInline(
            readable(traced(model, torch.zeros(B, T, D), norm="instantiate")),
            """\
primals_1 [3x2]
primals_2 [4x3x2]
primals_3 [4]
primals_4 [4]
tangents_1 [4x3x3]
mm [12x3] = mm(primals_2:12x2, primals_1:2x3)
product_with_norms [] = dpcompile.product_with_norms(tangents_1:4x1x3x3, primals_2:4x1x3x2, True)
getitem [4x1x3x2] = <built-in function getitem>(product_with_norms, 0)
getitem_1 [4] = <built-in function getitem>(product_with_norms, 1)
sqrt_2 [4] = sqrt(getitem_1)
gt_2 [4] = gt(primals_3, 0)
convert_element_type_3 [4] = prims.convert_element_type(primals_3, float64)
scalar_tensor_2 [] = scalar_tensor(1.0)
where_3 [4] = where(gt_2, convert_element_type_3, scalar_tensor_2)
mul_7 [4] = mul(where_3, 4)
mul_8 [4] = mul(sqrt_2, mul_7)
convert_element_type_4 [4] = prims.convert_element_type(mul_8, float32)
gt [4] = gt(primals_3, 0)
convert_element_type [4] = prims.convert_element_type(primals_3, float64)
scalar_tensor [] = scalar_tensor(1.0)
where [4] = where(gt, convert_element_type, scalar_tensor)
mul [4] = mul(where, 4)
sqrt [4] = sqrt(getitem_1)
mul_1 [4] = mul(sqrt, mul)
sqrt_1 [4] = sqrt(getitem_1)
clamp_min [4] = clamp_min(sqrt_1, 1e-28)
mul_2 [4] = mul(clamp_min, mul)
reciprocal [4] = reciprocal(mul_2)
mul_3 [4] = mul(reciprocal, 1.0)
clamp_max [4] = clamp_max(mul_3, 1.0)
convert_element_type_1 [4] = prims.convert_element_type(mul_1, float32)
abs_1 [4] = abs(convert_element_type_1)
ne [4] = ne(abs_1, inf)
eq [4] = eq(convert_element_type_1, convert_element_type_1)
mul_4 [4] = mul(eq, ne)
abs_2 [4] = abs(clamp_max)
ne_1 [4] = ne(abs_2, inf)
eq_1 [4] = eq(clamp_max, clamp_max)
mul_5 [4] = mul(eq_1, ne_1)
bitwise_and [4] = bitwise_and(mul_4, mul_5)
gt_1 [4] = gt(primals_3, 0)
bitwise_and_1 [4] = bitwise_and(bitwise_and, gt_1)
mul_6 [4] = mul(clamp_max, mul)
full [4] = full([4], 0)
where_1 [4] = where(bitwise_and_1, mul_6, full)
lt [4] = lt(where_1, 1.1754943508222875e-38)
clamp_max_1 [4] = clamp_max(where_1, 3.4028234663852886e+38)
scalar_tensor_1 [] = scalar_tensor(0.0)
where_2 [4] = where(lt, scalar_tensor_1, clamp_max_1)
convert_element_type_2 [4] = prims.convert_element_type(where_2, float32)
weighted_sums [] = dpcompile.weighted_sums(convert_element_type_2:1x4, [0], [getitem:4x3x2])
getitem_2 [3x2] = <built-in function getitem>(weighted_sums, 0)
return [mm:4x3x3, getitem_2, None, None, convert_element_type_4]
""",
        )

    def test_plan(self) -> None:
        model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 50))
        plan = traced(model, torch.zeros(8, 4, dtype=torch.long)).plan
        self.assertExpectedInline(
            str(plan) + "\n",
            """\
parameter  operation  B  T  p   d   rule   FLOPs  bytes  why
0.weight   index_put  8  4  50  16  ghost  0      0      0.0302 ms; keep 0.0315 ms
1.weight   mm         8  4  64  16  keep   0      32.8k  0.032 ms; redo 0.0418 ms
1.bias     sum        8     1   64  keep   0      2.05k  per-example gradients, its sites are sums
3.weight   sum        8     1   64  keep   0      2.05k  per-example gradients, its sites are sums
3.bias     sum        8     1   64  keep   0      2.05k  per-example gradients, its sites are sums
4.weight   mm         8  4  50  64  keep   0      102k   0.0363 ms; redo 0.0455 ms
4.bias     sum        8     1   50  keep   0      1.6k   per-example gradients, its sites are sums
clipping: flat; FLOPs and bytes are what privacy adds to the plain backward
expected: 0.579 ms a step, 0.179 ms of them for privacy
""",
        )

    def test_certificate(self) -> None:
        certificate = traced(Tied(), torch.zeros(B, T, dtype=torch.long)).certificate
        self.assertExpectedInline(
            folded(str(certificate)),
            """\
examples never mix:
  input ids: examples on dim 0 (B)
  23 operations on values of examples, all with a rule:
    add 1, bitwise_and 2, bitwise_not 1, clamp_max 1, clamp_min 1, embedding 1, ge 1, index_put 1, lt 1, mm 3,
        ne 1, permute 3, unsqueeze 1, view 4, where 1
every gradient is summed over the examples, once on every path:
  table.weight: mm, index_put
""",
        )

    def test_refusal(self) -> None:
        class Centred(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
                return super().forward(x - x.mean(0))

        try:
            traced(Centred(D, 3), torch.zeros(B, D))
        except Exception as error:
            message = "\n".join(line for line in str(error).splitlines() if not line.startswith("  at "))
            self.assertExpectedInline(
                folded(message),
                """\
`sub` mixes examples: it combines a sum over all examples with values of single examples (it reaches output 0
        of the model)
  what to do: compute it for every example by itself; a loss belongs outside the model, one value per example
        (reduction='none'), then .mean(); use in_dims for inputs that have no example axis
""",
            )
        else:
            raise AssertionError("not refused")
