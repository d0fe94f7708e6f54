"""Losses that a loop makes of a private model's outputs: what mixes examples is refused, and nothing else is."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpcompile import ExampleMixingError, dp_compile
from dpcompile.losses import per_example_cross_entropy

B, C = 6, 4
torch.manual_seed(0)
Y, T, P = torch.tensor([0, 1, 2, 3, 0, 1]), torch.randn(B, C), torch.randn(B, C).softmax(1)
W, V, M, CLASSES = torch.randn(C, C), torch.randn(C), torch.randn(C, 3), torch.rand(C) + 0.1
NORM, BATCH_NORM = nn.LayerNorm(C), nn.BatchNorm1d(C)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, *cotangents: Tensor) -> Tensor:
        return cotangents[0] * 2


def each(o: Tensor) -> Tensor:
    return F.cross_entropy(o, Y, reduction="none")


def unit(o: Tensor) -> Tensor:
    return F.normalize(o, dim=1)


RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "cross entropy": lambda o: F.cross_entropy(o, Y, label_smoothing=0.1),
    "soft targets": lambda o: F.cross_entropy(o, P),
    "class weights, one by one": lambda o: F.cross_entropy(o, Y, weight=CLASSES, reduction="none").mean(),
    "focal": lambda o: ((1 - (-each(o)).exp()) ** 2 * each(o)).mean(),
    "clamped each": lambda o: each(o).clamp(max=2).mean(),
    "weighted by a constant": lambda o: (each(o) * torch.tensor([1.0, 0, 1, 1, 1, 1])).sum() / B,
    "squares": lambda o: F.mse_loss(o, T) + F.l1_loss(o, T) + F.huber_loss(o, T) + F.smooth_l1_loss(o, T),
    "bce": lambda o: F.binary_cross_entropy_with_logits(o, P, pos_weight=CLASSES, weight=P[:, :1]),
    "bce of probabilities": lambda o: F.binary_cross_entropy(o.sigmoid(), P),
    "kl": lambda o: F.kl_div(o.log_softmax(1), P, reduction="batchmean"),
    "picked by index": lambda o: -o.softmax(1)[torch.arange(B), Y].log().mean(),
    "picked by gather": lambda o: -o.log_softmax(1).gather(1, Y[:, None]).mean(),
    "row by row": lambda o: sum(F.cross_entropy(o[i], Y[i]) for i in range(B)) / B,  # type: ignore[return-value]
    "rows kept": lambda o: sum(F.cross_entropy(o[i : i + 1], Y[i : i + 1]).exp() for i in range(B)),  # type: ignore[return-value]
    "rows stacked": lambda o: torch.stack([r.softmax(0)[0].log() for r in o.unbind(0)]).exp().mean(),
    "rows joined": lambda o: torch.cat([r.norm(dim=1) for r in o.split(1)]).exp().mean(),
    "cosine": lambda o: F.cosine_embedding_loss(o, T, torch.ones(B)) - F.cosine_similarity(o, T).mean(),
    "triplet with constants": lambda o: F.triplet_margin_loss(o, T, T.roll(1, 0)),
    "distances to constants": lambda o: F.cross_entropy(-torch.cdist(o, W), Y) + F.pairwise_distance(o, T).mean(),
    "head": lambda o: F.cross_entropy(NORM(o) @ W, Y) + F.linear(o, M.t(), V[:3]).square().mean(),
    "head from the left": lambda o: F.cross_entropy((W @ o.t()).t(), Y),
    "head of one": lambda o: (o @ V).sigmoid().mean() + (o @ V[:, None]).squeeze().exp().mean(),
    "two tokens of two classes": lambda o: F.cross_entropy(o.view(-1, 2), torch.zeros(2 * B, dtype=torch.long)),
    "tokens first": lambda o: o.view(B, 2, 2).transpose(0, 1).reshape(2 * B, 2).softmax(1).square().mean(),
    "classes in the middle": lambda o: F.cross_entropy(o.view(B, 2, 2).permute(0, 2, 1), torch.ones(B, 2).long()),
    "pixels": lambda o: F.cross_entropy(o.view(B, 2, 2, 1), torch.zeros(B, 2, 1, dtype=torch.long)),
    "shifted": lambda o: F.cross_entropy(o.view(B, 2, 2)[:, :-1].reshape(-1, 2), torch.zeros(B, dtype=torch.long)),
    "several": lambda o: (F.cross_entropy(o, Y) + 0.1 * o.square().mean() + 0.2 * o[:, 0].abs().mean()) * 1024 / 4,
    "gaussian": lambda o: F.gaussian_nll_loss(o[:, :2], T[:, :2], F.softplus(o[:, 2:]) + 1e-3),
    "margins": lambda o: F.multi_margin_loss(o, Y) + F.multilabel_soft_margin_loss(o, P.round()),
    "ranking within": lambda o: F.margin_ranking_loss(o[:, 0], o[:, 1], torch.ones(B)),
    "over classes": lambda o: (
        (o.logsumexp(1) + o.amax(1) + o.var(1) + o.norm(dim=1)).mean() + o.topk(2, 1).values.mean()
    ),
    "sorted classes": lambda o: (o.sort(1).values - T).abs().mean() + (o.flip(1) * o).mean(),
    "joined classes": lambda o: torch.cat([o, o * 2], 1).softmax(1).square().mean(),
    "stacked": lambda o: torch.stack([o, o.exp()], 1).square().mean() + o.repeat(1, 2).square().mean(),
    "where": lambda o: torch.where(T > 0, o.square(), o.abs()).mean() + o.masked_fill(T > 0, 0).exp().mean(),
    "products of one": lambda o: torch.einsum("bi,ij,bj->b", o, W, o).exp().mean(),
    "outer of one": lambda o: torch.bmm(o.unsqueeze(2), o.unsqueeze(1)).square().mean(),
    "centred classes": lambda o: (o - o.mean(1, keepdim=True)).square().mean(),
    "linear over examples": lambda o: (o - o.mean(0)).sum() + o.cumsum(0).sum() + o.roll(1, 0).mean(),
    "broadcast": lambda o: (o[:, None].expand(B, 3, C) * M.t()).softmax(-1).square().mean(),
    "a function of one's own": lambda o: Doubled.apply(o).square().mean(),  # type: ignore[union-attr]
    "some rows": lambda o: o[torch.tensor([3, 1])].square().mean() + o[T > 0].square().mean(),
    "halves by themselves": lambda o: o[:3].square().mean() + o[3:].abs().mean() + o.chunk(2)[0].exp().mean(),
    "the first rows in two ways": lambda o: (torch.stack([o[i].exp().sum() for i in range(3)]) * o[:3, 0]).mean(),
    "compiled": lambda o: torch.compile(lambda z: F.cross_entropy(z, Y), backend="eager")(o),
    "of the library": lambda o: per_example_cross_entropy(o, torch.where(Y > 2, -100, Y)).mean(),
    "units that are off": lambda o: F.cross_entropy(F.relu(o - 0.5), Y),
    "bfloat16": lambda o: F.cross_entropy(o.to(torch.bfloat16).float(), Y),
}
MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "simclr": lambda o: F.cross_entropy(unit(o) @ unit(o).t() / 0.1, torch.arange(B)),
    "clip": lambda o: F.cross_entropy(o[:, :2] @ o[:, 2:].t(), torch.arange(B)),
    "two views in a batch": lambda o: F.cross_entropy(o[:3] @ o[3:].t(), torch.arange(3)),
    "einsum": lambda o: torch.einsum("bi,ci->bc", o, o).square().mean(),
    "centred": lambda o: (o - o.mean(0)).square().mean(),
    "standardised": lambda o: ((o - o.mean(0)) / o.std(0)).exp().mean(),
    "variance": lambda o: F.relu(1 - o.var(0).sqrt()).mean(),
    "batch norm": lambda o: BATCH_NORM(o).square().mean(),
    "covariance": lambda o: (o.t() @ o / B).square().mean(),
    "torch.cov": lambda o: torch.cov(o.t()).square().sum(),
    "root of a mean": lambda o: F.mse_loss(o, T).sqrt(),
    "log of a mean": lambda o: F.mse_loss(o, T).log(),
    "perplexity": lambda o: F.cross_entropy(o, Y).exp(),
    "flooding": lambda o: (F.cross_entropy(o, Y) - 2).abs(),
    "clamped mean": lambda o: F.cross_entropy(o, Y).clamp(max=2),
    "larger of two": lambda o: torch.maximum(F.cross_entropy(o, Y), 3 * o.square().mean()),
    "product of two": lambda o: F.cross_entropy(o, Y) * o.square().mean(),
    "ratio": lambda o: F.cross_entropy(o, Y) / o.square().mean(),
    "hard examples": lambda o: each(o).topk(2).values.mean(),
    "worst example": lambda o: each(o).max(),
    "median": lambda o: each(o).median(),
    "tilted": lambda o: each(o).logsumexp(0),
    "attention over examples": lambda o: (each(o).softmax(0) * each(o)).sum(),
    "norm of all": lambda o: (o - T).norm(),
    "class weights": lambda o: F.cross_entropy(o, Y, weight=CLASSES, label_smoothing=0.1),
    "distances": lambda o: torch.cdist(o, o + 1).mean(),
    "pdist": lambda o: F.pdist(o).mean(),
    "triplets": lambda o: F.triplet_margin_loss(o[:2], o[2:4], o[4:]),
    "pairs": lambda o: (o[::2] - o[1::2]).square().mean(),
    "times the first": lambda o: (o * o[0]).mean(),
    "neighbours": lambda o: (o * o.roll(1, 0)).mean(),
    "rows with rows": lambda o: sum((o[i] * o[(i + 1) % B]).sum() for i in range(B)),  # type: ignore[return-value]
    "dice": lambda o: 1 - 2 * (o.sigmoid() * P).sum() / (o.sigmoid().sum() + P.sum()),
    "mean prediction": lambda o: (o.softmax(1).mean(0) * o.softmax(1).mean(0).log()).sum(),
    "softmax over examples": lambda o: o.softmax(0).log().mean(),
    "sorted examples": lambda o: (o.sort(0).values - T.sort(0).values).square().mean(),
    "pairwise ranks": lambda o: torch.sigmoid(o[:3, 0].unsqueeze(1) - o[3:, 0].unsqueeze(0)).mean(),
    "kernel": lambda o: torch.exp(-(o[:, None] - o[None]).square().sum(-1)).mean(),
    "survival": lambda o: (o[:, 0].logcumsumexp(0) - o[:, 0]).mean(),
    "ignored targets": lambda o: F.cross_entropy(o, torch.where(Y > 2, -100, Y)),
}


def cotangent(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    leaf = outputs.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    return found


@functools.cache
def private(backend: str = "eager", **options: object) -> nn.Module:
    return dp_compile(nn.Sequential(nn.Linear(5, C), nn.Tanh()), backend=backend, **options)  # type: ignore[arg-type]


def refused(loss: Callable[[Tensor], Tensor], backend: str = "eager", **options: object) -> None:
    loss(private(backend, **options)(torch.randn(B, 5))).sum().backward()


@pytest.mark.parametrize("name", RIGHT)
def test_a_loss_of_single_examples(name: str) -> None:
    outputs = torch.randn(B, C).tanh()
    before = cotangent(RIGHT[name], outputs)
    for row in range(B):  # no row's cotangent changes with another row
        other = outputs.clone()
        other[row] = torch.randn(C).tanh()
        after, rest = cotangent(RIGHT[name], other), [i for i in range(B) if i != row]
        torch.testing.assert_close(after[rest], before[rest], rtol=1e-4, atol=1e-6)
    refused(RIGHT[name])


@pytest.mark.parametrize("name", MIXED)
def test_a_loss_that_mixes(name: str) -> None:
    if name not in ("class weights", "ignored targets"):  # of which targets are what mixes
        outputs, changes = torch.randn(B, C).tanh(), 0.0
        before = cotangent(MIXED[name], outputs)
        for row in range(B):
            other = 3 * torch.randn(B, C)
            other[row] = outputs[row]
            changes += float((cotangent(MIXED[name], other) - before)[row].abs().sum())
        assert changes > 1e-4
    with pytest.raises(ExampleMixingError, match="the loss mixes examples"):
        refused(MIXED[name])


def test_the_message_says_what_mixes_and_where() -> None:
    with pytest.raises(ExampleMixingError) as caught:
        refused(MIXED["simclr"])
    assert str(caught.value).startswith(
        "the loss mixes examples: `mm`, called on outputs of the private model: it multiplies every example with every "
        "other one\n  at "
    )
    assert str(caught.value).endswith("make a loss of each example's own outputs, [B], and call backward on their mean")
    assert "loss(private(backend, **options)(torch.randn(B, 5))).sum().backward()" in str(caught.value)


@pytest.mark.parametrize("name", ["class weights", "ignored targets"])
def test_the_remedy_of_targets(name: str) -> None:
    with pytest.raises(ExampleMixingError) as caught:
        refused(MIXED[name])
    told = {
        "class weights": "call the loss with reduction='none' and take the mean",
        "ignored targets": "take the mean of dpcompile.losses.per_example_cross_entropy(outputs, targets)",
    }
    assert told[name] in str(caught.value)  # which "class weights, one by one" and "of the library" do


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, C)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.layer(x).square().flatten(1).mean(1)


@pytest.mark.parametrize(
    ("ignored", "mixes"),
    [
        ([], False),
        ([(i, 2) for i in range(B)], False),  # as many of each example, as a shift of labels leaves them
        ([(0, 2)], True),
        ([(i, 0) for i in range(B)] + [(3, 1)], True),
    ],
)
@pytest.mark.parametrize("middle", [False, True])
def test_targets_that_are_ignored(ignored: list[tuple[int, int]], *, mixes: bool, middle: bool) -> None:
    labels = torch.randint(0, C, (B, 3))
    for example, position in ignored:
        labels[example, position] = -100
    logits, _ = dp_compile(Tokens(), backend="eager")(torch.randn(B, 3, 5))
    loss = (
        F.cross_entropy(logits.transpose(1, 2), labels)
        if middle
        else F.cross_entropy(logits.view(-1, C), labels.view(-1))
    )
    if not mixes:
        loss.backward()
        return
    low = 2 if len(ignored) == 1 else 1
    with pytest.raises(
        ExampleMixingError, match=f"of the whole batch, and the examples have from {low} to {low + 1} of them"
    ) as told:
        loss.backward()
    assert "per_example_cross_entropy" in str(told.value)


def test_other_outputs_and_their_sums() -> None:
    model = dp_compile(Tokens(), backend="eager")
    logits, penalties = model(torch.randn(B, 3, 5))
    (logits.square().mean() + penalties.mean()).backward()
    _, penalties = model(torch.randn(B, 3, 5))
    with pytest.raises(ExampleMixingError, match="`sqrt`"):
        penalties.mean().sqrt().backward()


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().sum(1).mean()


def test_a_sum_that_the_model_returns() -> None:
    model = dp_compile(Scored(), backend="eager")
    (model(torch.randn(B, 5)) / 4).backward()
    with pytest.raises(ExampleMixingError, match="`exp`"):
        model(torch.randn(B, 5)).exp().backward()


@pytest.mark.parametrize("options", [{"regions": "blocks"}, {"memory_budget": 1.1}, {"in_dims": 0}])
def test_however_the_model_runs(options: dict[str, Any]) -> None:
    refused(RIGHT["cross entropy"], **options)
    with pytest.raises(ExampleMixingError, match="`mm`"):
        refused(MIXED["simclr"], **options)


def test_through_inductor() -> None:
    refused(RIGHT["cross entropy"], backend="inductor")
    with pytest.raises(ExampleMixingError, match="`mm`"):
        refused(MIXED["simclr"], backend="inductor")


def test_one_example_mixes_with_nobody() -> None:
    model = dp_compile(nn.Linear(5, C), backend="eager")
    F.mse_loss(model(torch.randn(1, 5)), T[:1]).sqrt().backward()


def test_several_losses_in_one_backward() -> None:
    model = dp_compile(nn.Linear(5, C), backend="eager")
    outputs = model(torch.randn(B, 5))
    with pytest.raises(ExampleMixingError, match="`topk`"):
        torch.autograd.backward([F.cross_entropy(outputs, Y), each(outputs).topk(2).values.sum()])


def test_targets_that_are_certain_are_not_ignored() -> None:
    """Their rows of the cotangent are zero too: where the model leaves one class, or its scores are far apart."""
    model = dp_compile(Tokens(), backend="eager")
    x = torch.randn(B, 3, 5)
    x[0] *= 1e5
    logits, _ = model(x)
    labels = logits.detach().argmax(-1)
    loss = F.cross_entropy(logits.view(-1, C), labels.view(-1))
    (cotangent,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert not cotangent[0].any() and cotangent[1:].flatten(0, 1).any(-1).all()
    loss.backward()


def test_a_refused_loss_stays_refused() -> None:
    loss = MIXED["simclr"](private()(torch.randn(B, 5)))
    for _ in range(2):
        with pytest.raises(ExampleMixingError, match="`mm`"):
            loss.backward(retain_graph=True)


def test_outputs_are_not_held_by_their_own_hooks() -> None:
    model = dp_compile(nn.Linear(5, C), backend="eager")
    outputs = model(torch.randn(B, 5))
    seen = weakref.ref(outputs)
    del outputs
    assert seen() is None


def test_large_outputs_are_not_held_for_their_targets() -> None:
    model = dp_compile(nn.Linear(5, 50_000), backend="eager")
    x, labels = torch.randn(B, 5), torch.arange(B)
    labels[0] = -100
    F.cross_entropy(model(x), labels).backward()  # nobody holds them: not seen, as docs/sharp_edges.md says
    outputs = model(x)
    with pytest.raises(ExampleMixingError, match="the examples have from 0 to 1 of them"):
        F.cross_entropy(outputs, labels).backward()
