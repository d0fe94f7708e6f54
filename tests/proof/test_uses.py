"""What one call cannot show: draws of dropout, modes that change, parameters frozen later, copies of models."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dpcompile
from dpcompile import DPCompileError

dp_compile: Any = dpcompile.dp_compile

B, T, D = 5, 3, 6


class Dropped(nn.Module):
    """Two layers with randomness between them; it returns what was drawn."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(D, D), nn.Linear(D, 3), how

    def draw(self, x: Tensor) -> Tensor:
        if self.how == "dropout":
            return nn.functional.dropout(torch.ones_like(x), 0.5)
        if self.how == "channels":
            return nn.functional.dropout1d(torch.ones_like(x), 0.5)
        if self.how == "noise":
            return torch.randn_like(x)
        if self.how == "gumbel":
            return -torch.empty_like(x).exponential_().log()
        if self.how == "depth":
            return torch.bernoulli(torch.full((len(x), 1, 1), 0.5)).expand_as(x)
        return torch.rand(x.shape) * torch.randint(0, 3, (len(x), 1, 1))

    def forward(self, x: Tensor, drawn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if drawn is None:
            drawn = self.draw(x)
        return self.b(self.a(x).tanh() * drawn), drawn.detach()


class Checkpointed(Dropped):
    """The same draw again in the backward."""

    def forward(self, x: Tensor, drawn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return checkpoint(super().forward, x, drawn, use_reentrant=False)  # type: ignore[return-value]


class FirstOutput(PseudoLoss):
    """A loss of the first output."""

    def __call__(self, output: Any, rows: slice) -> Tensor:
        return super().__call__(output[0], rows)


def right(model: nn.Module, private: Any, *args: Tensor, loss: Any = None, bound: float = 0.5) -> None:
    """The clipped sums that stand in ``p.grad`` are those of these arguments."""
    loss = loss or PseudoLoss(B)
    assert_right(private, clip(per_example_gradients(model, args, {}, loss), bound), 1e-4)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [Dropped, Checkpointed])
@pytest.mark.parametrize("how", ["dropout", "channels", "noise", "gumbel", "depth", "uniform"])
def test_every_example_has_a_draw_of_its_own(how: str, kind: type[Dropped], backend: str) -> None:
    """Gradients are those of the draw that the forward used, example by example; the next step draws anew."""
    model, x = kind(how), torch.randn(B, T, D)
    private = dp_compile(model, max_grad_norm=0.5, backend=backend)
    drawn = []
    for _ in range(2):
        private.zero_grad()
        drawn.append(train_step(private, (x,), {}, FirstOutput(B))[1])
        right(model, private, x, drawn[-1], loss=FirstOutput(B))
    assert not torch.equal(*drawn)
    assert len({tuple(row.flatten().tolist()) for step in drawn for row in step}) >= 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    """Both kinds compute the layer again; the oracle runs the plain layer."""

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.plain = nn.Linear(D, D), nn.Linear(D, 3), False

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            if self.plain:
                return self.b(x).tanh()
            return checkpoint(lambda y: self.b(y).tanh(), x, use_reentrant=reentrant)  # type: ignore[return-value]

    model, x = Inside(), torch.randn(B, D)
    private = dp_compile(model, max_grad_norm=0.5, backend="eager")
    train_step(private, (x,), {}, PseudoLoss(B))
    model.plain = True
    right(model, private, x)


def test_train_and_eval_take_turns() -> None:
    """Each mode has a graph of its own; norm layers with statistics are refused in one of them."""
    model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Linear(D, 3))
    private, x = dp_compile(model, max_grad_norm=0.5, backend="eager"), torch.randn(B, D)
    for _ in range(2):
        private.eval()
        private.zero_grad()
        train_step(private, (x,), {}, PseudoLoss(B))
        right(model.eval(), private, x)
        private.train()
        private.zero_grad()
        train_step(private, (x,), {}, PseudoLoss(B))
        assert private.training and model.training
        with pytest.raises(AssertionError):  # a draw of its own
            right(copy.deepcopy(model).eval(), private, x)


def test_parameters_are_frozen_and_thawed_between_calls() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3))
    private, x = dp_compile(model, max_grad_norm=0.5, backend="eager"), torch.randn(B, D)
    for frozen in (False, True, False):
        model[0].requires_grad_(not frozen)
        private.zero_grad(set_to_none=True)
        train_step(private, (x,), {}, PseudoLoss(B))
        right(model, private, x)


def test_a_hook_or_flag_that_changes_recompiles() -> None:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scale, self.kind = nn.Linear(D, 3), 1.0, "tanh"

        def forward(self, x: Tensor) -> Tensor:
            return getattr(torch, self.kind)(self.a(x)) * self.scale

    model, x = Flagged(), torch.randn(B, D)
    private = dp_compile(model, max_grad_norm=0.5, backend="eager")
    for scale, kind in ((1.0, "tanh"), (2.5, "tanh"), (2.5, "sin")):
        model.scale, model.kind = scale, kind
        private.zero_grad()
        train_step(private, (x,), {}, PseudoLoss(B))
        right(model, private, x)


class Copied(nn.Module):
    """A model that can be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_of_private_models_are_private(duplicate: Any, used: bool) -> None:
    x = torch.randn(B, D)
    private = dp_compile(Copied(), max_grad_norm=0.5, backend="eager")
    if used:
        train_step(private, (x,), {}, PseudoLoss(B))
        private.zero_grad()
    copied = duplicate(private)
    train_step(copied, (x,), {}, PseudoLoss(B))
    plain = Copied()
    plain.load_state_dict(copied.state_dict())
    right(plain, copied, x)
    assert all(p.grad is None for p in private.parameters()) and not copied.a.weight.is_set_to(private.a.weight)


def test_a_moving_average_of_a_private_model() -> None:
    """``torch.optim.swa_utils.AveragedModel`` averages the parameters, and its copy is private too."""
    x = torch.randn(B, D)
    private = dp_compile(Copied(), max_grad_norm=0.5, backend="eager")
    average: Any = torch.optim.swa_utils.AveragedModel(private)
    train_step(private, (x,), {}, PseudoLoss(B))
    average.update_parameters(private)
    assert torch.equal(average.module.a.weight, private.a.weight)
    with torch.no_grad():
        torch.testing.assert_close(average(x), private(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_call(dtype: torch.dtype) -> None:
    model, x = Copied(), torch.randn(B, D)
    private = dp_compile(model, max_grad_norm=0.5, backend="eager")
    with torch.autocast("cpu", dtype):
        output = private(x)
    assert output.dtype == dtype
    PseudoLoss(B)(output.float(), slice(None)).mean().backward()
    assert_right(private, clip(per_example_gradients(model, (x,), {}, PseudoLoss(B)), 0.5), 5e-2)


def test_an_output_that_overlaps_in_memory() -> None:
    """AOTAutograd would lose cotangents of positions that share memory."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(D, D)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.a(x)
            return x.unfold(1, 2, 1), x.unfold(2, 3, 2).flatten(2)

    model, x = Windows(), torch.randn(B, T, D)
    for dynamic in (False, True):
        private = dp_compile(model, max_grad_norm=0.5, backend="eager", dynamic=dynamic)
        private.zero_grad()
        train_step(private, (x,), {}, PseudoLoss(B))
        right(model, private, x)


class Aside(nn.Module):
    """Returns, or keeps, values that depend on no example."""

    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.table = nn.Linear(D, 3), nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.kept = self.a.weight.square().sum()
        return self.a(x), self.a.weight * 2, self.table(self.table.weight)


def test_outputs_that_depend_on_no_example() -> None:
    """They are returned; a gradient through them is refused when it comes."""
    model, x = Aside(), torch.randn(B, D)
    private = dp_compile(copy.deepcopy(model), max_grad_norm=0.5, backend="eager")
    train_step(private, (x,), {}, FirstOutput(B))
    right(model, private, x, loss=FirstOutput(B))
    message = r"does not come from the examples[\s\S]*test_uses.py[\s\S]*what to do"
    for pick in (lambda out: out[1], lambda out: out[2], lambda out: private.kept):
        out = private(x)
        with pytest.raises(DPCompileError, match=message):
            (out[0].sum(1).mean() + pick(out).sum()).backward()


def test_a_penalty_on_the_gradient_of_the_inputs() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, D), nn.Linear(D, 1)

        def forward(self, x: Tensor) -> Tensor:
            gradient = torch.func.grad(lambda z: self.b(self.a(z).tanh()).sum())(x)
            return (gradient.norm(dim=1) - 1).square() + self.b(self.a(x).tanh()).squeeze(1)

    model, x = Penalised(), torch.randn(B, D)
    private = dp_compile(model, max_grad_norm=0.5, backend="eager")
    train_step(private, (x,), {}, PseudoLoss(B))
    right(model, private, x)
