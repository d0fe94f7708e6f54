"""Batches of users: the gradient of all of a user's rows is clipped; held against one backward for each user."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Gradients, assert_right, clip, per_example_gradients
from torch import Tensor, nn
from torch.nn import functional as F

import dpcompile
from dpcompile import AdaptiveClip, DPCompileError, DPOptimizer, ExampleMixingError, PrivacyError, UnsupportedGraphError
from dpcompile.module import engine_of

dp_compile: Any = dpcompile.dp_compile
K, ROWS = 3, 12
TOLERANCE = 1e-4  # norms that are not kept are certain: a little too large
SOME = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0, 0, 1, 0, 1], dtype=torch.bool)  # a whole user, parts of two, and none


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.max_pool2d(self.norm(self.conv(x)).relu(), 2).flatten(1))


class Language(nn.Module):
    """One number in a row of its own is picked by row number, as classifiers on sequences do."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.out = nn.Embedding(11, 8), nn.Linear(8, 5)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(self.tok(x))
        return self.out(h[torch.arange(len(x), device=x.device), x.argmax(1)] + h.mean(1))


class Recurrent(nn.Module):
    """Positions first."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.rnn, self.out = nn.Embedding(11, 8), nn.GRU(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(self.tok(x.mT))[0][-1])


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convolutional": (Convolutional, lambda: torch.randn(ROWS, 1, 8, 8)),
    "language": (Language, lambda: torch.randint(0, 11, (ROWS, 6))),
    "recurrent": (Recurrent, lambda: torch.randint(0, 11, (ROWS, 6))),
}


def loss(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y, reduction="none")


def of_users(model: nn.Module, x: Tensor, y: Tensor, mask: Tensor | None, k: int = K) -> Gradients:
    """``[U, *shape]``: of the sum of the losses of each user's rows."""
    found = per_example_gradients(model, (x,), {}, lambda output, rows: loss(output, y[rows]))
    keep = torch.ones(len(x), dtype=torch.bool) if mask is None else mask
    weigh = keep.double().view(-1, k)
    return {n: torch.einsum("uk,uk...->u...", weigh, g.unflatten(0, (-1, k))) for n, g in found.items()}


def users(mask: Tensor | None, k: int = K) -> Tensor | None:
    return None if mask is None else mask.view(-1, k).any(1)


def stepped(name: str, mask: Tensor | None, reduction: str = "mean", k: int = K, **options: Any) -> tuple[Any, Any]:
    """A private model after a backward, and what it should have come to."""
    make, inputs = MODELS[name]
    torch.manual_seed(1)
    model, x, y = make(), inputs(), torch.randint(0, 5, (ROWS,))
    gradients = of_users(model, x, y, mask if k > 1 else None, k)  # a row that is a user has weight 0, and its norm
    norms = clip(gradients, 1.0).norms
    bound = norms[norms > 0].median().item() * 1.01
    options = {"backend": "eager", "loss_reduction": reduction, **options}
    private = dp_compile(model, max_grad_norm=bound, examples_per_user=k, **options)
    if mask is not None:
        dpcompile.set_mask(private, mask)
    each = loss(private(x), y)
    (each.mean() if reduction == "mean" else each.sum()).backward()
    groups = {n: n.rpartition(".")[0] for n in gradients} if options.get("clipping") == "per_layer" else None
    return private, clip(gradients, bound, mask=users(mask, k), groups=groups)


@pytest.mark.parametrize("norm", ["auto", "ghost", "instantiate", "redo", "two_pass"])
@pytest.mark.parametrize("mask", [None, SOME], ids=["whole", "some rows"])
@pytest.mark.parametrize("name", MODELS)
def test_every_rule(name: str, mask: Tensor | None, norm: str) -> None:
    private, truth = stepped(name, mask, norm=norm)
    found, real = engine_of(private).row_norms, truth.norms > 0
    assert (found.double() / truth.norms)[real].min() >= 1 - 3e-7, "a norm is too small"
    assert_right(private, truth, TOLERANCE)


@pytest.mark.parametrize("mask", [None, SOME], ids=["whole", "some rows"])
@pytest.mark.parametrize(
    "options",
    [{"regions": "blocks"}, {"check": True}, {"reduction": "sum"}, {"clipping": "per_layer"}, {"k": 1}, {"k": ROWS}],
    ids=str,
)
def test_every_way(options: dict[str, Any], mask: Tensor | None) -> None:
    if mask is not None and options.get("k") == ROWS:
        pytest.skip("see test_a_loss_inside")
    assert_right(*stepped("convolutional", mask, **options), TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_through_inductor(name: str) -> None:
    assert_right(*stepped(name, SOME, backend="inductor"), TOLERANCE)


@pytest.mark.full
def test_in_parts() -> None:
    """Under a budget the batch runs in parts, of whole users."""
    private, truth = stepped("convolutional", SOME, memory_budget=1)
    assert private.plan.parts > 1
    assert_right(private, truth, TOLERANCE)


def test_one_user_changes_sums_by_no_more_than_c() -> None:
    """All rows of a user, as large as they may be: the user counts once."""
    torch.manual_seed(1)
    private = dp_compile(nn.Linear(4, 1, bias=False), max_grad_norm=0.5, examples_per_user=K, backend="eager")
    x = torch.randn(1, 4).expand(ROWS, 4).clone()
    private(x).sum(1).mean().backward()
    assert torch.allclose(private.weight.grad.norm(), torch.tensor(0.5 * ROWS / K))
    assert len(private.grad_norms) == ROWS // K


def test_votes_are_users() -> None:
    torch.manual_seed(1)
    model, x, y = Convolutional(), torch.randn(ROWS, 1, 8, 8), torch.randint(0, 5, (ROWS,))
    norms = clip(of_users(model, x, y, SOME), 1.0).norms
    bound = norms[users(SOME)].median().item() * 1.01  # type: ignore[index]
    private = dp_compile(model, max_grad_norm=bound, examples_per_user=K, backend="eager")
    inner = torch.optim.SGD(private.parameters(), lr=0.1)
    DPOptimizer(
        inner, private, noise_multiplier=1.0, expected_batch_size=2, seed=1, adaptive_clip=AdaptiveClip(initial=bound)
    )
    dpcompile.set_mask(private, SOME)
    loss(private(x), y).mean().backward()
    assert int(engine_of(private).ledger.votes or 0) == 2 - 1  # of three users, the median among them


def test_gradients_of_inputs_are_those_of_the_loss() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    x = torch.randn(ROWS, 4, requires_grad=True)
    (wanted,) = torch.autograd.grad(model(x).square().sum(1)[SOME].sum() / ROWS, x)
    private = dp_compile(model, examples_per_user=K, backend="eager")
    dpcompile.set_mask(private, SOME)
    private(x).square().sum(1).mean().backward()
    assert x.grad is not None
    whole_users = users(SOME).repeat_interleave(K)  # type: ignore[union-attr]
    torch.testing.assert_close(x.grad[whole_users], wanted[whole_users])


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x)
        return hidden, self.last(hidden.tanh())


def test_an_output_that_the_loss_has_no_use_for() -> None:
    torch.manual_seed(1)
    model, x, y = Hidden(), torch.randn(ROWS, 4), torch.randint(0, 5, (ROWS,))
    found = per_example_gradients(model, (x,), {}, lambda output, rows: loss(output[1], y[rows]))
    weigh = SOME.double().view(-1, K)
    gradients = {n: torch.einsum("uk,uk...->u...", weigh, g.unflatten(0, (-1, K))) for n, g in found.items()}
    private = dp_compile(model, max_grad_norm=0.5, examples_per_user=K, backend="eager")
    dpcompile.set_mask(private, SOME)
    loss(private(x)[1], y).mean().backward()
    assert_right(private, clip(gradients, 0.5, mask=users(SOME)), TOLERANCE)


# --- refusals --------------------------------------------------------------------------------------------------------


class MeanOfBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().mean()


def test_a_loss_inside() -> None:
    """Right for whole users, and refused where rows of a user would have to be left out of it."""
    torch.manual_seed(1)
    model, x = MeanOfBatch(), torch.randn(ROWS, 4)
    found = per_example_gradients(model, (x,), {}, lambda output, rows: output.reshape(1))
    gradients = {n: g.unflatten(0, (-1, K)).sum(1) for n, g in found.items()}
    private = dp_compile(model, max_grad_norm=0.3, examples_per_user=K, backend="eager")
    private(x).backward()
    assert_right(private, clip(gradients, 0.3), TOLERANCE)
    dpcompile.set_mask(private, SOME)
    with pytest.raises(UnsupportedGraphError, match="a loss over all rows, or the batch is one user"):
        private(x)
    dpcompile.set_mask(private, users(SOME).repeat_interleave(K))  # type: ignore[union-attr]
    private(x).backward()


class Mixes(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.linear, self.rows = nn.Linear(4, 4), rows

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).unflatten(0, (-1, self.rows))
        return (y + y.mean(1, keepdim=True)).flatten(0, 1)


def test_rows_of_one_user_may_mix_and_users_may_not() -> None:
    torch.manual_seed(1)
    x = torch.randn(ROWS, 4)
    model = Mixes(K)
    each = [
        torch.autograd.grad(model(x[i : i + K]).square().sum(), list(model.parameters())) for i in range(0, ROWS, K)
    ]
    named = dict(zip(dict(model.named_parameters()), zip(*each, strict=True), strict=True))
    gradients = {n: torch.stack(g).double() for n, g in named.items()}
    private = dp_compile(model, max_grad_norm=2.0, examples_per_user=K, backend="eager")
    private(x).square().sum(1).mean().backward()
    assert_right(private, clip(gradients, 2.0), TOLERANCE)
    with pytest.raises(ExampleMixingError):
        dp_compile(Mixes(2 * K), examples_per_user=K, backend="eager")(x)
    with pytest.raises(ExampleMixingError):
        dp_compile(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), examples_per_user=K, backend="eager")(x)


class Merges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).unflatten(0, (-1, K)).mean(1)


def test_an_output_without_rows_is_refused() -> None:
    private = dp_compile(Merges(), examples_per_user=K, backend="eager")
    with pytest.raises(UnsupportedGraphError, match=r"\[4, 4\], has no row for each of the 3 rows of a user"):
        private(torch.randn(ROWS, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples_per_user": 0}, "must be an integer, 1 or more, got 0"),
        ({"examples_per_user": True}, "must be an integer, 1 or more, got True"),
        ({"examples_per_user": 2, "dynamic": True}, "dynamic=True with examples_per_user"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DPCompileError, match=re.escape(message)):
        dp_compile(nn.Linear(2, 2), **options)


def test_rows_that_are_no_whole_users() -> None:
    private = dp_compile(nn.Linear(4, 4), examples_per_user=K, backend="eager")
    with pytest.raises(DPCompileError, match="has 10 rows, which is no multiple of examples_per_user=3"):
        private(torch.randn(10, 4))
    with torch.no_grad():
        assert private(torch.randn(10, 4)).shape == (10, 4)
    dpcompile.set_mask(private, SOME[:9])
    with pytest.raises(PrivacyError, match="the padding mask has 9 entries for a batch of 12"):
        private(torch.randn(ROWS, 4))


def test_batches_of_other_sizes_are_compiled_anew() -> None:
    torch.manual_seed(1)
    model = nn.Linear(4, 5)
    private = dp_compile(model, max_grad_norm=0.5, examples_per_user=K, backend="eager")
    for count in (1, 2, 5, 3):
        x, y = torch.randn(count * K, 4), torch.randint(0, 5, (count * K,))
        private.zero_grad()
        loss(private(x), y).mean().backward()
        assert_right(private, clip(of_users(model, x, y, None), 0.5), TOLERANCE)
