"""Every example's gradient of a convolution's filters: our kernel, torch's convolution, and models that use them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import PseudoLoss, assert_right, assert_safe, clip, per_example_gradients, train_step
from torch import Tensor, nn

import dpcompile
from dpcompile.kernels import build, filter_op, filters
from dpcompile.kernels.filter_op import filter_gradients, filter_norms, grouped_convolution
from dpcompile.kernels.filters import Geometry, fullness, has_kernel
from dpcompile.norms import convolutions

dp_compile: Any = dpcompile.dp_compile
CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
TRANSPOSED = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}


def test_there_is_a_kernel() -> None:
    """Without one the tests below would compare torch with torch."""
    assert has_kernel()


def lengths(least: int, most: int, space: int) -> st.SearchStrategy[list[int]]:
    """A number for each dimension of space."""
    return st.lists(st.integers(least, most), min_size=space, max_size=space)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A convolution of any kind, and how its operands lie in memory."""
    space, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inside, outside = draw(st.sampled_from([1, 2, 3, 7, 8, 11, 17, 35])), draw(st.sampled_from([1, 3, 8, 9, 20]))
    return {
        "batch": draw(st.sampled_from([1, 2, 3, 9])),
        "frames": draw(st.integers(1, 2)),
        "channels": groups * (inside if groups == 1 else min(inside, 3)),
        "filters": groups * (outside if groups == 1 else min(outside, 9)),
        "groups": groups,
        "spatial": draw(lengths(4, 7, space)),
        "kernel": draw(lengths(1, 3, space)),
        "stride": draw(lengths(1, 2, space)),
        "padding": draw(lengths(0, 2, space)),
        "dilation": draw(lengths(1, 2, space)),
        "transposed": draw(st.booleans()),
        "lying": draw(st.sampled_from(["channels first", "channels last", "gaps", "one for all"])),
    }


def laid_out(value: Tensor, how: str) -> Tensor:
    """The same values, otherwise in memory."""
    if how == "channels last":
        return value.movedim(2, -1).contiguous().movedim(-1, 2)
    if how == "gaps":
        return torch.cat([value, value], -1)[..., : value.shape[-1]]
    if how == "one for all":
        return value[:1].expand_as(value)
    return value


def problem(case: dict[str, Any]) -> tuple[tuple[Any, ...], Tensor] | None:
    """The operation's arguments, and what is right in float64; None where the filters do not fit into the image."""
    torch.manual_seed(0)
    space = len(case["spatial"])
    options: dict[str, Any] = {k: case[k] for k in ("stride", "padding", "dilation", "groups")}
    sizes = case["channels"], case["filters"]
    shape = [sizes[not case["transposed"]], sizes[case["transposed"]] // case["groups"], *case["kernel"]]
    convolve = (TRANSPOSED if case["transposed"] else CONVOLUTIONS)[space]
    x = torch.randn(case["batch"], case["frames"], case["channels"], *case["spatial"])
    x = laid_out(x, case["lying"])
    weights = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    try:
        outputs = [convolve(images.double(), weights, None, **options) for images in x]
    except RuntimeError:
        return None
    g = laid_out(torch.stack([torch.randn(o.shape) for o in outputs]), case["lying"])
    wanted = [torch.autograd.grad(o, weights, c.double())[0] for o, c in zip(outputs, g, strict=True)]
    rest = (case["stride"], case["padding"], case["dilation"], case["transposed"], [0] * space, case["groups"])
    return (g, x, shape, *rest), torch.stack(wanted)


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_any_convolution(case: dict[str, Any]) -> None:
    """Gradients and norms are right, with the gradients kept and without, and lie with their channels last."""
    made = problem(case)
    if made is None:
        return
    arguments, wanted = made
    for own in (True, False):
        each, norms = filter_gradients(*arguments, own, False)
        assert each.movedim(2, -1).is_contiguous()
        torch.testing.assert_close(each, wanted.float(), rtol=1e-4, atol=1e-4)
        assert certain(norms, wanted)
    assert certain(filter_norms(*arguments), wanted)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_sizes_by_the_kernel_are_those_of_torch(case: dict[str, Any]) -> None:
    """Too small a size would let too small a norm pass."""
    made = problem(case)
    if made is None:
        return
    (g, x, shape, stride, padding, dilation, transposed, _, groups), _ = made
    small, large = (x, g) if transposed else (g, x)
    geometry = Geometry(shape, stride, padding, dilation, groups)
    _, sizes = filters.gradients_(large, small, geometry, None)
    torch.testing.assert_close(sizes, filter_op._sizes(small, large, geometry), rtol=1e-12, atol=0)


def certain(squared: Tensor, gradients: Tensor) -> bool:
    """Squared norms are right, or too large by a thousandth of the norm."""
    wanted = gradients.flatten(1).square().sum(1)
    return bool((squared >= wanted * (1 - 1e-5) - 1e-9).all() and (squared <= wanted * 1.002 + 1e-5).all())


PLAIN: dict[str, Any] = {
    "batch": 3, "frames": 2, "channels": 4, "filters": 6, "groups": 2, "spatial": [6, 5], "kernel": [3, 2],
    "stride": [2, 1], "padding": [1, 0], "dilation": [1, 1], "transposed": False, "lying": "channels first",
}  # fmt: skip


@pytest.mark.parametrize("at_once", [1, 2**30])
@pytest.mark.parametrize("transposed", [False, True])
def test_torch_some_examples_at_a_time(at_once: int, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Example by example, in one go or each by itself; no example at all."""
    monkeypatch.setattr(filter_op, "_AT_ONCE", at_once)
    made = problem(PLAIN | {"transposed": transposed})
    assert made is not None
    (g, x, *rest), wanted = made
    torch.testing.assert_close(grouped_convolution(g, x, *rest), wanted.float())
    for own, reuse in ((False, False), (False, True), (True, True)):
        torch.testing.assert_close(filter_gradients(g, x, *rest, own, reuse)[0], wanted.float())
    for own in (False, True):
        torch.library.opcheck(filter_gradients, (g, x, *rest, own, False))
        each, norms = filter_gradients(g[:0], x[:0], *rest, own, False)
        assert (each.shape, norms.shape) == ((0, *rest[0]), (0,))
    torch.library.opcheck(filter_norms, (g, x, *rest))


def test_float64_is_torchs() -> None:
    made = problem(PLAIN)
    assert made is not None
    (g, x, *rest), _ = made
    each, norms = filter_gradients(g.double(), x.double(), *rest, True, False)
    assert each.dtype == norms.dtype == torch.float64
    torch.testing.assert_close(each, grouped_convolution(g.double(), x.double(), *rest))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_example_that_is_not_finite_is_alone(bad: float) -> None:
    """Also where tiles reach over the last channel, and images over their borders."""
    made = problem(PLAIN | {"channels": 10, "filters": 9, "groups": 1, "frames": 1, "batch": 5})
    assert made is not None
    (g, x, *rest), wanted = made
    for poisoned in (g, x):
        before = poisoned[2].clone()
        poisoned[2] = bad
        each, norms = filter_gradients(g, x, *rest, True, False)
        alone = filter_norms(g, x, *rest)
        poisoned[2] = before
        assert norms.isfinite().tolist() == alone.isfinite().tolist() == [i != 2 for i in range(5)]
        keep = [0, 1, 3, 4]
        torch.testing.assert_close(each[keep], wanted[keep].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [1, 2, 40])
def test_any_number_of_threads(threads: int, batch: int) -> None:
    """Few examples are worked on in parts; the gradients do not depend on it."""
    made = problem(PLAIN | {"batch": batch, "channels": 5, "filters": 35, "groups": 1})
    assert made is not None
    arguments, wanted = made
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        each, norms = filter_gradients(*arguments, True, False)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(each, filter_gradients(*arguments, True, False)[0])
    torch.testing.assert_close(norms, wanted.flatten(1).square().sum(1), rtol=1e-4, atol=1e-5)


@pytest.fixture
def fresh_kernel() -> Iterator[None]:
    """Found anew, here and behind."""
    filters._library.cache_clear()
    yield
    filters._library.cache_clear()


@pytest.mark.usefixtures("fresh_kernel")
def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is there one without a compiler: gradients are torch's then."""
    made = problem(PLAIN)
    assert made is not None
    arguments, wanted = made

    def library() -> Any:
        def dp_filter_workspace(*arguments: Any) -> int:
            return 1

        return SimpleNamespace(dp_filter_workspace=dp_filter_workspace, dp_filter_gradients=lambda *arguments: None)

    for source in (library, lambda: 1 / 0):
        filters._library.cache_clear()
        monkeypatch.setattr(build, "compile_cpp", lambda code, source=source, **options: source())
        assert not has_kernel()
        torch.testing.assert_close(filter_gradients(*arguments, True, False)[0], wanted.float())
        assert certain(filter_norms(*arguments), wanted)


@pytest.mark.parametrize(
    "change",
    [
        {"stride": [1]},
        {"padding": [0, 0]},
        {"dilation": [4, 1]},
        {"groups": 1},
        {"shape": [7, 2, 3, 2]},
        {"shape": [6, 2, 3]},
    ],
)
def test_what_does_not_fit_is_an_error(change: dict[str, Any]) -> None:
    """The kernel would read and write where there is nothing."""
    made = problem(PLAIN)
    assert made is not None
    (g, x, shape, stride, padding, dilation, *_), _ = made
    geometry = {"shape": shape, "stride": stride, "padding": padding, "dilation": dilation, "groups": 2}
    filters.gradients_(x, g, Geometry(**geometry), None)
    with pytest.raises(ValueError, match=r"Geometry\(.*on images \(3, 2, 4, 6, 5\) and cotangents"):
        filters.gradients_(x, g, Geometry(**{**geometry, **change}), None)


def test_one_number_for_all_dimensions() -> None:
    """As convolutions with ``padding="same"`` and some exporters write them."""
    torch.manual_seed(0)

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filters = nn.Parameter(torch.randn(8, 8, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            options = [1], [1], [1], False, [0], 1
            return torch.ops.aten.convolution.default(x, self.filters, None, *options).mean((2, 3))

    for norm in ("per_example", "redo"):
        model, x, loss = Same(), torch.randn(3, 8, 4, 4), PseudoLoss(3)
        truth = clip(per_example_gradients(model, (x,), {}, loss), 0.5)
        private = dp_compile(model, max_grad_norm=0.5, backend="eager", norm=norm)
        train_step(private, (x,), {}, loss)
        assert_safe(private, truth, 1e-3)


def test_fullness() -> None:
    def of(shape: list[int], groups: int = 1, dilation: int = 1) -> float:
        space = len(shape) - 2
        return fullness(Geometry(shape, [1] * space, [0] * space, [dilation] * space, groups))

    assert of([64, 64, 3, 3]) == 1.0
    assert of([32, 3, 3, 3]) == 9 / 16
    assert of([32, 3, 3, 3], dilation=2) == 3 / 16
    assert of([64, 1, 3, 3], groups=64) == 1 / 8 / 16
    assert of([8, 8, 3, 3, 3, 3]) == 0.0


class Net(nn.Module):
    """Convolutions: of few channels, strided, dilated, transposed, in groups, one for each channel, shared."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.strided = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(16, 16, 3, dilation=2, padding=2)
        self.grouped = nn.Conv2d(16, 32, 1, groups=2)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32, padding=1)
        self.up = nn.ConvTranspose2d(32, 8, 2, stride=2)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.grouped(self.dilated(self.strided(torch.tanh(self.first(x))))))
        h = self.up(torch.tanh(self.depthwise(h)))
        return self.twice(torch.tanh(self.twice(h))).mean((2, 3))


NORMS = ["auto", "per_example", "instantiate", "ghost", "redo", "bk_mix_opt", "two_pass"]


@pytest.mark.parametrize(("norm", "budget"), [("auto", 0.5), *((norm, None) for norm in NORMS)])
def test_models(norm: str, budget: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right by every rule and under a budget; an example that is not finite leaves no trace."""
    used = []
    whole = convolutions.filter_gradients
    monkeypatch.setattr(convolutions, "filter_gradients", lambda *a: used.append(a[-3]) or whole(*a))
    torch.manual_seed(0)
    model, x, loss = Net(), torch.randn(4, 3, 6, 6), PseudoLoss(4)
    truth = clip(per_example_gradients(model, (x,), {}, loss), 0.5)
    private = dp_compile(model, max_grad_norm=0.5, backend="eager", norm=norm, memory_budget=budget)
    train_step(private, (x,), {}, loss)
    assert_right(private, truth, 1e-5)
    truth = clip(per_example_gradients(model, (x,), {}, PseudoLoss(5)), 0.5)
    private.zero_grad()
    with pytest.warns(RuntimeWarning, match="1 of 5 examples"):
        train_step(private, (torch.cat([x, x[:1] * torch.nan]),), {}, PseudoLoss(5))
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad.double(), truth.sums[name], rtol=1e-4, atol=1e-5)
    if norm in ("auto", "per_example", "instantiate") and budget is None:
        assert True in used and False in used  # our kernel, and torch's for the filters of one channel each


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    """Narrow ones are widened before the kernel sees them; wide ones are torch's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 2)).to(dtype)
    x, loss = torch.randn(4, 3, 4, 4), PseudoLoss(4)
    truth = clip(per_example_gradients(model, (x.to(dtype),), {}, loss), 0.5)
    private = dp_compile(model, max_grad_norm=0.5, backend="eager", norm="per_example")
    train_step(private, (x.to(dtype),), {}, loss)
    assert_right(private, truth, 1e-5 if dtype == torch.float64 else 3e-2)
