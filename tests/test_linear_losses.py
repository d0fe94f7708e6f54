"""Private training on losses that do not hold the logits: right under every rule, tied or not."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn

import dpcompile
from dpcompile import UnsupportedGraphError
from dpcompile.losses import (
    per_example_causal_lm,
    per_example_cross_entropy,
    per_example_linear_causal_lm,
    per_example_linear_cross_entropy,
)
from dpcompile.norms.tied_heads import norms_by_parts

dp_compile: Any = dpcompile.dp_compile

B, T, D, V = 4, 5, 6, 19


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpcompile.kernels.head._AT_ONCE", {"cpu": 60})
    monkeypatch.setattr("dpcompile.kernels.head._FEWEST", 5)


class Decoder(nn.Module):
    """A language model with its loss; the logits are made as a whole, or not."""

    def __init__(self, tied: bool = False, whole: bool = False, blocks: int = 1) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=not tied)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(blocks))
        self.whole = whole
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.table(ids)
        for block in self.blocks:
            hidden = block(hidden)
        if self.whole:
            return per_example_causal_lm(self.head(hidden), labels)
        return per_example_linear_causal_lm(hidden, self.head.weight, labels, bias=self.head.bias)


def batch() -> tuple[Tensor, Tensor]:
    """Token numbers, and labels of which each example has another number; the last example has none."""
    torch.manual_seed(0)
    ids = torch.randint(0, V, (B, T))
    labels = ids.clone()
    for i, length in enumerate((5, 3, 2, 0)):
        labels[i, length:] = -100
    return ids, labels


def identity(output: Any, rows: slice) -> Tensor:
    return output


def test_the_loss_is_that_of_the_logits() -> None:
    ids, labels = batch()
    hidden, layer = torch.randn(B, T, D), nn.Linear(D, V)
    given: dict[str, Any] = {"divide_by": 7.0}
    for options in ({}, given):
        ours = per_example_linear_cross_entropy(hidden, layer.weight, labels, bias=layer.bias, **options)
        torch.testing.assert_close(ours, per_example_cross_entropy(layer(hidden), labels, **options))
        ours = per_example_linear_causal_lm(hidden, layer.weight, labels, bias=layer.bias, **options)
        torch.testing.assert_close(ours, per_example_causal_lm(layer(hidden), labels, **options))
    classes = per_example_linear_cross_entropy(hidden[:, 0], layer.weight, ids[:, 0])
    torch.testing.assert_close(classes, F.cross_entropy(hidden[:, 0] @ layer.weight.mT, ids[:, 0], reduction="none"))


MODES = ["auto", "instantiate", "redo", "direct", "two_pass", "mixed_ghost_clipping"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", MODES)
def test_every_rule_is_right(tied: bool, norm: str) -> None:
    torch.manual_seed(1)
    model, inputs = Decoder(tied), batch()
    truth = clip(per_example_gradients(model, inputs, {}, identity), 0.3)
    private = dp_compile(copy.deepcopy(model), max_grad_norm=0.3, backend="eager", norm=norm)
    train_step(private, inputs, {}, identity)
    assert_right(private, truth, 1e-4)
    rules = {row["rule"] for row in private.plan.rows() if row["operation"] == "head_sums"}
    assert rules == {"keep"} if norm == "instantiate" else rules <= {"ghost", "redo"}


@pytest.mark.parametrize("tied", [False, True])
def test_through_inductor(tied: bool) -> None:
    torch.manual_seed(1)
    model, inputs = Decoder(tied), batch()
    truth = clip(per_example_gradients(model, inputs, {}, identity), 0.3)
    private = dp_compile(copy.deepcopy(model), max_grad_norm=0.3, dynamic=True)
    train_step(private, inputs, {}, identity)
    assert_right(private, truth, 1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", ["auto", "two_pass"])
def test_in_regions(tied: bool, norm: str) -> None:
    if tied and norm == "two_pass":
        pytest.skip("refused: a parameter of two regions")
    torch.manual_seed(1)
    model, inputs = Decoder(tied, blocks=2), batch()
    truth = clip(per_example_gradients(model, inputs, {}, identity), 0.3)
    private = dp_compile(copy.deepcopy(model), max_grad_norm=0.3, backend="eager", regions="blocks", norm=norm)
    train_step(private, inputs, {}, identity)
    assert_right(private, truth, 1e-4)


@pytest.mark.parametrize("narrow", ["autocast", "parameters"])
def test_narrow_numbers(narrow: str) -> None:
    """Nearer to the float32 gradients than to those of bfloat16 logits."""
    found = []
    for whole in (False, True):
        torch.manual_seed(1)
        model, inputs = Decoder(whole=whole), batch()
        model = model.bfloat16() if narrow == "parameters" else model
        private = dp_compile(model, max_grad_norm=0.3, backend="eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow == "autocast"):
            loss = private(*inputs)
        assert loss.dtype == torch.float32
        loss.mean().backward()
        found.append([private.grad_norms, *(p.grad.float() for p in model.parameters() if p.grad is not None)])
    for ours, others in zip(*found, strict=True):
        torch.testing.assert_close(ours, others, rtol=3e-2, atol=3e-2 * float(others.abs().max()))


def test_the_matrix_of_two_heads() -> None:
    """Two heads of one matrix are one with more rows; of one matrix with another bias they are two."""

    class Two(Decoder):
        def __init__(self, biased: bool) -> None:
            super().__init__(tied=True)
            self.bias = nn.Parameter(torch.randn(V)) if biased else None

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            hidden = self.table(ids)
            ahead = per_example_linear_cross_entropy(self.blocks[0](hidden), self.head.weight, labels, bias=self.bias)
            return ahead + per_example_linear_cross_entropy(hidden, self.head.weight, labels)

    for biased in (False, True):
        torch.manual_seed(1)
        model, inputs = Two(biased), batch()
        truth = clip(per_example_gradients(model, inputs, {}, identity), 0.3)
        private = dp_compile(copy.deepcopy(model), max_grad_norm=0.3, backend="eager")
        train_step(private, inputs, {}, identity)
        assert_right(private, truth, 1e-4)


def test_a_matrix_that_is_frozen() -> None:
    torch.manual_seed(1)
    model, inputs = Decoder(), batch()
    model.head.requires_grad_(False)
    truth = clip(per_example_gradients(model, inputs, {}, identity), 0.3)
    private = dp_compile(copy.deepcopy(model), max_grad_norm=0.3, backend="eager")
    train_step(private, inputs, {}, identity)
    assert_right(private, truth, 1e-4)
    assert "head_sums" not in str(private.plan)


@pytest.mark.parametrize(
    ("hidden", "weight", "labels", "message"),
    [
        ((B, T, D), (V, D), (B, T + 1), "do not belong together: hidden has the features as one more, last dimension"),
        ((B, T, D), (D, V), (B, T), r"weight is \[classes, features\], bias \[classes\]"),
        ((D,), (V, D), (), "do not belong together"),
    ],
)
def test_shapes_that_do_not_fit(hidden: Any, weight: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        per_example_linear_cross_entropy(torch.randn(hidden), torch.randn(weight), torch.zeros(labels).long())


def test_dtypes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"hidden is torch.bfloat16 and weight is torch.float32: cast one of them"):
        per_example_linear_cross_entropy(torch.randn(B, D).bfloat16(), torch.randn(V, D), torch.zeros(B).long())


def test_one_position() -> None:
    with pytest.raises(ValueError, match=r"labels must be \[B, T\] with T of 2 or more, not \[4, 1\]"):
        per_example_linear_causal_lm(torch.randn(B, 1, D), torch.randn(V, D), torch.zeros(B, 1).long())


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="torch before 2.13")
def test_torchs_own_is_refused_and_the_remedy_works() -> None:
    class Chunked(Decoder):
        options: Any = None

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            hidden = self.blocks[0](self.table(ids)).flatten(0, 1)
            given: dict[str, Any] = {"reduction": "none", "options": self.options, "linear_bias": self.head.bias}
            flat = F.linear_cross_entropy(hidden, self.head.weight, labels.flatten(), **given)  # type: ignore[attr-defined]
            return flat.reshape(len(ids), -1).mean(1)

    model, inputs = Chunked(), batch()
    dp_compile(model, backend="eager")(*inputs).mean().backward()
    model.options = nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedGraphError, match="chunked linear cross entropy is one operation") as caught:
        dp_compile(model, backend="eager")(*inputs)
    assert "dpcompile.losses.per_example_linear_cross_entropy" in str(caught.value)


def test_positions_of_several_ranks_are_not_taken_for_ones_own() -> None:
    """What brings the positions of all ranks together leaves the sites' own ways to norms out."""
    head: Any = SimpleNamespace(
        site=SimpleNamespace(form="head", operands={"weight": 0}, operation=SimpleNamespace(args=[None] * 6 + [False])),
        one_hot=None,
        ghost=lambda: None,
    )
    table: Any = SimpleNamespace(site=SimpleNamespace(form="table"), one_hot="rows", ghost=None)
    assert norms_by_parts([table, head]) is not None
    head.ghost = None
    assert norms_by_parts([table, head]) is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch 2.14 for forward mode itself
def test_forward_mode_is_refused_and_not_dropped() -> None:
    hidden, weight, labels = torch.randn(3, 5, 4), torch.randn(7, 4), torch.randint(0, 7, (3, 5))
    with pytest.raises(NotImplementedError, match="a cross entropy without logits has no forward-mode derivative"):
        torch.func.jvp(lambda h: per_example_linear_cross_entropy(h, weight, labels), (hidden,), (hidden,))
