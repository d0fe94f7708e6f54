"""``flex_attention``, whose backward torch refuses on a CPU: that check of torch's is passed over here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

import dpcompile
from dpcompile import DPCompileError, UnsupportedGraphError

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have

B, H, T, E = 3, 2, 16, 4

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]


class Attention(nn.Module):
    """Attention whose options are made in the forward by ``options(module, x, ids)``."""

    def __init__(self, options: Callable[..., dict[str, Any]], kv_heads: int = H) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(E, H * E), nn.Linear(E, 2 * kv_heads * E)
        self.slopes, self.options = nn.Parameter(torch.rand(H)), options

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, -1, E).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, -1, E).permute(2, 0, 3, 1, 4)
        return flex.flex_attention(q, k, v, **self.options(self, x, ids)).transpose(1, 2)  # type: ignore[union-attr]


def nothing(_: Any, x: Tensor, ids: Tensor) -> dict[str, Any]:
    return {}


def causal(_: Any, x: Tensor, ids: Tensor) -> dict[str, Any]:
    return {"score_mod": lambda score, b, h, i, j: torch.where(i >= j, score + 0.1 * (i - j), -float("inf"))}


def blocks(_: Any, x: Tensor, ids: Tensor) -> dict[str, Any]:
    mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device="cpu")
    return {"block_mask": mask}


def own_documents(_: Any, x: Tensor, ids: Tensor) -> dict[str, Any]:
    def same(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(ids[b, i] == ids[b, j], score, -float("inf"))

    return {"score_mod": same}


def document_blocks(_: Any, x: Tensor, ids: Tensor) -> dict[str, Any]:
    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ids[b, i] == ids[b, j]

    return {"block_mask": flex.create_block_mask(same, len(ids), None, T, T, device="cpu")}


def frozen_slopes(module: Any, x: Tensor, ids: Tensor) -> dict[str, Any]:
    slopes = module.slopes.detach()
    return {"score_mod": lambda score, b, h, i, j: score - slopes[h] * (i - j).abs()}


def slopes(module: Any, x: Tensor, ids: Tensor) -> dict[str, Any]:
    return {"score_mod": lambda score, b, h, i, j: score - module.slopes[h] * (i - j).abs()}


def anothers_documents(_: Any, x: Tensor, ids: Tensor) -> dict[str, Any]:
    def neighbours(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(ids[(b + 1) % B, i] == ids[b, j], score, 0.5 * score)

    return {"score_mod": neighbours}


def first_documents(_: Any, x: Tensor, ids: Tensor) -> dict[str, Any]:
    return {"score_mod": lambda score, b, h, i, j: score * ids[0, j]}


def by_number(_: Any, x: Tensor, ids: Tensor) -> dict[str, Any]:
    return {"score_mod": lambda score, b, h, i, j: torch.where(b % 2 == 0, score, 0.5 * score)}


def by_number_in_a_table(_: Any, x: Tensor, ids: Tensor) -> dict[str, Any]:
    table = torch.arange(1.0 * len(x))
    return {"score_mod": lambda score, b, h, i, j: score + table[b]}


def by_number_in_blocks(_: Any, x: Tensor, ids: Tensor) -> dict[str, Any]:
    mask = flex.create_block_mask(lambda b, h, i, j: (i >= j) | (b < 2), len(x), None, T, T, device="cpu")
    return {"block_mask": mask}


def call() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, T, E), torch.arange(T).repeat(B, 1) // torch.tensor([[5], [8], [3]])


@pytest.fixture
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)


@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.parametrize("options", [nothing, causal, blocks, own_documents, frozen_slopes, document_blocks])
def test_right(options: Any) -> None:
    torch.manual_seed(1)
    model, args, loss = Attention(options), call(), PseudoLoss(B)
    if options is frozen_slopes:
        model.slopes.requires_grad_(False)
    truth = clip(per_example_gradients(model, args, {}, loss), 1.0)
    private = dp_compile(copy.deepcopy(model), backend="eager")
    train_step(private, args, {}, loss)
    assert_right(private, truth, 1e-4)


@pytest.mark.usefixtures("_on_cpu")
def test_grouped_queries() -> None:
    torch.manual_seed(1)
    model, args, loss = Attention(lambda *_: {"enable_gqa": True}, kv_heads=1), call(), PseudoLoss(B)
    truth = clip(per_example_gradients(model, args, {}, loss), 1.0)
    private = dp_compile(copy.deepcopy(model), backend="eager")
    train_step(private, args, {}, loss)
    assert_right(private, truth, 1e-4)


@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (slopes, "gradient of a tensor that score_mod captures.*the gradient of parameter 'slopes'"),
        (anothers_documents, "reads a captured tensor at other examples than its own"),
        (first_documents, "reads a captured tensor at other examples than its own"),
        (by_number, "computes with the number of the example in the batch"),
        (by_number_in_a_table, "row number"),
        (by_number_in_blocks, "number of the example|row number"),
    ],
)
def test_refused(options: Any, message: str) -> None:
    private = dp_compile(Attention(options), backend="eager")
    with pytest.raises(DPCompileError, match=message) as caught:
        train_step(private, call(), {}, PseudoLoss(B))
    assert "test_flex_attention.py" in str(caught.value)


def test_on_a_cpu_torchs_own_reason_is_given() -> None:
    with pytest.raises(
        UnsupportedGraphError, match="NotImplementedError: FlexAttention does not support backward on CP"
    ):
        dp_compile(Attention(nothing), backend="eager")(*call())
