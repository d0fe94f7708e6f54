"""Products of privacy's own by oneDNN: the operation, and models whose norms and sums are made by it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn

import dpcompile
from dpcompile.kernels import build, onednn, products, rates
from dpcompile.kernels import gram as gram_kernel
from dpcompile.kernels.gram import gram, gram_norms
from dpcompile.kernels.onednn import has_onednn, multiply_
from dpcompile.kernels.product_op import product_with_norms
from dpcompile.kernels.products import own_product, product
from dpcompile.planning import situation

dp_compile: Any = dpcompile.dp_compile
B, T, D = 4, 5, 6

pytestmark = pytest.mark.skipif(not has_onednn(), reason="torch was built without oneDNN")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which oneDNN is quicker, for small matrices too."""
    monkeypatch.setattr(products, "_SMALL", 0)
    typical = rates.rates_for(torch.device("cpu"))
    monkeypatch.setattr(products, "rates_for", lambda device: replace(typical, summed=2 * typical.large))
    yield


def laid_out(value: Tensor, how: str) -> Tensor:
    """The same values, otherwise in memory."""
    if how == "transposed":
        return value.mT.contiguous().mT
    if how == "gaps":
        return torch.cat([value, value], -1)[..., : value.shape[-1]]
    return value


SHAPES = [((7, 4), (4, 5)), ((2, 7, 4), (2, 4, 5)), ((2, 3, 7, 4), (2, 3, 4, 5)), ((1, 1), (1, 1)), ((0, 4), (4, 5))]
SHAPES += [((7, 0), (0, 5)), ((7, 4), (4, 0)), ((0, 7, 4), (0, 4, 5)), ((2, 0, 7, 4), (2, 0, 4, 5))]


@pytest.mark.parametrize("how", ["rows", "transposed", "gaps"])
@pytest.mark.parametrize("other", ["rows", "transposed", "gaps"])
@pytest.mark.parametrize(("left", "right"), SHAPES)
@pytest.mark.usefixtures("quick")
def test_products_of_any_layout(left: tuple[int, ...], right: tuple[int, ...], how: str, other: str) -> None:
    a, b = laid_out(torch.randn(left), how), laid_out(torch.randn(right), other)
    found = own_product(a, b)
    assert found.is_contiguous()
    torch.testing.assert_close(found, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(own_product, (a, b))


@pytest.mark.usefixtures("quick")
def test_small_products_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN takes longer to look its code up; both are of float32 numbers, in full precision."""
    taken: list[tuple[int, ...]] = []
    monkeypatch.setattr(products, "multiply_", lambda a, b, out: taken.append(tuple(a.shape)) or out.copy_(a @ b))
    monkeypatch.setattr(products, "_SMALL", 2 * 3 * 4 * 5)
    for left, right in (((6, 4), (4, 5)), ((7, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)), ((2, 3, 4), (2, 4, 6))):
        a, b = torch.randn(left), torch.randn(right)
        torch.testing.assert_close(own_product(a, b), (a.double() @ b.double()).float())
    assert taken == [(7, 4), (2, 3, 4)]


@pytest.fixture
def fresh_kernel() -> Iterator[None]:
    """Found anew, here and behind."""
    onednn._library.cache_clear()
    yield
    onednn._library.cache_clear()


@pytest.mark.usefixtures("fresh_kernel")
def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that fails, or that this torch does not have: products are torch's then."""
    a, b, out = torch.randn(3, 4), torch.randn(4, 5), torch.empty(3, 5)

    def library(result: int) -> Any:
        def dp_multiply(*arguments: int) -> int:
            return result

        return SimpleNamespace(dp_multiply=dp_multiply)

    for made in (lambda: library(0), lambda: library(1), lambda: 1 / 0):
        onednn._library.cache_clear()
        monkeypatch.setattr(build, "compile_cpp", lambda source, made=made, **options: made())
        assert not has_onednn()
        multiply_(a, b, out)
        torch.testing.assert_close(out, a @ b)
    onednn._library.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(onednn, "_address", lambda: None)
    assert not has_onednn()


@pytest.mark.usefixtures("fresh_kernel")
def test_an_exception_of_torch_stays_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product is torch's then, and its error is one in Python."""
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied|must match|Expected size"):
        multiply_(torch.randn(3, 4), torch.randn(5, 6), torch.empty(3, 6))


@pytest.mark.usefixtures("quick")
def test_other_dtypes_are_torchs() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        a = torch.randn(3, 4, dtype=dtype)
        assert torch.equal(product(a, a.mT), a @ a.mT)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("panels", [1, 2, 3, 7])
def test_sums_over_gram_matrices(panels: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the lower parts alone; values that are not finite stay so, and only in their own example."""
    if not compiled:
        monkeypatch.setattr(gram_kernel, "_library", lambda: None)
    rows, cols = torch.randn(3, 2, 7, 4), torch.randn(3, 2, 7, 5)
    lengths = rows.double().norm(dim=3) * cols.double().norm(dim=3)
    wanted = (rows.double().mT @ cols.double()).square().sum((1, 2, 3)), lengths.sum(2).square().sum(1)
    grams = gram(rows, panels), gram(cols, panels)
    found = gram_norms(*grams, panels)
    torch.testing.assert_close(found, wanted)
    torch.library.opcheck(gram, (rows, 1))
    torch.library.opcheck(gram_norms, (*grams, panels))
    for bad in (torch.nan, torch.inf):
        rows[1, 1, 2, 3] = bad
        found = gram_norms(gram(rows, panels), grams[1], panels)
        assert found[0].isfinite().tolist() == [True, False, True]
        torch.testing.assert_close(found[0][[0, 2]], wanted[0][[0, 2]])


class Net(nn.Module):
    """Matrices, a batch of matrices, a convolution, and one of patches that are unfolded."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 3, bias=False)
        self.heads = nn.Parameter(torch.randn(2, D // 2, D // 2))
        self.conv, self.patches = nn.Conv1d(D, D, 3, padding=1), nn.Conv1d(1, D, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        h = h + self.conv(h.mT).mT + self.patches(x.flatten(1).unsqueeze(1)).mean(2).unsqueeze(1)
        split = h.unflatten(-1, (2, -1)).permute(2, 0, 1, 3).flatten(1, 2)
        mixed = torch.bmm(split, self.heads).unflatten(1, (x.shape[0], -1)).permute(1, 2, 0, 3).flatten(2)
        return self.b(mixed)


@pytest.mark.full
@pytest.mark.parametrize("norm", ["auto", "per_example", "ghost", "book_keeping", "direct", "bk_mix_opt"])
@pytest.mark.usefixtures("quick")
def test_models(norm: str) -> None:
    """Right, and an example that is not finite leaves no trace."""
    model, x, loss = Net(), torch.randn(B, T, D), PseudoLoss(B)
    truth = clip(per_example_gradients(model, (x,), {}, loss), 0.5)
    private = dp_compile(model, max_grad_norm=0.5, backend="eager", norm=norm)
    train_step(private, (x,), {}, loss)
    assert "dpcompile.product" in private.graph.code
    assert_right(private, truth, 1e-5)
    truth = clip(per_example_gradients(model, (x,), {}, PseudoLoss(B + 1)), 0.5)
    private.zero_grad()
    with pytest.warns(RuntimeWarning, match="1 of 5 examples"):
        train_step(private, (torch.cat([x, x[:1] * torch.nan]),), {}, PseudoLoss(B + 1))
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad.double(), truth.sums[name], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("quick")
def test_one_position() -> None:
    model, x, loss = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2)), torch.randn(B, D), PseudoLoss(B)
    truth = clip(per_example_gradients(model, (x,), {}, loss), 0.5)
    private = dp_compile(model, max_grad_norm=0.5, backend="eager")
    train_step(private, (x,), {}, loss)
    assert "dpcompile.product" in private.graph.code
    assert_right(private, truth, 1e-5)


@pytest.mark.usefixtures("quick")
def test_a_plan_may_expect_less_time_than_without_privacy(monkeypatch: pytest.MonkeyPatch) -> None:
    typical = rates.rates_for(torch.device("cpu"))
    quick = replace(typical, summed=1e13, batched=1e13, traffic=1e15, call=1e-12, fresh=1e15)
    monkeypatch.setattr(situation, "rates_for", lambda device: quick)
    private = dp_compile(nn.Linear(64, 64), backend="eager", norm="ghost")
    private.trace(torch.randn(B, T, 64))
    assert private.plan.prediction.extra_seconds < 0
    assert "less than without privacy (by its products)" in str(private.plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(5, 3, 7, 6), (1, 4, 9, 3), (40, 2, 1, 5)])
def test_operands_with_the_positions_in_front(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """As recurrent layers have them, and alike for all positions: read as they lie."""
    positions, batch, p, d = sizes
    rows, cols = (torch.randn(positions, batch, n).to(dtype).permute(1, 0, 2).unsqueeze(1) for n in (p, d))
    for one in (rows, rows[:, :, :1].expand(rows.shape)):
        each, squared = product_with_norms(one, cols, False)
        wanted, norms = product_with_norms(one.contiguous(), cols.contiguous(), False)
        torch.testing.assert_close(each, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(squared, norms, rtol=1e-5, atol=1e-9)
