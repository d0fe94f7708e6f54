"""Weights that are functions of parameters: norms behind their backward, without any example's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from standardised import ByBatchNorm, StandardisedConv
from torch import Tensor, nn

import dpcompile
from dpcompile.kernels import mapped_norms as kernel
from dpcompile.kernels import mapped_products
from dpcompile.kernels.rounding import CLOSE

dp_compile: Any = dpcompile.dp_compile


class Shifted(StandardisedConv):
    """Parameters whose mean is large beside what they differ by."""

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.weight.data += 30.0


class OfLength(nn.Linear):
    """Rows of trained length (Salimans and Kingma 2016, arXiv:1602.07868)."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(inside, outside)
        self.length = nn.Parameter(torch.rand(self.out_features, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.length * self.weight / self.weight.square().sum(1, keepdim=True).sqrt(), self.bias)


class Twice(nn.Module):
    """One standardised matrix, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean(1, keepdim=True)) / self.weight.norm(dim=1, keepdim=True)
        return torch.tanh(torch.tanh(x @ weight.T) @ weight.T)


class Pruned(nn.Linear):
    """A fixed mask over the weight: no function of rows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (torch.arange(self.in_features) % 3 != 0).float(), self.bias)


class OfColumns(nn.Linear):
    """Columns of mean zero: no function of rows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(0, keepdim=True), self.bias)


class Square(nn.Module):
    """A square matrix plus a vector of sums over its rows, laid along its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (self.weight + self.weight.mean(1)).T)


class Turned(Square):
    """The same of its columns, laid along its rows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (self.weight + self.weight.mean(0).unsqueeze(1)).T)


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


def tokens(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


IMAGES, TOKENS = (4, 3, 7, 6), (4, 5, 6)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "standardised": (lambda: images(StandardisedConv(3, 8, 3, padding=1)), IMAGES, 1),
    "standardised, stride": (lambda: images(StandardisedConv(3, 8, 3, stride=2, bias=False)), IMAGES, 1),
    "standardised, groups": (lambda: images(nn.Conv2d(3, 4, 1), nn.Tanh(), StandardisedConv(4, 8, 1)), IMAGES, 1),
    "shifted": (lambda: images(Shifted(3, 8, 3)), IMAGES, 1),
    "by rows, with a gain": (lambda: images(ByBatchNorm(3, 8, 3, padding=1)), IMAGES, 2),
    "of length": (lambda: tokens(OfLength(6, 7)), TOKENS, 2),
    "weight norm": (lambda: tokens(nn.utils.parametrizations.weight_norm(nn.Linear(6, 7))), TOKENS, 2),
    "twice": (lambda: tokens(Twice()), TOKENS, 1),
    "one position": (lambda: nn.Sequential(OfLength(6, 7), nn.Tanh(), nn.Linear(7, 3)), (4, 6), 2),
    "pruned": (lambda: tokens(Pruned(6, 7)), TOKENS, 0),
    "of columns": (lambda: tokens(OfColumns(6, 7)), TOKENS, 0),
    "square, turned": (lambda: tokens(Turned()), (4, 3, 5), 0),
    "square": (lambda: tokens(Square()), (4, 3, 5), 0),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    make, shape, _ = MODELS[name]
    torch.manual_seed(0)
    net, x = make(), torch.randn(shape)
    net(x)
    return net, x


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models(name: str, dtype: torch.dtype) -> None:
    """Against one backward per example; the norms come without gradients where the tail works row by row."""
    net, x = built(name)
    net, x, loss = net.to(dtype), x.to(dtype), PseudoLoss(4)
    truth = clip(per_example_gradients(net, (x,), {}, loss), 0.5)
    private = dp_compile(net, max_grad_norm=0.5, norm="ghost", backend="eager")
    train_step(private, (x,), {}, loss)
    assert private.graph.code.count("dpcompile.mapped_norms.default(") == MODELS[name][2]
    assert_right(private, truth, 3e-4 if name == "shifted" and dtype == torch.float32 else 1e-5)


@pytest.mark.parametrize(("dtype", "itself"), [(torch.float32, True), (torch.bfloat16, False)])
def test_values_that_are_rounded_much_are_taken_as_they_are(dtype: torch.dtype, itself: bool) -> None:
    """What is left of a weight without its mean is a shift of the weight in float32, and in bfloat16 another value."""
    net, x = built("standardised")
    net, x = net.to(dtype), x.to(dtype)
    private = dp_compile(net, max_grad_norm=0.5, norm="ghost", backend="eager")
    private.trace(x)
    (norms,) = (n for n in private.graph.graph.nodes if n.target is torch.ops.dpcompile.mapped_norms.default)
    assert all((moved_from(base).op == "placeholder") == itself for base in norms.args[3])


def moved_from(node: Any) -> Any:
    """What is in another order here."""
    while getattr(node.target, "overloadpacket", None) in MOVES:
        node = node.args[0]
    return node


MOVES = {torch.ops.aten.permute, torch.ops.aten.clone, torch.ops.aten.view, torch.ops.aten._unsafe_view}


def gradients(rows: Tensor, cols: Tensor, scale: Tensor, bases: list[Tensor], mixed: Tensor) -> Tensor:
    """Every example's gradient behind the function, in float64."""
    each = rows[:, 0].double().mT @ cols[:, 0].double()
    wide = torch.stack([each.new_ones(each.shape[1:]), *(w.double().reshape(each.shape[1:]) for w in bases)])
    sums = torch.einsum("kpd,bpd->bkp", wide, each)
    return scale[:, None] * each + torch.einsum("jpd,jkp,bkp->bpd", wide, mixed, sums)


def operands(
    batch: int = 4, positions: int = 5, p: int = 6, width: int = 7, bases: int = 2
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    torch.manual_seed(0)
    rows, cols = torch.randn(batch, 1, positions, p), torch.randn(batch, 1, positions, width)
    mixed = torch.randn(bases + 1, bases + 1, p, dtype=torch.float64)
    return rows, cols, torch.randn(p, dtype=torch.float64), [torch.randn(p, width) for _ in range(bases)], mixed


SIZES: dict[str, dict[str, int]] = {
    "usual": {},
    "no basis": {"bases": 0},
    "one position": {"positions": 1},
    "no position": {"positions": 0},
    "no example": {"batch": 0},
    "one row": {"p": 1},
    "many positions": {"positions": 40},
}


@pytest.mark.parametrize("sizes", list(SIZES))
@pytest.mark.parametrize("at_once", [1, 2**20])
@pytest.mark.parametrize("way", ["float32 products", "float64"])
def test_norms_of_a_function(sizes: str, at_once: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of numbers that belong to no weight, in as many parts as there are rows and examples, and in one."""
    monkeypatch.setattr(kernel, "_EXAMPLES", at_once)
    monkeypatch.setattr(kernel, "_PARAMETERS", at_once)
    monkeypatch.setattr(mapped_products, "_AT_ONCE", at_once)
    if way == "float64":
        monkeypatch.setattr(kernel, "by_products", lambda *_: None)
    given = operands(**SIZES[sizes])
    wanted = gradients(*given).square().sum((1, 2))
    found = kernel.mapped_norms(*given)
    torch.testing.assert_close(found, wanted, rtol=1e-8 if way == "float64" else 2 * CLOSE, atol=0.0)
    assert bool((found >= wanted * (1 - 1e-13)).all())
    if sizes == "usual":
        torch.library.opcheck(kernel.mapped_norms, given)


HARSH: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]]] = {
    "usual": lambda: operands(8, 6, 300, 40),
    "long columns": lambda: operands(2, 3, 4, 5000),
    "tiny": lambda: scaled_operands(1e-22, 1e-22),
    "tiny and huge": lambda: scaled_operands(1e-30, 1e30),
    "far apart": lambda: scaled_operands(torch.logspace(-20, 10, 6)[:, None, None, None], 1.0),
    "nearly constant": lambda: shifted_operands(1e4),
    "all of one sign": lambda: absolute_operands(),
}


def scaled_operands(rows: Any, cols: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    given = operands(6, 5, 20, 30)
    return (given[0] * rows).float(), (given[1] * cols).float(), *given[2:]


def shifted_operands(by: float) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    rows, cols, scale, bases, mixed = operands(6, 5, 20, 30)
    return rows, cols, scale, [w + by for w in bases], mixed


def absolute_operands() -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    rows, cols, scale, bases, mixed = operands(6, 5, 20, 3000)
    return rows.abs(), cols.abs(), scale.abs(), [w.abs() for w in bases], mixed.abs()


@pytest.mark.parametrize("block", [8, 2304])
@pytest.mark.parametrize("name", list(HARSH))
def test_how_far_off_float32_products_may_be(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_products, "_BLOCK", block)
    given = HARSH[name]()
    found = mapped_products.by_products(*given)
    assert found is not None
    wanted = gradients(*given).square().sum((1, 2))
    off = (found.squared - wanted).abs()
    assert bool((off <= found.slack + 1e-12 * wanted).all())
    assert bool((off > 0).any()), "products were exact: nothing was tried"


def test_roundings_that_all_go_one_way() -> None:
    """Half a unit in every term, all one way: sums of ones and of numbers that are rounded down every time."""
    width, ones = 4096, torch.ones
    cols, weight = ones(1, 1, 1, width), ones(1, width)
    weight[0, 1:] = 2.0**-24  # beside 1, half a unit: to even, that is to 1
    mixed = torch.zeros(2, 2, 1, dtype=torch.float64)
    mixed[1, 1] = 1.0
    given = ones(1, 1, 1, 1), cols, ones(1, dtype=torch.float64), [weight], mixed
    found = mapped_products.by_products(*given)
    assert found is not None
    wanted = gradients(*given).square().sum((1, 2))
    assert bool(((found.squared - wanted).abs() <= found.slack).all())
    assert bool((kernel.mapped_norms(*given) >= wanted * (1 - 1e-13)).all())


def test_float64_has_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """An example whose gradient the function takes nearly away is done again, and no other one."""
    torch.manual_seed(0)
    weight = torch.randn(5, 12)
    scale, mixed = standardisation(weight)
    cols = torch.randn(3, 1, 2, 12)
    cols[1] = weight[0] * 3  # and its rows are the first alone
    rows = torch.randn(3, 1, 2, 5)
    rows[1] *= torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    again: list[int] = []
    whole = kernel._in_float64

    def noted(rows: Tensor, *rest: Any) -> Tensor:
        again.append(len(rows))
        return whole(rows, *rest)

    monkeypatch.setattr(kernel, "_in_float64", noted)
    found = mapped_of(rows, cols, scale, weight, mixed)
    assert again == [1]
    wanted = gradients(rows, cols, scale, [weight], mixed).square().sum((1, 2))
    assert bool((found >= wanted * (1 - 1e-9)).all())
    torch.testing.assert_close(found[[0, 2]], wanted[[0, 2]], rtol=2 * CLOSE, atol=0.0)


def test_without_a_compiler_all_is_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_products, "_library", lambda: None)
    given = operands()
    torch.testing.assert_close(kernel.mapped_norms(*given), gradients(*given).square().sum((1, 2)), rtol=1e-8, atol=0.0)


def standardisation(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and mixed of (w - mean) / std, of the backward's numbers."""
    w = weight.double()
    width, mean = w.shape[1], w.mean(1)
    s = (w - mean[:, None]).square().mean(1).rsqrt()
    mixed = torch.zeros(2, 2, len(w), dtype=torch.float64)
    mixed[1, 1], mixed[0, 1], mixed[1, 0] = -(s**3) / width, s**3 / width * mean, s**3 / width * mean
    mixed[0, 0] = -s / width - s**3 / width * mean**2
    return s, mixed


@pytest.mark.parametrize("offset", [0.0, 3.0, 1e3])
@pytest.mark.parametrize("left", [1.0, 1e-3, 1e-6, 0.0])
def test_no_norm_is_too_small_where_the_function_takes_nearly_all(left: float, offset: float) -> None:
    """Gradients along the weight and along ones, but for a little: standardised weights do not move along them."""
    torch.manual_seed(0)
    p, width, batch = 5, 12, 3
    weight = (offset + torch.randn(p, width)).float()
    scale, mixed = standardisation(weight)
    along = weight[:1].expand(batch, 1, width) + left * torch.randn(batch, 1, width)
    cols = torch.stack([along, along.new_ones(batch, 1, width), along.new_zeros(batch, 1, width)], 2)
    rows = torch.randn(batch, 1, 3, p) * torch.tensor([1.0] + [0.0] * (p - 1))
    found = mapped_of(rows, cols, scale, weight, mixed)
    w = weight.double()
    centred = (w - w.mean(1, keepdim=True)) * scale[:, None]
    each = rows[:, 0].double().mT @ cols[:, 0].double()
    each = each - each.mean(2, keepdim=True) - centred * (each * centred).mean(2, keepdim=True)
    true = (scale[:, None] * each).square().sum((1, 2))
    size = (rows[:, 0].double().norm(dim=2) * cols[:, 0].double().norm(dim=2)).sum(1) * scale.max()
    assert bool((found >= true * (1 - 1e-9)).all())
    assert bool((found.sqrt() <= true.sqrt() * 1.001 + 1e-6 * size).all())


def mapped_of(rows: Tensor, cols: Tensor, scale: Tensor, weight: Tensor, mixed: Tensor) -> Tensor:
    return kernel.mapped_norms(rows, cols, scale, [weight], mixed)


@pytest.mark.parametrize("place", ["rows", "cols"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_example(bad: float, place: str) -> None:
    rows, cols, *others = operands()
    wanted = kernel.mapped_norms(rows, cols, *others)
    (rows if place == "rows" else cols)[1, 0, 2, 3] = bad
    found = kernel.mapped_norms(rows, cols, *others)
    assert found.isfinite().tolist() == [True, False, True, True]
    assert torch.equal(found[[0, 2, 3]], wanted[[0, 2, 3]])


@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e18, 1e30])
def test_norms_at_the_ends_of_float32(factor: float) -> None:
    """No square vanishes or overflows."""
    rows, *others = operands()
    wanted = kernel.mapped_norms(rows, *others).sqrt() * factor
    torch.testing.assert_close(kernel.mapped_norms(rows * factor, *others).sqrt(), wanted, rtol=1e-6, atol=0.0)


def test_parameters_that_are_not_finite_are_nobodys_norm() -> None:
    rows, cols, scale, (first, second), mixed = operands()
    first[2, 3] = torch.nan
    assert not kernel.mapped_norms(rows, cols, scale, [first, second], mixed).isfinite().any()
