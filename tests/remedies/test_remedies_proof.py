"""What the proof refuses: what its messages say to do, tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from private_steps import X, Y
from remedies import Right, refused, right
from torch import Tensor, nn

from dpcompile import dp_compile, replace_batchnorm
from dpcompile.losses import per_example_causal_lm, per_example_cross_entropy

BATCHNORM = (
    "use GroupNorm (dpcompile.replace_batchnorm) or LayerNorm, or call .eval() on BatchNorm layers that hold running "
    "statistics, to freeze these"
)


class Net(nn.Module):
    """A linear layer ``[B, 5]``, and what the test does with it; ``extra`` is a parameter, a buffer or a number."""

    extra: Any

    def __init__(self, function: Callable[..., Any], extra: Any = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.function = nn.Linear(5, 5), function
        if isinstance(extra, Tensor) and not isinstance(extra, nn.Parameter):
            self.register_buffer("extra", extra)
        else:
            self.extra = extra

    def forward(self, x: Tensor, *more: Any) -> Any:
        return self.function(self, x, *more)


def compared(function: Callable[..., Any], extra: Any = None, *args: Any, **options: Any) -> Right:
    given = {k: options.pop(k) for k in ("loss", "out_dim", "in_dims") if k in options}
    in_dims = {"in_dims": given["in_dims"]} if "in_dims" in given else {}
    model = dp_compile(Net(function, extra), backend="eager", **options, **in_dims)
    return right(model, *(args or (X,)), **given)


# --- what a model returns -------------------------------------------------------------------------------------------


@refused(
    "return values whose examples have a dimension of their own, or are flattened into dimension 0", ways=2, slow=True
)
def test_examples_interleaved_in_an_output(told: int) -> Right:
    shape = ((1, 40), (1, 8, 5), (40,))[told]
    loss = lambda output, rows: (output.reshape(-1, 5) * torch.arange(5.0)).sum(1)  # noqa: E731
    return compared(lambda net, x: net.layer(x).reshape(*(n * len(x) // 8 if n >= 8 else n for n in shape)), loss=loss)


@refused(
    "return it per example, or detach() it if it is only looked at; a loss summed over the batch is one number",
    ways=3,
    slow=True,
)
def test_a_mean_in_an_output(told: int) -> Right:
    functions: Any = (
        lambda net, x: net.layer(x).mean(0),
        lambda net, x: net.layer(x),
        lambda net, x: (net.layer(x), net.layer(x).mean(0).detach()),
        lambda net, x: net.layer(x).square().sum(),
    )
    losses: Any = (
        None,
        None,
        lambda output, rows: output[0].square().sum(1),
        lambda output, rows: output.reshape(1),
    )
    return compared(functions[told], loss=losses[told], loss_reduction="sum" if told == 3 else "mean")


@refused("keep regularisers on parameters out of the loss (use the optimizer's weight_decay), or detach them", ways=2)
def test_a_regulariser_in_the_loss(told: int) -> Right:
    def function(net: Net, x: Tensor) -> Any:
        return net.layer(x), net.layer.weight.square().sum()

    weights = (0.1, 0.0, 0.1)
    model: Any = dp_compile(Net(function), backend="eager")
    out, penalty = model(X)
    if told == 0:
        (out.square().mean() + weights[0] * penalty).backward()
    losses: Any = lambda output, rows: output[0].square().sum(1) + (0.1 * output[1].detach() if told == 2 else 0)  # noqa: E731
    return right(model, X, loss=losses)


# --- what a model writes --------------------------------------------------------------------------------------------


@refused(
    "compute the value in forward without writing it back, write it between two steps, or freeze it", ways=3, slow=True
)
def test_a_parameter_scaled_in_forward(told: int) -> Right:
    extra = nn.Parameter(torch.arange(1.0, 6.0), requires_grad=told != 3)

    def function(net: Net, x: Tensor) -> Tensor:
        if told == 1:
            return net.layer(x) * (net.extra / net.extra.norm())
        if told != 2:
            with torch.no_grad():
                net.extra.div_(net.extra.norm())
        return net.layer(x) * net.extra

    if told == 2:
        extra.data.div_(extra.data.norm())
    return compared(function, extra)


@refused("do not write to the input; clone it first", ways=2)
def test_an_input_overwritten_by_a_mixture(told: int) -> Right:
    def function(net: Net, x: Tensor) -> Tensor:
        y = net.layer(x.clone())
        if told != 1:
            x = x.clone() if told else x
            x.sub_(x.mean(0))
        return y

    return compared(function, None, X.clone())


class Normalised(nn.Module):
    """A normalisation whose output is used, or that only watches."""

    def __init__(self, norm: nn.Module, used: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.used = nn.Linear(5, 4), norm, used

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        normalised = self.norm(h)
        return normalised if self.used else h


def normalised(told: int, used: bool) -> Right:
    watches = told == 3 or not used
    norm = nn.LayerNorm(4) if told == 2 else nn.BatchNorm1d(4, track_running_stats=watches)
    model: nn.Module = Normalised(norm.eval() if told == 3 else norm, used)
    return right(dp_compile(replace_batchnorm(model) if told == 1 else model, backend="eager"), X)


@refused(BATCHNORM, ways=3, slow=True)
def test_batchnorm_compiled(told: int) -> Right:
    return normalised(told, used=True)


@refused(BATCHNORM, ways=3, slow=True)
def test_batchnorm_that_only_watches(told: int) -> Right:
    return normalised(told, used=False)


@refused("remove the in-place write, or compute the statistic outside the private model", ways=2)
def test_a_statistic_in_a_buffer(told: int) -> Right:
    def function(net: Net, x: Tensor) -> Tensor:
        h = net.layer(x)
        if told == 0:
            net.extra.copy_(h.detach().mean(0))
        return h

    model = Net(function, torch.zeros(5))
    private: Any = dp_compile(model, backend="eager")
    found = right(private, X)
    if told == 2:
        with torch.no_grad():
            mean = private(X).mean(0)
        assert mean.shape == (5,)
    return found


@refused("make the InstanceNorm1d with track_running_stats=False, or call .eval() on it", ways=2, slow=True)
def test_instances_with_statistics_compiled(told: int) -> Right:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv1d(2, 4, 2), nn.InstanceNorm1d(4, track_running_stats=told != 1), nn.Flatten())
    if told == 2:
        model[1].eval()
    x = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(4))
    return right(dp_compile(model.double(), backend="eager"), x.double())


@refused("leave it a tensor (no .item(), float() or int()), and keep nothing of a batch in attributes")
def test_a_number_read_out_of_examples(told: int) -> Right:
    def function(net: Net, x: Tensor) -> Tensor:
        if told:
            return net.layer(x) * x.sum(1, keepdim=True)
        h = net.layer(x) * net.extra
        net.extra = net.extra + x.sum().item()
        return h

    return compared(function, 1.0)


# --- operations that mix --------------------------------------------------------------------------------------------


@refused(
    "compute it for every example by itself; a loss belongs outside the model, one value per example "
    "(reduction='none'), then .mean(); use in_dims for inputs that have no example axis",
    ways=3,
)
def test_examples_that_are_mixed(told: int) -> Right:
    table = torch.randn(8, 5, generator=torch.Generator().manual_seed(6))
    if told == 3:
        return compared(lambda net, x, t: net.layer(x) - t.mean(0), None, X, table, in_dims=(0, None))
    if told == 2:
        each = lambda output, rows: F.cross_entropy(output, Y[rows], reduction="none")  # noqa: E731
        return compared(lambda net, x: net.layer(x), loss=each)
    return compared(lambda net, x: net.layer(x) - net.layer(x).mean(1 if told else 0, keepdim=True))


@refused(
    "compute one loss per example outside the model, from its outputs, and take the plain mean: "
    "dpcompile.losses.per_example_causal_lm or per_example_cross_entropy, or reduction='none'. Call a Hugging Face "
    "model without labels=",
    ways=3,
    slow=True,
)
def test_a_mean_over_all_tokens(told: int) -> Right:
    ids = torch.tensor([[1, 2, 3, 0], [2, 2, 0, 0], [4, 1, 2, 3]])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)

        def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
            logits = self.head(self.table(ids))
            if labels is None:
                return logits
            counted = labels != 0
            each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(counted)
            return (each * counted).sum() / counted.sum()

    losses: Any = (
        lambda output, rows: output.reshape(1),
        lambda output, rows: per_example_causal_lm(output, ids[rows], ignore_index=0),
        lambda output, rows: per_example_cross_entropy(output, ids[rows], ignore_index=0),
        lambda output, rows: F.cross_entropy(output.mT, ids[rows], reduction="none").sum(1),
    )
    return right(dp_compile(Model(), backend="eager"), *((ids,) if told else (ids, ids)), loss=losses[told])


ROWS = (
    "give the examples what does not depend on their place in the batch: index along their own dimensions ([1, T, ..] "
    "where they lie as [B, T, ..]), expand one value over the batch, pass what belongs to an example as an input "
    "(in_dims), or draw it with torch.rand or torch.randn"
)


def placed(told: int, wrong: Callable[[Net, Tensor], Tensor]) -> Right:
    if told == 3:
        return compared(lambda net, x, w: net.layer(x) * w, None, X, torch.arange(8.0)[:, None])
    functions: Any = (
        wrong,
        lambda net, x: net.layer(x) * torch.arange(5.0)[None],
        lambda net, x: net.layer(x) * torch.tensor(0.5).expand(len(x), 1),
        None,
        lambda net, x: net.layer(x) * (1 + 0 * torch.rand(len(x), 1)),  # other draws for each would compare nothing
    )
    return compared(functions[told], torch.arange(8.0)[:, None])


@refused(ROWS, ways=4, slow=True)
def test_numbers_of_rows(told: int) -> Right:
    return placed(told, lambda net, x: net.layer(x) * torch.arange(1.0 * len(x))[:, None])


@refused(ROWS, ways=4, slow=True)
def test_a_buffer_as_long_as_the_batch(told: int) -> Right:
    return placed(told, lambda net, x: net.layer(x) * net.extra)


@refused(ROWS, ways=4, slow=True)
def test_a_transform_as_long_as_the_batch(told: int) -> Right:
    return placed(told, lambda net, x: net.layer(x) * torch.fft.fft(torch.ones(len(x))).real[:, None])


# --- gradients ------------------------------------------------------------------------------------------------------


class Decayed(torch.autograd.Function):
    """The identity of a weight, whose gradient is that of a penalty."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return 0.01 * ctx.saved_tensors[0].sign()


@refused(
    "keep regularisers on parameters out of the model (use the optimizer's weight_decay), or freeze it",
    ways=2,
    slow=True,
)
def test_a_regulariser_in_the_model(told: int) -> Right:
    def function(net: Net, x: Tensor) -> Tensor:
        return net.layer(x) * (net.extra if told == 1 else Decayed.apply(net.extra))

    return compared(function, nn.Parameter(torch.arange(1.0, 6.0), requires_grad=told != 2))


class Signs(torch.autograd.Function):
    """The identity, whose gradient is not linear in what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return g[0].sign()


class Clipped(Signs):
    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return 0.5 * g[0]


@refused(
    "make that backward linear in what it is given, or use loss_reduction='sum' with the sum of the examples' losses, "
    "and a norm= that needs one backward only",
    ways=2,
)
def test_a_backward_that_is_not_linear(told: int) -> Right:
    between: Any = Clipped if told == 1 else Signs
    return compared(lambda net, x: between.apply(net.layer(x)).square(), loss_reduction="sum" if told == 2 else "mean")


@refused("return one value per example, or use one backward: norm='book_keeping', 'bk_mixed_ghost'", ways=3, slow=True)
def test_a_second_backward_of_a_summed_loss(told: int) -> Right:
    norm = ("ghost_clipping", "ghost_clipping", "book_keeping", "bk_mixed_ghost")[told]
    if told == 1:
        return compared(lambda net, x: net.layer(x).square().sum(1), norm=norm)
    loss = lambda output, rows: output.reshape(1)  # noqa: E731
    return compared(lambda net, x: net.layer(x).square().sum(), norm=norm, loss_reduction="sum", loss=loss)
