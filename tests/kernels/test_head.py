"""A cross entropy whose logits are made a part of the classes at a time: losses, sums, and norms right or too large."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dpcompile.kernels.head_norms as head_norms_module
from dpcompile.kernels.head import head_gradients, head_losses, head_sums
from dpcompile.kernels.head_norms import head_norms

B, V, S = 3, 23, 4
NARROW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpcompile.kernels.head._AT_ONCE", {"cpu": 100})
    monkeypatch.setattr("dpcompile.kernels.head._FEWEST", 5)


def values(t: int = 6, d: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Operands of the norms; one row's label does not count."""
    torch.manual_seed(0)
    labels = torch.randint(0, V, (B, t))
    labels[0, 0] = -100
    hidden, weight, bias = torch.randn(B, t, d).to(dtype), torch.randn(V, d).to(dtype), torch.randn(V).to(dtype)
    losses, totals = head_losses(hidden.flatten(0, 1), weight, bias, labels.flatten(), -100)
    cotangent = torch.randn_like(losses).reshape(B, t).masked_fill(labels == -100, 0.0)
    given = {"cotangent": cotangent, "hidden": hidden, "weight": weight, "bias": bias, "labels": labels}
    return given | {"totals": totals.reshape(B, t)}


def flat(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v if k in ("weight", "bias") else v.flatten(0, 1) for k, v in given.items()}


def each_gradient(given: dict[str, Any], of_bias: bool, table: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Every example's, in float64, by autograd."""
    found = []
    for b in range(len(given["labels"])):
        weight, bias = (given[k].double().requires_grad_() for k in ("weight", "bias"))
        logits = F.linear(given["hidden"][b].double(), weight, bias)
        losses = F.cross_entropy(logits, given["labels"][b], reduction="none") * given["cotangent"][b].double()
        gradient = torch.autograd.grad(losses.sum(), bias if of_bias else weight)[0]
        if table is not None:
            gradient = gradient.index_add(0, table[0][b], table[1][b].double())
        found.append(gradient)
    return torch.stack(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *NARROW])
def test_losses_and_gradients(dtype: torch.dtype) -> None:
    given = flat(values(dtype=dtype))
    leaves = [given[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")]
    found, _ = head_losses(*leaves, given["labels"], -100)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    wanted = F.cross_entropy(F.linear(*wide), given["labels"], reduction="none")
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-5, atol=1e-5)
    # Cotangents also where labels do not count.
    cotangent = torch.arange(1.0, len(found) + 1)
    gradients = torch.autograd.grad(found, leaves, cotangent.to(found.dtype))
    tolerance: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-1} if dtype in NARROW else {"rtol": 1e-5, "atol": 1e-5}
    for ours, truth in zip(gradients, torch.autograd.grad(wanted, wide, cotangent.double()), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), truth, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("of_bias", [False, True])
def test_sums(dtype: torch.dtype, of_bias: bool) -> None:
    given = values(dtype=dtype)
    truth = each_gradient(given, of_bias)
    torch.testing.assert_close(head_gradients(**given, of_bias=of_bias).double(), truth, rtol=1e-4, atol=1e-5)
    sums = head_sums(**flat(given), of_bias=of_bias)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(sums.double(), truth.sum(0), rtol=1e-4, atol=1e-5)


def test_what_has_no_cotangent_leaves_no_trace() -> None:
    given = values()
    wanted = head_sums(**flat(given), of_bias=False)
    given["hidden"][0, 0], given["totals"][0, 0] = torch.nan, torch.nan
    assert torch.equal(head_sums(**flat(given), of_bias=False), wanted)


@pytest.mark.parametrize(("t", "d"), [(1, 8), (6, 8), (70, 8), (70, 80)])  # the third by products, the others by Grams
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("which", ["weight", "bias", "tied"])
def test_norms(t: int, d: int, dtype: torch.dtype, which: str) -> None:
    given = values(t, d, dtype)
    table = None
    if which == "tied":
        table = torch.randint(0, V, (B, S)), torch.randn(B, S, d, dtype=given["cotangent"].dtype)
    wanted = each_gradient(given, which == "bias", table).square().sum(tuple(range(1, 2 if which == "bias" else 3)))
    found = head_norms(**given, of_bias=which == "bias", index=table and table[0], looked_up=table and table[1])
    torch.testing.assert_close(found, wanted, rtol=3e-4, atol=0)
    assert (found >= wanted).all()


@pytest.mark.parametrize("t", [6, 70])
def test_a_table_that_cancels_the_head(t: int) -> None:
    """One column takes away from every class what the head gives it, but for 1e-4 of it."""
    given = values(t, 1) | {"bias": torch.zeros(V)}
    _, totals = head_losses(given["hidden"].flatten(0, 1), given["weight"], None, given["labels"].flatten(), -100)
    given = given | {"totals": totals.reshape(B, t)}
    head = each_gradient(given, False)
    table = torch.arange(V).expand(B, V), (-(1 - 1e-4) * head).float()
    given["bias"] = None
    wanted = each_gradient(given | {"bias": torch.zeros(V)}, False, table).square().sum((1, 2))
    found = head_norms(**given, of_bias=False, index=table[0], looked_up=table[1])
    assert (found >= wanted).all() and (found < 1e-4 * head.square().sum((1, 2))).all()


def test_examples_that_are_not_finite_stay_alone() -> None:
    given = values()
    wanted = head_norms(**given, of_bias=False, index=None, looked_up=None)
    given["hidden"][1, 2] = torch.inf
    found = head_norms(**given, of_bias=False, index=None, looked_up=None)
    assert not found[1].isfinite()
    torch.testing.assert_close(found[[0, 2]], wanted[[0, 2]])


def test_few_examples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given = values()
    wanted = head_norms(**given, of_bias=False, index=None, looked_up=None)
    monkeypatch.setattr(head_norms_module, "_AT_ONCE", 40)
    found = head_norms(**given, of_bias=False, index=None, looked_up=None)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("label", [V, -1])
def test_labels_that_are_no_class(label: int) -> None:
    given = flat(values())
    given["labels"][3] = label
    with pytest.raises(IndexError, match=f"target {label} is out of bounds: there are 23 classes"):
        head_losses(given["hidden"], given["weight"], None, given["labels"], -100)


def test_classes_that_are_masked_by_the_bias() -> None:
    """Whole parts of the classes have logits of minus infinity."""
    given = flat(values())
    bias = torch.zeros(V).index_fill(0, torch.arange(12), -torch.inf)
    labels = given["labels"].clamp(12, V - 1)
    found, _ = head_losses(given["hidden"], given["weight"], bias, labels, -100)
    logits = F.linear(given["hidden"], given["weight"], bias)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, reduction="none"))
    given = values() | {"bias": bias, "labels": labels.reshape(B, -1), "totals": logits.logsumexp(1).reshape(B, -1)}
    norms = head_norms(**given, of_bias=False, index=None, looked_up=None)
    wanted = head_gradients(**given, of_bias=False).double().square().sum((1, 2))
    torch.testing.assert_close(norms, wanted, rtol=1e-4, atol=0)
