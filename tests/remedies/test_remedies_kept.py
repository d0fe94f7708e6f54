"""What a model keeps from call to call, and draws in several forwards: what the messages say to do, tried."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from private_steps import X
from remedies import Right, equals, plain, private, refused, right, trains
from test_remedies_proof import Net
from torch import Tensor, nn

from dpcompile import dp_compile


def made(function: Callable[..., Any], extra: Any = None) -> Any:
    return dp_compile(Net(function, extra), backend="eager")


@refused("do not assign buffers in forward, or compute the statistic outside the private model", ways=2)
def test_a_buffer_that_is_assigned(told: int) -> Right:
    def function(net: Net, x: Tensor) -> Tensor:
        h = net.layer(x)
        if not told:
            net.extra = h.detach().mean(0)
        return h

    model = made(function, torch.zeros(5))
    if told == 2:
        with torch.no_grad():
            mean = model(X).mean(0)
        assert mean.shape == (5,)
    return right(model, X)


@refused("initialise parameters from public data, or from none, before dp_compile", ways=2)
def test_a_parameter_initialised_by_a_call(told: int) -> Right:
    def function(net: Net, x: Tensor) -> Tensor:
        h = net.layer(x)
        if not net.ready:
            net.extra.data = 1 / (1 + h.detach().std(0))
            net.ready = True  # type: ignore[assignment]
        return h * net.extra

    model = Net(function, nn.Parameter(torch.ones(5)))
    model.ready = told == 2  # type: ignore[assignment]
    if told == 1:
        with torch.no_grad():
            model(torch.arange(40.0).view(8, 5))  # public
    private_model: Any = dp_compile(model, backend="eager")
    with torch.no_grad():
        private_model(X)
    return right(private_model, X)


@refused("keep nothing of a batch in the model's attributes; pass what it needs as arguments", ways=2)
def test_the_last_batch_kept(told: int) -> Right:
    def function(net: Net, x: Tensor, last: Tensor | None = None) -> Tensor:
        h = net.layer(x)
        if told == 0:
            h = h if net.extra is None else h + net.extra.mean(0)
            net.extra = x
        return h if last is None else h + last

    model = made(function)
    model(X).sum(1).mean().backward()
    return right(model, X + 1, *([X] if told == 2 else []))


@refused(
    "before training goes on, give the model a new tensor that depends on no example in the place of 'extra' (writing "
    "over the old one is not enough); or make such calls on a copy, copy.deepcopy(model)",
    ways=2,
)
def test_what_a_call_without_gradients_left(told: int) -> Right:
    def function(net: Net, x: Tensor) -> Tensor:
        h = net.layer(x)
        if not torch.is_grad_enabled():
            net.extra = h.mean(0)
        return h + net.extra

    model = made(function, torch.zeros(5))
    with torch.no_grad():
        (copy.deepcopy(model) if told == 2 else model)(X)
    if told == 1:
        model.extra = torch.zeros(5)
    return right(model, X)


LOG: list[Any] = []


@refused("leave it a tensor (no .item(), float() or int(), and no size that goes by values), or return it", ways=2)
def test_a_number_kept_elsewhere(told: int) -> Right:
    def function(net: Net, x: Tensor) -> Any:
        h = net.layer(x)
        if torch.is_grad_enabled():
            return h
        if told == 2:
            return h, x.abs().max().item()
        LOG.append(x.abs().max() if told else x.abs().max().item())
        return h

    model = made(function)
    with torch.no_grad():
        found = model(X)
    assert float(found[1] if told == 2 else LOG.pop()) == float(X.abs().max())
    return right(model, X)


@refused(
    "set it to a number that depends on no example before training goes on, or make such calls on a copy, "
    "copy.deepcopy(model)",
    ways=2,
)
def test_a_number_kept_in_the_model(told: int) -> Right:
    def function(net: Net, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            net.extra = x.abs().max().item()
        return net.layer(x) * net.extra

    model = made(function, 1.0)
    with torch.no_grad():
        (copy.deepcopy(model) if told == 2 else model)(X)
    if told == 1:
        model.extra = 1.0
    return right(model, X)


# --- draws in several forwards --------------------------------------------------------------------------------------

LARGER = (
    "give make_private a physical_batch_size as large as the largest draw, or take the physical batches one by one: "
    "`for batch in loader.parts()`"
)


class Counted(nn.Linear):
    """Counts its calls in Python, and does something by it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(5, 3)
        self.calls, self.function = 0, function
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, calls: Tensor | None = None) -> Any:
        self.calls += 1
        return self.function(self, super().forward(x), calls)


def drawn(function: Callable[..., Any], told: int, pick: Callable[[Any], Tensor] = lambda out: out) -> Right:
    torch.manual_seed(1)
    physical = 24 if told == 1 else 2
    model, optimizer, loader = private(model=Counted(function), physical_batch_size=physical, seed=3)

    class Parts:
        def __iter__(self) -> Any:
            return iter(loader.parts() if told == 2 else loader)

        def __len__(self) -> int:
            return len(loader)

    def loss(model: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(pick(model(batch[0])), batch[-1])

    return trains(model, optimizer, Parts(), loss=loss)


pytestmark = pytest.mark.filterwarnings("ignore:two DPOptimizers of one seed")


@refused(LARGER, ways=2, slow=True)
def test_draws_in_other_containers(told: int) -> Right:
    by_turns = lambda net, h, _: {"odd" if net.calls % 2 else "even": h}  # noqa: E731
    return drawn(by_turns, told, lambda out: next(iter(out.values())))


@refused(LARGER, ways=2, slow=True)
def test_draws_that_write(told: int) -> Right:
    def function(net: Any, h: Tensor, _: Any) -> Tensor:
        net.count += 1
        return h

    return drawn(function, told)


@refused(f"return tensors with an example axis, or {LARGER}", ways=3, slow=True)
def test_draws_that_return_other_numbers(told: int) -> Right:
    def function(net: Any, h: Tensor, _: Any) -> Any:
        return (h, h.argmax(1)) if told == 3 else (h, torch.rand(3))

    return drawn(function, told, lambda out: out[0])


@refused(f"pass what changes as an argument, or {LARGER}", ways=3, slow=True)
def test_draws_that_depend_on_a_counter(told: int) -> Right:
    if told == 3:
        model: Any = dp_compile(Counted(lambda net, h, calls: h * 0.9**calls), in_dims=(0, None), backend="eager")
        return right(model, X, torch.tensor(2.0), in_dims=(0, None))
    return drawn(lambda net, h, _: h * 0.9**net.calls, told)


class Deep(nn.Module):
    def __init__(self, extra: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        inside = (nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64))
        self.net, self.extra = nn.Sequential(*inside, nn.LayerNorm(64), nn.Linear(64, 3)), extra

    def forward(self, x: Tensor) -> Any:
        h = self.net(x)
        return (h, 2) if self.extra else h


@refused(
    "return nothing but tensors with an example axis from forward, or set memory_budget=None and use smaller batches",
    ways=2,
    slow=True,
)
def test_parts_that_return_something_else(told: int) -> Right:
    budget = None if told == 2 else 1.0
    x = torch.randn(8 if told == 2 else 32, 50, 64, generator=torch.Generator().manual_seed(1))
    model: Any = dp_compile(Deep(extra=told != 1), backend="eager", memory_budget=budget)
    loss = lambda output, rows: (output[0] if isinstance(output, tuple) else output).square().mean((1, 2))  # noqa: E731
    if told == 0:
        loss(model(x), slice(None)).mean().backward()
        return equals(model.plan.parts, 1)
    return right(model, x, loss=loss, tolerance=1e-4)


class Cache:
    """Kept by nobody but the model that made it."""

    def __init__(self, seen: int) -> None:
        self.seen = seen


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> Any:
        return self.net(x), Cache(len(x))


@refused(
    "read it where one forward runs: without gradients, or with a physical_batch_size as large as the largest draw "
    "and without memory_budget",
    ways=2,
)
def test_an_object_of_each_of_several_forwards(told: int) -> Right:
    model, optimizer, loader = private(model=Caching(), physical_batch_size=24 if told == 2 else 2, seed=3)

    def loss(model: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            _, apart = model(batch[0])
        outputs, cache = model(batch[0])
        assert (apart if told == 1 else cache).seen == len(batch[0])
        return nn.functional.cross_entropy(outputs, batch[-1])

    return trains(model, optimizer, loader, loss=loss)
