"""``validate``: every problem at once, none that is not there, and nothing changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dpcompile import ExampleMixingError, PrivacyError, UnsupportedGraphError, dp_compile, validate


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        features = self.linear(x)
        return features - features.mean(0)


class Counts(nn.Module):
    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x):
        self.seen.add_(x.detach().sum(0))
        return self.linear(x)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.InstanceNorm2d(8, track_running_stats=True))
        self.centred, self.counts = Centred(), Counts()
        self.fine = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.counts(self.centred(self.stem(x).mean((2, 3))))
        return self.head(self.fine(x)).softmax(0)


def test_every_problem_at_once():
    """Two layers, two parts that mix in ways of their own, and the model's own forward behind them."""
    model = Several()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = validate(model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    told = [str(p) for p in found]
    for text, wanted in zip(told, ("BatchNorm2d 'stem.1'", "InstanceNorm2d 'stem.2'", "features - features.mean(0)",
                                   "buffer 'seen'", "softmax(0)"), strict=True):  # fmt: skip
        assert wanted in text and "what to do" in text
    assert str(found).startswith("5 problems:\n1. BatchNorm2d")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_no_problem():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    assert (
        validate(model, torch.randn(5, 3)) == [] and str(validate(model, torch.randn(5, 3))) == "no problem was found"
    )
    assert validate(dp_compile(model), torch.randn(5, 3)) == []


class Doubled(nn.Module):
    """A part that is called with what has no example axis is none of the problems."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.centred = nn.Embedding(8, 8), Centred()

    def forward(self, x):
        return self.centred(x) + self.table(torch.arange(8)).sum(0)


def test_only_what_is_wrong_is_told():
    (problem,) = validate(Doubled(), torch.randn(8, 8))
    assert isinstance(problem, ExampleMixingError) and "features - features.mean(0)" in str(problem)


def test_other_example_axes():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x).transpose(0, 1)

    assert validate(Late(), torch.randn(4, 6, 3), in_dims=1) == []


@pytest.mark.parametrize(
    "model, kind, message",
    [
        (nn.LazyLinear(3), UnsupportedGraphError, "2 parameters have no size yet: weight, bias"),
        (nn.Linear(3, 2).requires_grad_(False), PrivacyError, "no trainable parameter"),
        (nn.Linear(3, 2, dtype=torch.complex64), UnsupportedGraphError, "parameter 'weight' is complex"),
        (nn.DataParallel(nn.Linear(3, 2)), UnsupportedGraphError, "holds, a DataParallel"),
    ],
)
def test_what_is_seen_without_a_call(model, kind, message):
    found = validate(model, torch.randn(4, 3))
    assert any(isinstance(p, kind) and message in str(p) for p in found)


def test_errors_of_the_plain_model_are_its_own():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        validate(nn.Linear(3, 2), torch.randn(4, 5))
