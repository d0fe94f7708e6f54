"""Graph breaks: every graph between two is a region, and nothing computes with examples between them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from block_models import GPT, B, D, dp_compile, ids, right, rows
from broken_models import BrokenGPT, graph_break
from oracle import PseudoLoss, train_step
from torch import Tensor, nn

from dpcompile import DPCompileError, DPOptimizer, ExampleMixingError, UnsupportedGraphError
from dpcompile.module import engine_of

SEEN: list[Any] = []


class Model(nn.Module):
    """Three layers, and a function of (model, x) that calls them."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
        self.free, self.inner = nn.Parameter(torch.randn(D)), Broken()
        self.layers = nn.Sequential(Broken(), nn.LayerNorm(D), nn.Linear(D, D), Broken())
        self.register_buffer("table", torch.randn(D))
        self.calls, self.function = 0, function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Broken(nn.Module):
    """A break between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).tanh()
        graph_break()
        return self.down(h) + x


def between_layers(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    graph_break()
    return m.c(m.b(h) + h)


def in_a_submodule(m: Any, x: Tensor) -> Tensor:
    return m.c(m.inner(m.a(x)) * 2)


def in_a_loop(m: Any, x: Tensor) -> Tensor:
    for layer in (m.a, m.b, m.inner, m.c):
        x = layer(x)
        graph_break()
    return x


def in_a_sequence(m: Any, x: Tensor) -> Tensor:
    return m.c(m.layers(x))


def with_side_effects(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    print("between", h.shape)
    SEEN.append(h.shape)
    m.calls += 1
    return m.c(h * m.table)


def printed(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    print(h)
    return m.c(h.tanh())


def without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.a(x)
        graph_break()
        h = m.b(h).tanh()
    return m.c(h + m.a(x))


def both_used_again(m: Any, x: Tensor) -> Tensor:
    h = m.a(x * m.free).tanh()
    graph_break()
    h = m.a(h) + h
    graph_break()
    return m.c(h * m.free)


def constants(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    graph_break()
    h = h + torch.arange(D)
    graph_break()
    return m.c(h.tanh())


ALLOWED = [between_layers, in_a_submodule, in_a_loop, in_a_sequence, with_side_effects, printed, without_gradients,
           both_used_again, constants]  # fmt: skip


def private(model: nn.Module, **options: Any) -> Any:
    return dp_compile(model, **{"max_grad_norm": 0.5, "backend": "eager", "regions": "breaks", **options})


@pytest.mark.parametrize("function", ALLOWED, ids=lambda f: f.__name__)
def test_models_with_breaks(function: Any) -> None:
    """The gradients of one backward per example, in every step and for other batch sizes."""
    model = Model(function)
    compiled = private(model)
    for batch in (B, B, 1, 6):
        right(model, compiled, torch.randn(batch, D))


def test_without_regions_a_break_is_refused() -> None:
    with pytest.raises(UnsupportedGraphError, match=r"graph_break[\s\S]*test_breaks.py[\s\S]*regions='breaks'"):
        private(Model(between_layers), regions=None)(rows())
    with pytest.raises(UnsupportedGraphError, match="regions='breaks'"):
        private(Model(between_layers), regions="blocks")(rows())


def test_side_effects_happen_once_a_call(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(with_side_effects)
    compiled = private(model)
    SEEN.clear()
    for _ in range(3):
        compiled(rows()).sum().backward()
        compiled.zero_grad()
    assert capsys.readouterr().out.count("between") == len(SEEN) == model.calls == 3


@pytest.mark.full
def test_inductor_compiles_every_piece() -> None:
    model = Model(in_a_submodule)
    right(model, private(model, backend="inductor"), rows())


def test_a_model_without_breaks_is_one_region() -> None:
    model = GPT(2)
    compiled = private(model)
    right(model, compiled, ids())
    assert engine_of(compiled).compilations == 1  # type: ignore[attr-defined]


@pytest.mark.full
def test_a_tied_head_behind_a_break() -> None:
    model = BrokenGPT()
    compiled = private(model)
    right(model, compiled, ids())
    assert compiled.plan.rules()["tokens.weight"] == "later"


def test_a_step_of_the_optimizer() -> None:
    model = Model(between_layers)
    compiled = private(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(compiled.parameters(), lr=0.1), compiled, noise_multiplier=1.0, expected_batch_size=B, seed=1
    )
    before = [p.clone() for p in compiled.parameters()]
    compiled(rows()).square().sum(1).mean().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, compiled.parameters(), strict=True))


def test_without_gradients_everything_may_run() -> None:
    model, x = Model(number), rows()
    with torch.no_grad():
        torch.testing.assert_close(private(model)(x), model(x))


# --- what is refused -------------------------------------------------------------------------------------------------

hidden: Any = torch._dynamo.disable


@hidden
def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


@hidden
def detached(x: Tensor) -> Tensor:
    return x.detach()


@hidden
def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(numpy.asarray(x).copy())


@hidden
def a_number(x: Tensor) -> float:
    return float(x.sum())


@hidden
def a_list(x: Tensor) -> list[Any]:
    return x.tolist()


@hidden
def a_new_tensor(x: Tensor) -> Tensor:
    return torch.ones(D)


@hidden
def hooked(h: Tensor) -> None:
    h.register_hook(lambda g: g - g.mean(0))


@hidden
def overwritten(h: Tensor) -> None:
    h.data[0] = h.data[1]


@hidden
def swallowed(h: Tensor) -> None:
    try:
        h.sub_(h.mean(0))
    except DPCompileError:
        SEEN.append("swallowed")
    with contextlib.suppress(DPCompileError):
        torch.ones(1)


@hidden
def outside(m: Any, h: Tensor) -> Tensor:
    return F.linear(h, m.b.weight)


@hidden
def with_a_view(m: Any) -> Tensor:
    return m.b.weight.detach()[0]


def mixing(m: Any, x: Tensor) -> Tensor:
    return m.c(centred(m.a(x)))


def mixing_a_copy(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(h - detached(h).mean(0))


def mixing_arguments(m: Any, x: Tensor) -> Tensor:
    return m.c(m.a(x) + centred(x))


def mixing_in_a_piece(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    graph_break()
    return m.c(h - h.mean(0))


def mixing_without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.a(x).mean(0, keepdim=True)
        graph_break()
    return m.c(m.a(x) - h)


def numpy_arrays(m: Any, x: Tensor) -> Tensor:
    return m.c(m.a(x) + through_numpy(x).mean(0))


def number(m: Any, x: Tensor) -> Tensor:
    return m.c(m.a(x) * a_number(x))


def numbers(m: Any, x: Tensor) -> Tensor:
    return m.c(m.a(x) * a_list(x)[0][0])


def item(m: Any, x: Tensor) -> Tensor:
    return m.c(m.a(x) * x.sum().item())


def listed(m: Any, x: Tensor) -> Tensor:
    return m.c(m.a(x) * x.tolist()[0][0])


def branch(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(h * 2 if h.sum() > 0 else h)


def chosen_rows(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(h[h.sum(1) > 0])


def made_outside(m: Any, x: Tensor) -> Tensor:
    return m.c(m.a(x) * a_new_tensor(x))


def hook(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    hooked(h)
    return m.c(h)


def written(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    overwritten(h)
    return m.c(h)


def caught(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    swallowed(h)
    return m.c(h)


def parameter_outside(m: Any, x: Tensor) -> Tensor:
    return m.c(outside(m, x))


def parameter_and_activation(m: Any, x: Tensor) -> Tensor:
    return m.c(outside(m, m.a(x)))


def parameter_alone(m: Any, x: Tensor) -> Tensor:
    return m.c(m.a(x) * with_a_view(m))


def shared_value(m: Any, x: Tensor) -> Tensor:
    table = m.free * 2
    h = m.a(x)
    graph_break()
    return m.c(h * table)


def arithmetic_in_a_loop(m: Any, x: Tensor) -> Tensor:
    for layer in (m.a, m.b):
        x = x + layer(x)
        graph_break()
    return m.c(x)


PLACE = r"[\s\S]*at .*test_breaks.py:\d+, in "
OUTSIDE = r"runs on values of examples outside any compiled graph"
NUMBERS = "reads Python numbers out of the values of examples, behind a graph break"
REFUSED: dict[Any, tuple[type[Exception], str]] = {
    mixing: (ExampleMixingError, OUTSIDE + PLACE + "centred"),
    mixing_a_copy: (ExampleMixingError, "`detach` " + OUTSIDE + PLACE + "detached"),
    mixing_arguments: (ExampleMixingError, OUTSIDE + PLACE + "centred"),
    mixing_in_a_piece: (ExampleMixingError, "mixes examples"),
    mixing_without_gradients: (DPCompileError, "is summed over the examples, and another block"),
    numpy_arrays: (ExampleMixingError, NUMBERS + PLACE + "through_numpy"),
    number: (ExampleMixingError, OUTSIDE + PLACE + "a_number"),
    numbers: (ExampleMixingError, NUMBERS + PLACE + "a_list"),
    item: (ExampleMixingError, NUMBERS),
    listed: (ExampleMixingError, NUMBERS),
    branch: (ExampleMixingError, NUMBERS),
    chosen_rows: (ExampleMixingError, OUTSIDE),
    made_outside: (UnsupportedGraphError, "no compiled graph made it"),
    hook: (UnsupportedGraphError, "puts a hook on the gradient of a value"),
    written: (ExampleMixingError, OUTSIDE + PLACE + "overwritten"),
    caught: (ExampleMixingError, OUTSIDE + PLACE + "swallowed"),
    parameter_outside: (UnsupportedGraphError, "parameter 'b.weight' is used by `t` outside any compiled" + PLACE),
    parameter_and_activation: (UnsupportedGraphError, "parameter 'b.weight' is used by `t`" + PLACE + "outside"),
    parameter_alone: (UnsupportedGraphError, "parameter 'b.weight' is used by `detach`" + PLACE + "with_a_view"),
    shared_value: (UnsupportedGraphError, "comes from parameters alone"),
    arithmetic_in_a_loop: (ExampleMixingError, "`add` " + OUTSIDE + PLACE + "arithmetic_in_a_loop"),
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_refused(function: Any) -> None:
    kind, message = REFUSED[function]
    with pytest.raises(kind, match=message):
        private(Model(function))(rows())


def test_a_refusal_leaves_no_trace() -> None:
    before = {n: getattr(Tensor, n) for n in ("tolist", "numpy", "data_ptr", "__dlpack__")}
    model = Model(mixing)
    with pytest.raises(ExampleMixingError):
        private(model)(rows())
    assert before == {n: getattr(Tensor, n) for n in before}
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert rows().mean(0).tolist()


def test_what_was_kept_by_an_earlier_call() -> None:
    def keeps(m: Any, x: Tensor) -> Tensor:
        graph_break()
        before, m.kept = getattr(m, "kept", None), x
        return m.c(m.a(x) if before is None else m.a(x) + before)

    compiled, first = private(Model(keeps)), rows()
    compiled(first)
    with pytest.raises(ExampleMixingError, match=r"an earlier call left there|through 'L\['m'\]\.kept'"):
        compiled(rows())


def test_inputs_that_lie_otherwise_are_proved_anew() -> None:
    """Dynamo has no guard on where examples lie: a graph between breaks is proved for each way."""

    class Rows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            graph_break()
            return x.tanh()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.rows = nn.Linear(D, D), Rows()

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return self.a(self.rows(x)) * self.rows(table).mean(0)

    model = Twice()
    loss, x, table = PseudoLoss(B), torch.randn(B, D), torch.randn(B, D)
    found = []
    for regions in (None, "breaks"):
        plain = copy.deepcopy(model)
        if regions is None:
            plain.rows.forward = torch.tanh  # type: ignore[method-assign]
        compiled = private(plain, in_dims=(0, None), regions=regions)
        train_step(compiled, (x, table), {}, loss)
        found.append({n: p.grad for n, p in compiled.named_parameters()})
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, msg=name)
    with pytest.raises(DPCompileError):
        private(copy.deepcopy(model))(x, table)
