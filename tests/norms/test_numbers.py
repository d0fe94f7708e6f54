"""Norms and weights of odd numbers: terms that cancel, squares that vanish or overflow, roundings that all go one way.

``true (1 - 1e-5) <= norm <= true 1.001``, the truth in float64, for every rule; above, one unit of the size more where
terms cancel until nothing but the rounding of a float32 sum is left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dpcompile
from dpcompile.clipping.weights import clip_weights, narrowed
from dpcompile.kernels import by_index, exact, rounding, squares
from dpcompile.kernels.by_index import norms_by_index, sums_and_sizes
from dpcompile.kernels.filter_op import filter_gradients, filter_norms
from dpcompile.kernels.norms import direct_norm, ghost_norm
from dpcompile.kernels.product_op import product_norms, product_with_norms
from dpcompile.kernels.products import own_product
from dpcompile.module import engine_of
from dpcompile.norms.ghost import Sides, ghost, outer

dp_compile: Any = dpcompile.dp_compile

RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ghost": lambda r, c: ghost([Sides(r, c)]),
    "ghost in panels": lambda r, c: ghost([Sides(r, c)], 3),
    "ghost, operator": ghost_norm,
    "redo": product_norms,
    "direct, operator": direct_norm,
    "keep": lambda r, c: product_with_norms(r, c, False)[1],
}


@contextlib.contextmanager
def flushed(wanted: bool) -> Iterator[None]:
    """Denormals are zero, as on GPUs."""
    torch.set_flush_denormal(wanted)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def true_norm(rows: Tensor, cols: Tensor) -> Tensor:
    return (rows.double().mT @ cols.double()).square().sum((1, 2, 3)).sqrt()


def size(rows: Tensor, cols: Tensor) -> Tensor:
    return (rows.double().norm(dim=3) * cols.double().norm(dim=3)).sum(2).norm(dim=1)


def assert_sound(squared: Tensor, truth: Tensor, sizes: Tensor) -> None:
    assert squared.dtype == torch.float64
    norms = squared.sqrt()
    assert (norms >= truth * (1 - 1e-5)).all(), (norms / truth).tolist()
    assert (norms <= truth * 1.001 + 2.0**-24 * (1 + 1e-3) * sizes).all(), (norms / truth).tolist()


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Sides whose product is a float32 matrix, its norm between 1e-25 and 1e36 or so."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    k, t = draw(st.sampled_from([(1, 1), (1, 2), (1, 7), (3, 5), (1, 64), (1, 300)]))
    p, d = draw(st.sampled_from([(1, 1), (3, 17), (40, 2), (16, 33)]))
    rows, cols = torch.randn(3, k, t, p), torch.randn(3, k, t, d)
    if t > 1 and draw(st.booleans()):  # positions cancel but for a little
        rows = rows - rows.mean(2, keepdim=True)
        cols = cols * 10.0 ** -draw(st.integers(0, 5)) + torch.randn(3, k, 1, d)
    if draw(st.booleans()):  # every position of another magnitude, which the other side undoes or not
        by_position = 10.0 ** torch.randint(-8, 9, (3, k, t, 1))
        rows, cols = rows * by_position, cols / by_position if draw(st.booleans()) else cols
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    if dtype == torch.float32:
        total = draw(st.integers(-14, 16))
        apart = draw(st.integers(-22, 22 - abs(total)))
        rows, cols = rows * 10.0 ** ((total + apart) // 2), cols * 10.0 ** ((total - apart) // 2)
    rows, cols = (x if dtype != torch.float16 else x.clamp(-6e4, 6e4) for x in (rows, cols))
    return rows.to(dtype).float(), cols.to(dtype).float()


@pytest.mark.parametrize("rule", list(RULES))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(sides=products(), flush=st.booleans())
def test_norms(rule: str, sides: tuple[Tensor, Tensor], flush: bool) -> None:
    rows, cols = sides
    with flushed(flush):
        found = RULES[rule](rows, cols)
        if rows.shape[2] == 1:
            assert_sound(outer(Sides(rows, cols)), true_norm(rows, cols), size(rows, cols))
    assert_sound(found, true_norm(rows, cols), size(rows, cols))


def one_way(n: int, low: float, high: float, left: float) -> tuple[Tensor, Tensor]:
    """Two vectors: in their inner products every addition rounds the same way, down in one and up in the other."""
    unit = 2.0**-12
    a, b = torch.zeros(n + 1), torch.zeros(n + 1)
    a[0] = b[0] = 1.0
    a[1:n], b[1:n] = unit * (1 - low), unit * (1 + high)
    a[n], b[n] = left, -left
    return a, b


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("n", [15, 95, 399, 2047])
@pytest.mark.parametrize("pairs", [1, 20])
def test_roundings_that_all_go_one_way(rule: str, n: int, pairs: int) -> None:
    """A bound for likely roundings let a norm of 2099 pass as 0."""
    for low, high in ((1e-3, 2.5e-3), (1e-2, 2.5e-2), (1e-4, 3e-4)):
        cols = torch.stack(one_way(n, low, high, 1e-3) * pairs)[None, None] * 2.0**20
        rows = torch.tensor([1.0, -1.0]).repeat(pairs)[None, None, :, None].repeat(1, 1, 1, 3)
        assert_sound(RULES[rule](rows, cols), true_norm(rows, cols), size(rows, cols))


@pytest.mark.parametrize("rule", ["ghost", "redo", "direct, operator"])
@pytest.mark.parametrize("t", [300, 4096])
def test_roundings_that_all_go_one_way_over_positions(rule: str, t: int) -> None:
    """The same in the sum over positions that a gradient is."""
    for sign in (1 - 1e-3, 1 + 1e-3):
        rows, cols = torch.full((2, 1, t, 4), 2.0**-24 * sign), torch.ones(2, 1, t, 5)
        rows[:, :, 0] = 1.0
        assert_sound(RULES[rule](rows, cols), true_norm(rows, cols), size(rows, cols))


def test_the_bounds_are_what_makes_it_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them, norms of terms that cancel are wrong."""
    cols = torch.randn(8, 1, 2, 400) * 1e-5 + torch.randn(8, 1, 1, 400)
    rows = torch.tensor([1.0, -1.0])[None, None, :, None].repeat(8, 1, 1, 3) * torch.randn(8, 1, 1, 3)
    for module in (exact, rounding, squares):
        monkeypatch.setattr(module, "CLOSE", float("inf"))
    with pytest.raises(AssertionError):
        assert_sound(product_norms(rows, cols), true_norm(rows, cols), size(rows, cols))
    with pytest.raises(AssertionError):
        assert_sound(product_with_norms(rows, cols, False)[1], true_norm(rows, cols), size(rows, cols))


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1.0, 1e15])
@pytest.mark.parametrize("compiled", [True, False])
def test_looked_up_rows(scale: float, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal indices of opposite sign; tied to a head, in one orientation and the other."""
    if not compiled:
        monkeypatch.setattr(by_index, "_library", lambda: None)
    index, cols = torch.randint(0, 5, (3, 12)), torch.randn(3, 1, 12, 4)
    index[0], cols[0] = index[0, :1], torch.where(torch.arange(12)[:, None] % 2 == 0, 1, -1) * cols[0, :, :1]
    cols = (cols + 1e-4 * torch.randn(cols.shape)) * scale
    hot = F.one_hot(index, 5).float().unsqueeze(1)
    for found in (norms_by_index(index, cols[:, 0]), sums_and_sizes(index, cols[:, 0])[0] * (1 + 1e-12)):
        assert_sound(found, true_norm(hot, cols), size(hot, cols))
    head = Sides(-torch.nn.functional.one_hot(index, 5).float().unsqueeze(1), cols * (1 + 1e-3))
    all_rows, all_cols = torch.cat([hot, head.rows], 2), torch.cat([cols, head.cols], 2)
    found = ghost([Sides(index, cols, "rows"), head])
    assert_sound(found, true_norm(all_rows, all_cols), size(all_rows, all_cols))
    turned = ghost([Sides(cols, index, "cols"), Sides(head.cols, head.rows)])
    assert_sound(turned, true_norm(all_rows, all_cols), size(all_rows, all_cols))


@pytest.mark.parametrize("scale", [1e-28, 1.0, 1e12])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cancelling", [0.0, 1e-4])
def test_filters(scale: float, transposed: bool, cancelling: float) -> None:
    options = ([2, 1], [1, 0], [1, 1], transposed, [0, 0], 2)
    weights = torch.randn(4, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 2, 4 if transposed else 6, 6, 5) * 1e3
    convolve = F.conv_transpose2d if transposed else F.conv2d
    outputs = convolve(x.double().flatten(0, 1), weights, None, *options[:2], groups=2).unflatten(0, (3, 2))
    g = torch.randn(outputs.shape)
    if cancelling:
        x, g = 1.0 + cancelling * x / 1e3, g - g.mean((1, 3, 4), keepdim=True)
    g *= scale
    outputs = convolve(x.double().flatten(0, 1), weights, None, *options[:2], groups=2).unflatten(0, (3, 2))
    each = [
        torch.autograd.grad((o * c.double()).sum(), weights, retain_graph=True)[0]
        for o, c in zip(outputs, g, strict=True)
    ]
    truth = torch.stack([e.norm() for e in each])
    sizes = g.double().flatten(1).norm(dim=1) * x.double().flatten(1).norm(dim=1) * 10
    arguments = (g, x, [4, 3, 3, 2], *options)
    for own in (True, False):
        for kept in (True, False):
            assert_sound(filter_gradients(*arguments, own, False, kept)[1], truth, sizes)
    assert_sound(filter_norms(*arguments), truth, sizes)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipping", ["flat", "automatic", lambda n: torch.full_like(n, 1e30)])
@pytest.mark.parametrize("bound", [1e-30, 1.0, 1e30])
def test_weights_of_any_norms(clipping: Any, bound: float) -> None:
    """No weight times norm above C; a norm that is no float32 number has weight 0."""
    norms = torch.tensor([0.0, 1e-45, 1e-30, 1e-19, 1.0, 1e19, 3e38, 4e38, 1e60, torch.inf, torch.nan]).double()
    norms[8] = 1e60
    weights = clip_weights(norms.square(), torch.ones(11), clipping=clipping, bound=bound, scale=torch.ones(11))
    for found in (weights, narrowed(weights, torch.float32)):
        assert found.isfinite().all() and (found >= 0).all()
        assert (found.double() * norms.clamp_max(1e60).nan_to_num() <= bound * (1 + 1e-7)).all()
        assert found[7:].tolist() == [0.0] * 4
    assert narrowed(torch.tensor([1e-40, 1e-37, 1e39]).double(), torch.float32).tolist() == pytest.approx(
        [0.0, 1e-37, torch.finfo(torch.float32).max]
    )


# --- whole models ----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A layer over positions, an embedding with its tied head, a convolution, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.conv, self.norm = nn.Conv1d(6, 6, 3, padding=1), nn.LayerNorm(6)

    def forward(self, index: Tensor, scale: Tensor) -> Tensor:
        h = self.table(index) * scale
        h = self.norm(h + self.conv(h.mT).mT + torch.tanh(self.layer(h)))
        return h @ self.table.weight.T


@pytest.mark.parametrize("norm", ["auto", "ghost", "redo", "direct", "instantiate"])
@pytest.mark.parametrize("options", [{}, {"regions": "blocks"}], ids=["whole", "regions"])
def test_models_of_odd_numbers(norm: str, options: dict[str, str]) -> None:
    """Activations of 1e15 and tiny cotangents in one example, denormals flushed, under a mean."""
    torch.manual_seed(0)
    model, index, scale = Net(), torch.randint(0, 7, (5, 9)), torch.ones(5, 1, 1)
    scale[1], scale[2] = 1e15, 1e-12
    truth = []
    double = Net().double()
    double.load_state_dict(model.state_dict())
    for i in range(5):
        loss = F.cross_entropy(double(index[i : i + 1], scale[i : i + 1].double()).mT, index[i : i + 1])
        grads = torch.autograd.grad(loss, list(double.parameters()))
        truth.append(torch.stack([g.norm() for g in grads]).norm())
    private = dp_compile(model, max_grad_norm=0.1, norm=norm, backend="eager", **options)
    with flushed(True):
        F.cross_entropy(private(index, scale).mT, index, reduction="none").mean(1).mean().backward()
    torch.testing.assert_close(private.grad_norms.double(), torch.stack(truth), rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", ["auto", "ghost", "redo", "direct", "instantiate"])
def test_one_row_of_huge_features_in_a_large_batch(norm: str) -> None:
    """Its share of the clipped sum is at most C."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 64, bias=False), nn.LayerNorm(64, elementwise_affine=False), nn.Linear(64, 5))
    net[2].requires_grad_(False)
    x, y = torch.randn(2048, 2, 4), torch.zeros(2048, dtype=torch.long)
    x[0] *= 5e17
    private, sums = dp_compile(net, norm=norm, backend="eager"), []
    for shown in (True, False):
        private.zero_grad()
        engine_of(private).ledger.clear()
        engine_of(private).set_mask(torch.tensor([shown] + [True] * 2047))
        F.cross_entropy(private(x).mean(1), y).backward()
        sums.append(private[0].weight.grad.clone())
    assert (sums[0] - sums[1]).norm() <= 1.001


def test_products_keep_their_precision() -> None:
    """Whatever the model's products may be."""
    a, b = torch.randn(3, 20, 30), torch.randn(3, 30, 40)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = own_product(a, b)
        norms = product_with_norms(a.mT.unsqueeze(1).contiguous(), b.unsqueeze(1), False)[1]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    truth = a.double() @ b.double()
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norms, truth.square().sum((1, 2)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", ["ghost", "redo", "instantiate"])
def test_clipped_sums_keep_their_precision(norm: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(64, 48, bias=False), torch.randn(6, 3, 64)
    truth = [
        torch.einsum("tp,td->pd", o, i)
        for o, i in zip(2 * (x @ net.weight.T).detach().double(), x.double(), strict=True)
    ]
    wanted = sum(g / g.norm() for g in truth)
    before = torch.get_float32_matmul_precision()
    private = dp_compile(net, norm=norm, backend="eager", loss_reduction="sum")
    out = private(x).square().sum()
    try:
        torch.set_float32_matmul_precision("medium")
        out.backward()
    finally:
        torch.set_float32_matmul_precision(before)
    found = private.weight.grad.double()
    # The cotangents are the model's own; they are float32 here, as the forward was.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["ghost_clipping", "mixed_ghost_clipping", "two_pass"])
def test_a_second_backward_in_bfloat16_is_off_by_less_than_a_hundredth(norm: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).bfloat16()
    options = {"regions": "blocks"} if norm == "two_pass" else {}
    private, x = dp_compile(net, norm=norm, backend="eager", max_grad_norm=0.1, **options), torch.randn(4, 64)
    for i in range(4):
        engine_of(private).set_mask(torch.arange(4) == i)
        private(x.bfloat16()).float().square().sum(1).mean().backward()
        shares = [engine_of(private).ledger.total(n) for n in engine_of(private).trainable()]
        assert 0.099 <= torch.cat([s.double().flatten() for s in shares if s is not None]).norm() <= 0.101
        private.zero_grad()
        engine_of(private).ledger.clear()
