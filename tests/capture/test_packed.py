"""Packed sequences in a private model, against torch's own on the plain model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

import dpcompile
from dpcompile import DPCompileError
from dpcompile.capture.tracing import tracing_config

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have

B, T, D, H = 4, 5, 3, 4


class Tagger(nn.Module):
    """Packs, runs, unpacks; every tensor that it makes of the packed sequence has the examples in front."""

    def __init__(self, kind: str = "LSTM", sorts: bool = False, first: bool = True, **options: Any) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(D, H, batch_first=first, **options)
        self.sorts, self.first = sorts, first

    def forward(self, x: Tensor, lengths: Tensor, h: Tensor | None = None) -> tuple[Tensor, ...]:
        x = x if self.first else x.transpose(0, 1)
        packed = rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=self.first, enforce_sorted=self.sorts)
        out, state = self.layer(packed, None if h is None else h.transpose(0, 1).contiguous())
        padded, found = rnn.pad_packed_sequence(out, batch_first=self.first, padding_value=2.0, total_length=T + 1)
        states = state if isinstance(state, tuple) else (state,)
        return (padded if self.first else padded.transpose(0, 1), found, *(s.transpose(0, 1) for s in states))


def norms_one_by_one(model: nn.Module, *inputs: Any) -> Tensor:
    norms = []
    for i in range(B):
        model.zero_grad()
        loss(model(*(None if x is None else x[i : i + 1] for x in inputs))).backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())
    return torch.stack(norms)


def loss(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([o.square().flatten(1).sum(1) for o in outputs if o.is_floating_point()]).sum(0).mean()


@pytest.mark.parametrize(
    ("model", "sorts"),
    [
        (lambda: Tagger(bidirectional=True), False),
        (lambda: Tagger("GRU", sorts=True, first=False), True),
    ],
)
def test_outputs_states_and_gradients_are_torchs(model: Any, sorts: bool) -> None:
    torch.manual_seed(0)
    plain = model()
    x, lengths = torch.randn(B, T, D), torch.tensor([5, 3, 3, 1] if sorts else [2, 5, 1, 3])
    private = dp_compile(copy.deepcopy(plain), backend="eager")
    outputs = private(x, lengths)
    for found, wanted in zip(outputs, plain(x, lengths), strict=True):
        torch.testing.assert_close(found, wanted)
    loss(outputs).backward()
    torch.testing.assert_close(private.grad_norms, norms_one_by_one(plain, x, lengths))


def test_padding_is_never_read_and_a_sequence_may_be_empty() -> None:
    torch.manual_seed(0)
    private = dp_compile(Tagger("GRU", bidirectional=True), backend="eager")
    x, lengths, h = torch.randn(B, T, D), torch.tensor([2, 5, 0, 3]), torch.randn(B, 2, H)
    behind = torch.arange(T) >= lengths[:, None]
    first = private(x, lengths, h)
    second = private(x.masked_fill(behind.unsqueeze(-1), float("nan")), lengths, h)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[2][2], h[2])  # the state of the empty one is the initial one
    loss(second).backward()
    assert private.grad_norms.isfinite().all() and private.grad_norms[2] == 0


class ReadsData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(D, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.lin(rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False).data)


class ReturnsPacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(D, H, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        return self.layer(rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0]


class Cuts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(D, H, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        out = self.layer(rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0]
        return rnn.pad_packed_sequence(out, batch_first=True, total_length=T - 1)[0]


@pytest.mark.parametrize("model", [ReadsData, ReturnsPacked, Cuts])
def test_what_has_no_padded_counterpart_is_refused(model: Any) -> None:
    with pytest.raises(DPCompileError, match=r"pad_packed_sequence|padded length of the packed input"):
        dp_compile(model(), backend="eager")(torch.randn(B, T, D), torch.tensor([2, 5, 1, 3]))


def test_torch_is_left_as_it_was() -> None:
    from torch._dynamo.trace_rules import get_torch_obj_rule_map

    before, layers = dict(get_torch_obj_rule_map()), dict(vars(torch._VF))  # type: ignore[arg-type]
    with tracing_config():
        assert get_torch_obj_rule_map() != before
    assert get_torch_obj_rule_map() == before and vars(torch._VF) == layers  # type: ignore[arg-type]
