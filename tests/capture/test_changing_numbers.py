"""Python numbers that change from call to call: one graph or a few, right at every value, or a way out that works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpcompile import DPOptimizer, UnsupportedGraphError, compile_step, dp_compile

STEPS = 12  # more than Dynamo's limit of recompilations
Operation = Callable[[Tensor, Any], Tensor]


class Scaled(nn.Module):
    """``operation(hidden, number)``, where the number is an argument, an attribute or a count of the calls."""

    def __init__(self, way: str, operation: Operation) -> None:
        super().__init__()
        self.way, self.operation, self.calls, self.tau, self.taus = way, operation, 0, 1.0, [1.0]
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, tau: Any = None) -> Tensor:
        if self.way == "counter":
            self.calls += 1
            tau = min(1.0, 0.05 * self.calls)
        elif self.way == "attribute":
            tau = self.tau
        elif self.way == "list":
            tau = self.taus[0]
        elif self.way == "dict argument":
            tau = tau["tau"]
        return self.b(self.operation(self.a(x).tanh(), tau))


def train(way: str, operation: Operation = torch.mul, *, steps: int = STEPS, step: bool = False, **options) -> int:
    """Compare each clipped sum with that of the number of the moment; returns how many graphs Dynamo made."""
    torch.manual_seed(0)
    net, x, y = Scaled(way, operation), torch.randn(6, 4), torch.randint(0, 3, (6,))
    options = {"backend": "eager", "max_grad_norm": 0.2, **options}
    model: Any = dp_compile(net, **options)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, noise_multiplier=0.0, expected_batch_size=1
    )
    whole = compile_step(model, F.cross_entropy, optimizer) if step else None
    torch._dynamo.utils.counters.clear()
    for i in range(steps):
        number = 0.05 * (i + 1)
        net.tau = net.taus[0] = torch.tensor(number) if options.get("in_dims") else number  # type: ignore[assignment]
        given = {"dict argument": ({"tau": number},), "argument": (net.tau,)}.get(way, ())
        wanted = expected(net, operation, x, y, number)
        if whole is not None:
            whole((x, *given), y)
        else:
            F.cross_entropy(model(x, *given), y).backward()
        for p, sums in zip(net.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, sums, rtol=1e-4, atol=1e-6)
        if whole is None:
            optimizer.step()
            optimizer.zero_grad()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def expected(net: Scaled, operation: Operation, x: Tensor, y: Tensor, number: float) -> list[Tensor]:
    totals = [torch.zeros_like(p) for p in net.parameters()]
    for i in range(len(x)):
        loss = F.cross_entropy(net.b(operation(net.a(x[i : i + 1]).tanh(), number)), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(net.parameters()))
        weight = (0.2 / torch.stack([g.norm() for g in grads]).norm()).clamp(max=1)
        totals = [t + weight * g for t, g in zip(totals, grads, strict=True)]
    return totals


@pytest.mark.parametrize("way", ["argument", "dict argument", "attribute", "list", "counter"])
def test_few_graphs(way) -> None:
    assert train(way) <= 3


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("argument", {"step": True}),
        ("counter", {"step": True}),
        ("argument", {"regions": "blocks"}),
        ("counter", {"regions": "blocks"}),
        ("argument", {"dynamic": True}),
    ],
)
def test_few_graphs_elsewhere(way, options) -> None:
    assert train(way, **options) <= 3


def test_a_branch_on_the_number_is_a_graph_more() -> None:
    assert train("argument", lambda h, t: h * 2 if t > 0.3 else h - t) <= 4


def test_what_cannot_be_traced_with_an_input_takes_a_constant() -> None:
    """``number ** tensor`` has the logarithm of a number in its gradient, which torch does not trace."""
    assert train("argument", lambda h, t: t**h, steps=4) == 4


@pytest.mark.parametrize("way", ["argument", "attribute"])
def test_values_without_end_are_refused_and_the_remedy_works(way) -> None:
    def where(h: Tensor, t: Any) -> Tensor:
        return torch.where(h > 0, h, t)

    with pytest.raises(UnsupportedGraphError, match=r"number \S*(args\[1\]|tau) keeps changing(?s:.*)torch\.tensor"):
        train(way, where)
    assert train(way, where, in_dims={"tau": None}) == 1


@pytest.mark.slow
def test_inductor() -> None:
    assert train("argument", backend="inductor", steps=4) <= 3
