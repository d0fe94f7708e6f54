"""What mixes examples is refused, with the operation, the line and a remedy; what only looks like it is right."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn

import dpcompile
from dpcompile import DPCompileError, ExampleMixingError, PrivacyError, UnsupportedGraphError

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have

B, T, D = 4, 3, 6


class Net(nn.Module):
    """A linear layer, then whatever the test does with its output and the layer."""

    running: Tensor

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(D, D), function
        self.register_buffer("running", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.layer(x))


def train(model: nn.Module, *args: Any, **options: Any) -> None:
    private = dp_compile(model, **{"backend": "eager", **options})
    train_step(private, args, {}, PseudoLoss(args[0].shape[0]))


def check_message(error: DPCompileError, operation: str | None, source: object) -> None:
    """The operation, the file and a line inside ``source``, and a remedy."""
    text = str(error)
    if operation is not None:
        assert re.search(operation, text), text
    assert "what to do: " in text
    lines, first = inspect.getsourcelines(source)  # type: ignore[arg-type]
    found = re.search(r"test_mixing\.py:(\d+)", text)
    assert found, f"no line of this file: {text}"
    assert first <= int(found[1]) < first + len(lines), (
        f"line {found[1]} is not in {first}..{first + len(lines)}: {text}"
    )


# --- modules that mix examples ----------------------------------------------------------------------------------------

Mixing = list[tuple[str, str, Callable[..., Tensor]]]


def centred(net: Net, x: Tensor) -> Tensor:
    return x - x.mean(0)


def standardised(net: Net, x: Tensor) -> Tensor:
    return x / (x.std(dim=0) + 1)


def cumulated(net: Net, x: Tensor) -> Tensor:
    return x.cumsum(0)


def sorted_(net: Net, x: Tensor) -> Tensor:
    return x.sort(0).values


def best(net: Net, x: Tensor) -> Tensor:
    return x - x.topk(1, dim=0).values


def gram(net: Net, x: Tensor) -> Tensor:
    return x @ x.flatten(1).T if x.ndim == 2 else x


def contrastive(net: Net, x: Tensor) -> Tensor:
    z = F.normalize(x, dim=-1)
    return (z @ z.T / 0.1).log_softmax(-1)


def permuted(net: Net, x: Tensor) -> Tensor:
    return x + x.index_select(0, torch.tensor([1, 2, 3, 0]))


def permuted_by_indexing(net: Net, x: Tensor) -> Tensor:
    return x + x[torch.tensor([3, 2, 1, 0])]


def shuffled(net: Net, x: Tensor) -> Tensor:
    return x + x[torch.randperm(B)]


def first_for_everyone(net: Net, x: Tensor) -> Tensor:
    return x + x[0]


def first_by_slice(net: Net, x: Tensor) -> Tensor:
    return x + x[:1]


def last_for_everyone(net: Net, x: Tensor) -> Tensor:
    return x * x[-1:]


def rolled(net: Net, x: Tensor) -> Tensor:
    return x + x.roll(1, 0)


def flipped(net: Net, x: Tensor) -> Tensor:
    return x + x.flip(0)


def shifted(net: Net, x: Tensor) -> Tensor:
    return x[1:] - x[:-1]


def scaled_by_maximum(net: Net, x: Tensor) -> Tensor:
    return x / x.abs().max()


def scaled_by_norm(net: Net, x: Tensor) -> Tensor:
    return x / x.norm()


def softmax_over_examples(net: Net, x: Tensor) -> Tensor:
    return x.softmax(0)


def softmax_over_everything(net: Net, x: Tensor) -> Tensor:
    return x.flatten().softmax(0).view(B, D)


def counted(net: Net, x: Tensor) -> Tensor:
    return x / ((x > 0).any(1).sum() + 1)


def swapped(net: Net, x: Tensor) -> Tensor:
    return x.reshape(D, B).T.contiguous()


def swapped_halves(net: Net, x: Tensor) -> Tensor:
    return x.reshape(2, B, D // 2).transpose(0, 1).reshape(B, D)


def filters_from_examples(net: Net, x: Tensor) -> Tensor:
    return F.conv1d(x[:, None], x[:, None, :3]).flatten(1)


def outer_of_batch(net: Net, x: Tensor) -> Tensor:
    return torch.einsum("bd,cd->bc", x, x)


def distances(net: Net, x: Tensor) -> Tensor:
    return (x[:, None] - x[None]).square().sum(-1)


def pooled_over_examples(net: Net, x: Tensor) -> Tensor:
    return F.max_pool1d(x.T[None], 2, stride=1, padding=1)[0].T[:B]


def interpolated(net: Net, x: Tensor) -> Tensor:
    return (
        F.interpolate(x[None, None], size=(B, D), mode="bilinear")[0, 0] + F.avg_pool2d(x[None], (3, 1), 1, (1, 0))[0]
    )


def padded_away(net: Net, x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, -1))


def gathered(net: Net, x: Tensor) -> Tensor:
    return x.gather(0, x.argsort(0))


def gathered_by_shared_index(net: Net, x: Tensor) -> Tensor:
    return x + x.gather(1, torch.arange(D)[None])


def scattered(net: Net, x: Tensor) -> Tensor:
    return x + torch.zeros(2, D).index_add(0, torch.tensor([0, 1, 0, 1]), x).sum(0)


def trace_of_batch(net: Net, x: Tensor) -> Tensor:
    return x[:, :B] * x[:, :B].diagonal().sum()


def median(net: Net, x: Tensor) -> Tensor:
    return (x > x.median(0).values).float() * x


def logsumexp(net: Net, x: Tensor) -> Tensor:
    return x - x.logsumexp(0)


def attention_across(net: Net, x: Tensor) -> Tensor:
    q = x[None, None]
    return F.scaled_dot_product_attention(q, q, q)[0, 0]


def weight_from_batch(net: Net, x: Tensor) -> Tensor:
    return F.linear(x, torch.einsum("bi,bj->ij", x, x).tanh())


def strided(net: Net, x: Tensor) -> Tensor:
    return x + x.as_strided((B, D), (0, 1))


def repeated(net: Net, x: Tensor) -> Tensor:
    return x.repeat(2, 1)[1 : B + 1]


def interleaved(net: Net, x: Tensor) -> Tensor:
    return x.repeat(2, 1).view(B, 2, D).sum(1)


def masked_by_another(net: Net, x: Tensor) -> Tensor:
    return torch.where(x.roll(1, 0) > 0, x, 0.0)


def mean_detached(net: Net, x: Tensor) -> Tensor:
    return x - x.detach().mean(0)


MIXING: Mixing = [
    (centred.__name__, "`sub`|`addmm`|`add`", centred),
    (standardised.__name__, "`var`|`std`", standardised),
    (cumulated.__name__, "`cumsum`", cumulated),
    (sorted_.__name__, "`sort`", sorted_),
    (best.__name__, "`topk`|`amax`|`max`", best),
    (gram.__name__, "`mm`", gram),
    (contrastive.__name__, "`mm`", contrastive),
    (permuted.__name__, "`index_select`|`index`", permuted),
    (permuted_by_indexing.__name__, "`index`", permuted_by_indexing),
    (shuffled.__name__, "`index`", shuffled),
    (first_for_everyone.__name__, "`select`", first_for_everyone),
    (first_by_slice.__name__, "`slice`", first_by_slice),
    (last_for_everyone.__name__, "`slice`", last_for_everyone),
    (rolled.__name__, "`roll`|`index`|`slice`", rolled),
    (flipped.__name__, "`flip`|`rev`", flipped),
    (shifted.__name__, "`slice`", shifted),
    (scaled_by_maximum.__name__, "`max`|`amax`", scaled_by_maximum),
    (scaled_by_norm.__name__, "norm|`pow`|`sum`|`sqrt`|`div`", scaled_by_norm),
    (softmax_over_examples.__name__, "softmax|`amax`", softmax_over_examples),
    (softmax_over_everything.__name__, "softmax|`amax`", softmax_over_everything),
    (counted.__name__, "`div`|`add`|`reciprocal`", counted),
    (swapped.__name__, "`view`|`reshape`|`_unsafe_view`|`clone`", swapped),
    (swapped_halves.__name__, "`view`|`reshape`", swapped_halves),
    (filters_from_examples.__name__, "`convolution`", filters_from_examples),
    (outer_of_batch.__name__, "`mm`|`bmm`", outer_of_batch),
    (distances.__name__, "`sub`", distances),
    (pooled_over_examples.__name__, "pool", pooled_over_examples),
    (interpolated.__name__, "`[a-z_0-9]+`", interpolated),
    (padded_away.__name__, "pad", padded_away),
    (gathered.__name__, "`gather`|`sort`|`argsort`", gathered),
    (gathered_by_shared_index.__name__, "`gather`", gathered_by_shared_index),
    (scattered.__name__, "`[a-z_0-9]+`", scattered),
    (trace_of_batch.__name__, "`diagonal`", trace_of_batch),
    (median.__name__, "`median`", median),
    (logsumexp.__name__, "`logsumexp`|`amax`", logsumexp),
    (attention_across.__name__, "attention|`bmm`|softmax|`amax`", attention_across),
    (weight_from_batch.__name__, "`tanh`|`mm`|`bmm`", weight_from_batch),
    (strided.__name__, "`as_strided`", strided),
    (repeated.__name__, "`slice`", repeated),
    (interleaved.__name__, "`view`", interleaved),
    (masked_by_another.__name__, "`roll`|`index`|`slice`", masked_by_another),
    (mean_detached.__name__, "`sub`", mean_detached),
]  # fmt: skip


def assert_refused(operation: str, function: Callable[..., Tensor], **options: Any) -> None:
    with pytest.raises((ExampleMixingError, UnsupportedGraphError)) as refused:
        train(Net(function), torch.randn(B, D), **options)
    check_message(refused.value, operation, function)


@pytest.mark.parametrize(("name", "operation", "function"), MIXING, ids=[m[0] for m in MIXING])
def test_mixing_is_refused(name: str, operation: str, function: Callable[..., Tensor]) -> None:
    Net(function)(torch.randn(B, D))  # the module itself runs
    assert_refused(operation, function, dynamic=False)


@pytest.mark.parametrize("name", ["centred", "first_by_slice", "swapped_halves", "repeated", "gram", "interleaved"])
def test_mixing_is_refused_when_dynamic(name: str) -> None:
    operation, function = next(m[1:] for m in MIXING if m[0] == name)
    assert_refused(operation, function, dynamic=True)


def test_most_mixing_is_called_by_its_name() -> None:
    """ExampleMixingError, not merely unsupported, for the textbook cases."""
    for function in (centred, cumulated, gram, rolled, first_for_everyone, softmax_over_examples, sorted_, distances):
        with pytest.raises(ExampleMixingError, match="mixes examples"):
            train(Net(function), torch.randn(B, D))


# --- look-alikes ------------------------------------------------------------------------------------------------------

LOOK_ALIKES: list[Callable[[Net, Tensor], Tensor]] = [
    lambda net, x: x - x.mean(1, keepdim=True),
    lambda net, x: x / (x.std(dim=1, keepdim=True) + 1),
    lambda net, x: x.cumsum(1),
    lambda net, x: x.sort(1).values,
    lambda net, x: x - x.topk(1, dim=1).values,
    lambda net, x: x @ x.mT,
    lambda net, x: (F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).mT / 0.1).log_softmax(-1),
    lambda net, x: x + x.index_select(1, torch.tensor([1, 2, 0])),
    lambda net, x: x + x[:, torch.tensor([1, 2, 0])],
    lambda net, x: x + x[:, :1] * x[:, -1:],
    lambda net, x: x + x[:, 0, None],
    lambda net, x: x + x.roll(1, 1),
    lambda net, x: x.flip(1) * x,
    lambda net, x: x[:, 1:] - x[:, :-1],
    lambda net, x: x / x.abs().amax((1, 2), keepdim=True),
    lambda net, x: x.softmax(1),
    lambda net, x: x.flatten(1).softmax(1).view_as(x),
    lambda net, x: x / ((x > 0).any(2).sum(1)[:, None, None] + 1),
    lambda net, x: x.reshape(B, D, T).mT.contiguous() + x,
    lambda net, x: x.transpose(0, 1).contiguous().transpose(0, 1).reshape(B, -1),
    lambda net, x: torch.einsum("btd,bsd->bts", x, x),
    lambda net, x: (x[:, :, None] - x[:, None]).square().sum(-1),
    lambda net, x: F.max_pool1d(x.mT, 2, stride=1).mT,
    lambda net, x: F.pad(x, (0, 0, 1, -1)),
    lambda net, x: x.gather(1, x.argsort(1)),
    lambda net, x: x - x.logsumexp(1, keepdim=True),
    lambda net, x: x.repeat(1, 2, 1)[:, 1 : T + 1],
    lambda net, x: torch.where(x.roll(1, 1) > 0, x, 0.0),
    lambda net, x: x[torch.arange(B)[:, None], x.sum(-1).argsort(1)],
    lambda net, x: torch.cat([x, x], 0).view(2, B, T, D).sum(0),
    lambda net, x: x.unbind(1)[0] * x.chunk(3, 1)[2].squeeze(1),
    lambda net, x: x.detach().mean(1, keepdim=True) + x,
    lambda net, x: torch.stack([x, x * 2]).mean(0),
    lambda net, x: x.T.permute(2, 1, 0) * net.running,
    lambda net, x: x.unfold(1, 2, 1).mean(-1),
    lambda net, x: x.view(B * T, D).split(T)[0].new_zeros(()) + x,
    lambda net, x: (x * (x == x.amax(1, keepdim=True))).sum(1),
    lambda net, x: torch.tril(x @ x.mT).sum(-1),
    lambda net, x: x * torch.linspace(0, 1, T)[:, None],
]


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors of dimension other than 2")
@pytest.mark.parametrize("index", range(len(LOOK_ALIKES)))
def test_look_alikes_over_time_are_right(index: int) -> None:
    """The same operations along T: norms and sums as one backward per example gives them."""
    torch.manual_seed(index)
    function = LOOK_ALIKES[index]
    batch_sized = index in (
        18,
        19,
        28,
        29,
        35,
        38,
    )  # these name B in their code, so the oracle masks instead of slicing
    model, x = Net(function), torch.randn(B, T, D)
    private = dp_compile(copy.deepcopy(model), max_grad_norm=0.5, backend="eager")
    train_step(private, (x,), {}, PseudoLoss(B))
    if batch_sized:
        gradients = _masked_gradients(model, x)
    else:
        gradients = per_example_gradients(model, (x,), {}, PseudoLoss(B))
    assert_right(private, clip(gradients, 0.5), 1e-4)


def _masked_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Each example's loss alone, from a run of the whole batch."""
    named = dict(model.named_parameters())
    rows = [torch.autograd.grad(PseudoLoss(B)(model(x), slice(None))[i], list(named.values())) for i in range(B)]
    return {n: torch.stack([r[k] for r in rows]).double() for k, n in enumerate(named)}


# --- batch norm, buffers ----------------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.body, self.norm = nn.Conv2d(2, 3, 3), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("track", [True, False])
def test_batch_norm_in_training(track: bool, backend: str) -> None:
    model = Normed(nn.BatchNorm2d(3, track_running_stats=track))
    with pytest.raises(ExampleMixingError, match=r"BatchNorm2d in training mode") as refused:
        train(model, torch.randn(B, 2, 5, 5), backend=backend)
    assert "GroupNorm" in str(refused.value) and "eval()" in str(refused.value)
    assert "norm" in str(refused.value)
    check_message(refused.value, None, Normed)


def test_batch_norm_in_evaluation_is_right() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    norm.running_mean, norm.running_var = torch.randn(3), torch.rand(3) + 0.5
    model, x = Normed(norm), torch.randn(B, 2, 5, 5)
    model.train()
    model.norm.eval()
    gradients = per_example_gradients(model, (x,), {}, PseudoLoss(B))
    private = dp_compile(copy.deepcopy(model), max_grad_norm=0.5, backend="eager")
    train_step(private, (x,), {}, PseudoLoss(B))
    assert_right(private, clip(gradients, 0.5), 1e-4)


def test_evaluated_batch_norm_put_back_to_training_is_refused() -> None:
    """No stale graph: ``train()`` after a good step recompiles."""
    model = Normed(nn.BatchNorm2d(3)).eval()
    private = dp_compile(model, backend="eager")
    train_step(private, (torch.randn(B, 2, 5, 5),), {}, PseudoLoss(B))
    private.train()
    with pytest.raises(ExampleMixingError, match="BatchNorm2d"):
        train_step(private, (torch.randn(B, 2, 5, 5),), {}, PseudoLoss(B))


def test_batch_norm_in_training_without_gradients_is_torchs_business() -> None:
    private = dp_compile(Normed(nn.BatchNorm2d(3)), backend="eager")
    with torch.no_grad():
        assert private(torch.randn(B, 2, 5, 5)).shape == (B, 3, 3, 3)


def running_mean(net: Net, x: Tensor) -> Tensor:
    net.running.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
    return x


def running_sum(net: Net, x: Tensor) -> Tensor:
    net.running += x.detach().sum(0)
    return x - net.running.detach()


def overwritten(net: Net, x: Tensor) -> Tensor:
    net.running = x.detach()[0]
    return x


def remembered(net: Net, x: Tensor) -> Tensor:
    before = getattr(net, "seen", None)
    net.seen = x.detach()  # type: ignore[assignment]
    return x if before is None else x * before.mean()


@pytest.mark.parametrize(("backend", "batch"), [("eager", B), ("eager", 1), ("inductor", B)])
@pytest.mark.parametrize("function", [running_mean, running_sum, overwritten], ids=lambda f: f.__name__)
def test_statistics_in_a_buffer(function: Any, backend: str, batch: int) -> None:
    """They would be published with the model, without noise; a batch of one is no excuse."""
    with pytest.raises((ExampleMixingError, UnsupportedGraphError)) as refused:
        train(Net(function), torch.randn(batch, D), backend=backend)
    assert "buffer 'running'" in str(refused.value) and "what to do: " in str(refused.value)
    if function is not overwritten:  # an assignment is seen after the call, when its line is not known
        check_message(refused.value, None, function)


def test_activation_kept_for_the_next_step() -> None:
    """A memory bank: examples of one batch would act on the gradients of the next, past clipping and noise."""
    private = dp_compile(Net(remembered), backend="eager")
    with pytest.raises(ExampleMixingError, match="an earlier call left there with examples in it"):
        for _ in range(3):
            train_step(private, (torch.randn(B, D),), {}, PseudoLoss(B))
            private.zero_grad()


def counter(net: Net, x: Tensor) -> Tensor:
    net.running += 1
    return x * net.running


def test_a_counter_in_a_buffer_is_right() -> None:
    """Writing what does not depend on the examples is allowed, and done."""
    private = dp_compile(Net(counter), backend="eager")
    for step in range(1, 3):
        private.zero_grad()
        train_step(private, (torch.randn(B, D),), {}, PseudoLoss(B))
        assert torch.equal(private.running, torch.full((D,), float(step)))


# --- parameters -------------------------------------------------------------------------------------------------------


class PerRow(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(rows, D))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.rows


def test_parameter_with_a_batch_dimension() -> None:
    with pytest.raises(ExampleMixingError, match=r"through 'rows'") as refused:
        train(PerRow(B), torch.randn(B, D))
    check_message(refused.value, None, PerRow)


class Regularised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.layer.weight.square().sum()


class RegularisedLoss(Regularised):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.layer(x).square().sum(1).mean() + 0.1 * self.layer.weight.square().sum()


class RegularisedOutput(Regularised):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.layer(x) * 0 + self.layer.weight.norm()


@pytest.mark.parametrize("model", [Regularised, RegularisedLoss])
def test_regulariser_in_the_model(model: type[nn.Module]) -> None:
    private = dp_compile(model(), backend="eager")
    with pytest.raises(
        DPCompileError, match="weight_decay|belongs to no example|does not come from the examples"
    ) as refused:
        out = private(torch.randn(B, D))
        (out[0].sum() + out[1] if isinstance(out, tuple) else out).backward()
    assert "layer.weight" in str(refused.value)
    assert "test_mixing.py" in str(refused.value)


def test_regulariser_that_reaches_every_example_is_theirs() -> None:
    """Added to each example's output it is a part of each example's loss."""
    model, x = RegularisedOutput(), torch.randn(B, D)
    gradients = per_example_gradients(model, (x,), {}, PseudoLoss(B))
    private = dp_compile(copy.deepcopy(model), max_grad_norm=0.5, backend="eager")
    train_step(private, (x,), {}, PseudoLoss(B))
    assert_right(private, clip(gradients, 0.5), 1e-4)


def test_constant_output_of_a_parameter_alone() -> None:
    """An output without an example axis cannot have a gradient of examples."""

    class Constant(Regularised):
        def forward(self, x: Tensor) -> Any:
            return self.layer(x), self.layer.bias * 2

    private = dp_compile(Constant(), backend="eager")
    with pytest.raises(DPCompileError):
        out, bias = private(torch.randn(B, D))
        (out.square().sum(1).mean() + bias.sum()).backward()


# --- what cannot be captured or understood ----------------------------------------------------------------------------


def branch_on_value(net: Net, x: Tensor) -> Tensor:
    if x.sum() > 0:
        x = x * 2
    return x


def item(net: Net, x: Tensor) -> Tensor:
    return x * x.mean().item()


def to_python(net: Net, x: Tensor) -> Tensor:
    return x * float(x[0, 0])


def printing(net: Net, x: Tensor) -> Tensor:
    print(x.sum())
    return x


def breaking(net: Net, x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x


def through_numpy(net: Net, x: Tensor) -> Tensor:
    import numpy

    return x * torch.from_numpy(numpy.asarray(x.detach().tolist(), dtype=numpy.float32))


def nonzero(net: Net, x: Tensor) -> Tensor:
    return x * x[x > 0].mean()


def unique(net: Net, x: Tensor) -> Tensor:
    return x * len((x > 0).unique())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "function", [branch_on_value, item, to_python, printing, breaking, through_numpy, nonzero, unique],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_graph_breaks_and_data_dependence(function: Any) -> None:
    with pytest.raises((UnsupportedGraphError, ExampleMixingError)) as refused:
        train(Net(function), torch.randn(B, D))
    check_message(refused.value, None, function)


def test_batch_of_one_that_branches_on_its_value() -> None:
    """Refused too: a graph of the next batch would be chosen by this one."""
    with pytest.raises(UnsupportedGraphError):
        train(Net(branch_on_value), torch.randn(1, D))


@torch.library.custom_op("dpcompile_tests::triple", mutates_args=())
def triple(x: Tensor) -> Tensor:
    return x * 3


@triple.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


triple.register_autograd(lambda ctx, g: g * 3)


def custom(net: Net, x: Tensor) -> Tensor:
    return triple(x)


def test_unknown_operation() -> None:
    with pytest.raises(
        UnsupportedGraphError, match=r"dpcompile_tests::triple.* is not understood: there is no rule"
    ) as refused:
        train(Net(custom), torch.randn(B, D))
    check_message(refused.value, "register", custom)


def unknown_on_parameters(net: Net, x: Tensor) -> Tensor:
    return x * triple(net.layer.bias)


def test_unknown_operation_on_parameters() -> None:
    """Its adjoint stands in the tail: right here, because it is a product, or refused."""
    model, x = Net(unknown_on_parameters), torch.randn(B, D)
    try:
        private = dp_compile(copy.deepcopy(model), max_grad_norm=0.5, backend="eager")
        train_step(private, (x,), {}, PseudoLoss(B))
    except UnsupportedGraphError as error:
        check_message(error, "triple", unknown_on_parameters)
    else:
        assert_right(private, clip(per_example_gradients(model, (x,), {}, PseudoLoss(B)), 0.5), 1e-4)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, D, sparse=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def test_sparse_gradients() -> None:
    """Right (as a dense gradient) or refused."""
    model, ids = Sparse(), torch.randint(0, 7, (B, T))
    private = dp_compile(copy.deepcopy(model), max_grad_norm=0.5, backend="eager")
    try:
        train_step(private, (ids,), {}, PseudoLoss(B))
    except DPCompileError:
        return
    dense = Sparse()
    dense.table.sparse = False
    dense.load_state_dict(model.state_dict())
    assert_right(private, clip(per_example_gradients(dense, (ids,), {}, PseudoLoss(B)), 0.5), 1e-4)


# --- inputs -----------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, 3)

    def forward(self, x: Tensor, context: Any = None, *rest: Tensor, mode: str = "a") -> Tensor:
        if context is not None:
            x = x + context.mean(0)
        return self.layer(x)


def test_inputs_that_disagree_about_the_batch() -> None:
    private = dp_compile(Two(), backend="eager")
    with pytest.raises(DPCompileError, match=r"disagree about the number of examples: 'x' has 4, 'context' has 5"):
        private(torch.randn(B, D), torch.randn(B + 1, D))


def test_shared_input_without_in_dims_is_mixing() -> None:
    """Of the same size by chance: the mean over it is one over examples."""
    with pytest.raises(ExampleMixingError):
        train(Two(), torch.randn(B, D), torch.randn(B, D))
    train(Two(), torch.randn(B, D), torch.randn(B, D), in_dims=(0, None))


@pytest.mark.parametrize(
    ("in_dims", "args", "message"),
    [
        ((0,), 2, "in_dims has 1 entries for 2 positional arguments"),
        ((0, 0, 0), 2, "in_dims has 3 entries for 2"),
        ({"y": 0}, 2, r"in_dims names arguments that the model does not take: \['y'\]"),
        (2, 1, r"no dimension 2"),
        (-3, 1, r"no dimension -3"),
        ((0, 1), 2, "disagree"),
        (([0, 0],), 1, "structure"),
        (None, 1, "no input of the model has an example axis"),
        ((None, None), 2, "no input of the model has an example axis"),
        ("0", 1, "in_dims"),
        (0.0, 1, "in_dims"),
        (True, 1, "in_dims"),
        ((0, "x"), 2, "in_dims"),
    ],
)
def test_in_dims_that_do_not_fit(in_dims: Any, args: int, message: str) -> None:
    with pytest.raises(DPCompileError, match=message) as refused:
        train(Two(), *[torch.randn(B, D) for _ in range(args)], in_dims=in_dims)
    assert "what to do: " in str(refused.value)


def test_in_dims_by_name_and_nested() -> None:
    class Nested(Two):
        def forward(self, batch: Any, table: Tensor | None = None) -> Tensor:  # type: ignore[override]
            x, (y, z) = batch["x"], batch["yz"]
            return self.layer(x + y.T + z.mean(0)) + (0 if table is None else table.mean())

    batch = {"x": torch.randn(B, D), "yz": (torch.randn(D, B), torch.randn(5, D))}
    private = dp_compile(Nested(), backend="eager", in_dims={"batch": {"x": 0, "yz": (-1, None)}, "table": None})
    train_step(private, (batch,), {"table": torch.randn(3)}, PseudoLoss(B))
    assert private.certificate.examples.keys() == {"batch['x']", "batch['yz'][0]"}


def test_scalar_tensor_input() -> None:
    private = dp_compile(Two(), backend="eager")
    with pytest.raises(DPCompileError, match=r"input 'context' of shape \[\] has no dimension 0"):
        private(torch.randn(B, D), torch.tensor(1.0))


def test_examples_hidden_in_an_object() -> None:
    """What is no pytree cannot be looked into: its tensors must not pass for shared ones."""

    class Box:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Boxed(Two):
        def forward(self, x: Tensor, box: Any) -> Tensor:  # type: ignore[override]
            return self.layer(x - box.x.mean(0))

    private = dp_compile(Boxed(), backend="eager")
    with pytest.raises(DPCompileError, match="inside an object"):
        train_step(private, (torch.randn(B, D), Box(torch.randn(B, D))), {}, PseudoLoss(B))


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 1)])
def test_one_tensor_in_two_places(in_dims: Any) -> None:
    """It cannot hold examples here and be shared there, or lie in two ways."""
    x = torch.randn(D, D)
    with pytest.raises(DPCompileError):
        train(Two(), x, x, in_dims=in_dims)


def test_views_of_one_tensor_in_two_places() -> None:
    x = torch.randn(B, D)
    with pytest.raises(DPCompileError):
        train(Two(), x, x.view(B, D), in_dims=0)


class Outside(nn.Module):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.layer, self.tensors = nn.Linear(D, 3), [tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.tensors[0])


def test_tensor_with_gradient_that_is_no_parameter() -> None:
    with pytest.raises(UnsupportedGraphError, match="needs a gradient and is no parameter of the model"):
        train(Outside(torch.ones(D, requires_grad=True)), torch.randn(B, D))
    with pytest.raises(UnsupportedGraphError, match="needs a gradient and is no parameter of the model"):
        train(Outside(nn.Parameter(torch.ones(D))), torch.randn(B, D))
    train(Outside(torch.ones(D)), torch.randn(B, D))


def test_loss_normalised_by_a_count_in_the_model() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, 5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.layer(x).flatten(0, 1), y.flatten(), ignore_index=-100)

    y = torch.randint(0, 5, (B, T))
    y[0, 1:] = -100
    private = dp_compile(Masked(), backend="eager")
    with pytest.raises(ExampleMixingError) as refused:
        private(torch.randn(B, T, D), y).backward()
    check_message(refused.value, None, Masked)
    assert "reduction='none'" in str(refused.value)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"max_grad_norm": 0.0}, PrivacyError, "positive finite number, got 0.0"),
        ({"max_grad_norm": -1.0}, PrivacyError, "positive finite number, got -1.0"),
        ({"max_grad_norm": float("nan")}, PrivacyError, "got nan"),
        ({"max_grad_norm": float("inf")}, PrivacyError, "got inf"),
        ({"max_grad_norm": "1"}, PrivacyError, "got '1'"),
        ({"max_grad_norm": None}, PrivacyError, "got None"),
        ({"max_grad_norm": True}, PrivacyError, "got True"),
        ({"max_grad_norm": torch.tensor(1.0)}, PrivacyError, "positive finite number"),
        ({"clipping": "ghost"}, PrivacyError, "unknown clipping 'ghost'"),
        ({"clipping": None}, PrivacyError, "unknown clipping None"),
        ({"norm": "opacus"}, DPCompileError, "unknown norm 'opacus'"),
        ({"norm": None}, DPCompileError, "unknown norm None"),
        ({"backend": "cuda"}, DPCompileError, "unknown backend 'cuda'"),
        ({"loss_reduction": "none"}, DPCompileError, "unknown loss_reduction 'none'"),
        ({"memory_budget": 0}, DPCompileError, "memory_budget"),
        ({"memory_budget": -1.5}, DPCompileError, "memory_budget"),
        ({"memory_budget": "1GB"}, DPCompileError, "memory_budget"),
        ({"memory_budget": True}, DPCompileError, "memory_budget"),
        ({"memory_budget": float("inf")}, DPCompileError, "memory_budget"),
        ({"norm": ["auto"]}, DPCompileError, "unknown norm"),
    ],
)
def test_bad_options(options: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as refused:
        dp_compile(nn.Linear(2, 2), **options)
    assert "what to do: " in str(refused.value)
    with pytest.raises(kind, match=message):

        @dp_compile(**options)
        class Model(nn.Linear):
            pass


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="max_norm"):
        dp_compile(nn.Linear(2, 2), max_norm=1.0)


def test_private_twice() -> None:
    private = dp_compile(nn.Linear(2, 2))
    with pytest.raises(PrivacyError, match="clipped twice"):
        dp_compile(private)
    with pytest.raises(PrivacyError, match="clipped twice"):
        dp_compile(dp_compile(nn.Linear))
    with pytest.raises(PrivacyError, match="clipped twice"):
        dp_compile(dp_compile(nn.Linear)(2, 2))


def test_private_part_of_a_model() -> None:
    """A private module inside another model: its parameters would be clipped by themselves, the others not."""
    model = nn.Sequential(nn.Linear(D, D), dp_compile(nn.Linear(D, 2), backend="eager"))
    with pytest.raises(DPCompileError):
        train(model, torch.randn(B, D))


@pytest.mark.parametrize("thing", [lambda x: x, 3, "model", int, torch.relu, torch.compile(nn.ReLU().forward)])
def test_not_a_module(thing: Any) -> None:
    with pytest.raises(DPCompileError, match="takes an nn.Module or a class of one"):
        dp_compile(thing)


def test_already_compiled_model() -> None:
    """``torch.compile`` first, ``dp_compile`` second: right or refused."""
    model, x = nn.Linear(D, 2), torch.randn(B, D)
    private = dp_compile(torch.compile(copy.deepcopy(model), backend="eager"), max_grad_norm=0.5, backend="eager")
    try:
        train_step(private, (x,), {}, PseudoLoss(B))
    except DPCompileError:
        return
    truth = clip(per_example_gradients(model, (x,), {}, PseudoLoss(B)), 0.5)
    truth.sums = {"_orig_mod." + n: s for n, s in truth.sums.items()}
    assert_right(private, truth, 1e-4)
