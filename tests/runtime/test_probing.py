"""What looks at models from outside: attributes that are not there yet, tracers, copies, modes."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import dpcompile
from dpcompile.errors import DPCompileError, NotReadyError, PrivacyError, UnsupportedGraphError

dp_compile: Any = dpcompile.dp_compile
X = torch.randn(6, 4)


def layers() -> nn.Module:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 3))


@dp_compile(backend="eager")
class Decorated(nn.Module):
    """With names that are asked for where nothing has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def __getattr__(self, name: str) -> Any:
        if name == "spare":
            return 7
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (self.spare if hasattr(self, "missing") else 1)


MODELS: dict[str, Callable[[], Any]] = {
    "one graph": lambda: dp_compile(layers(), backend="eager"),
    "regions": lambda: dp_compile(layers(), backend="eager", regions="blocks"),
    "decorated": Decorated,
}
LATER = ("plan", "graph", "certificate", "grad_norms")


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def train(model: Any) -> None:
    model(X).square().mean(1).mean().backward()


def test_what_is_not_there_yet_is_no_attribute_and_says_why(model: Any) -> None:
    assert not any(hasattr(model, name) for name in LATER)
    assert getattr(model, "plan", None) is None
    assert {name for name, _ in inspect.getmembers(model)}.isdisjoint(LATER)
    for name in LATER:
        with pytest.raises(NotReadyError, match="nothing is compiled yet|no gradient norms yet") as caught:
            getattr(model, name)
        assert isinstance(caught.value, DPCompileError) and isinstance(caught.value, AttributeError)
        assert "what to do" in str(caught.value)
    with pytest.raises(AttributeError, match="no_such_name"):
        model.no_such_name  # noqa: B018
    train(model)
    assert all(hasattr(model, name) for name in LATER)
    assert len(model.grad_norms) == 6


def test_names_of_the_users_own_are_still_found() -> None:
    model = Decorated()
    assert model.spare == 7 and not hasattr(model, "other")
    train(model)
    for part in (copy.deepcopy(model), copy.copy(model)):
        assert part.spare == 7
        assert not hasattr(part, "no_such_name")


def test_an_error_inside_a_property_of_ours_is_not_hidden(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train(model)
    monkeypatch.setattr(type(model).__mro__[1], "plan", property(lambda self: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        model.plan  # noqa: B018


TRACERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "jit.trace": ("torch.jit", lambda m: torch.jit.trace(m, X)),
    "jit.trace, inside": ("torch.jit", lambda m: torch.jit.trace(nn.Sequential(m), X)),
    "jit.script": ("torch.jit", torch.jit.script),
    "jit.script, inside": ("torch.jit", lambda m: torch.jit.script(nn.Sequential(m))),
    "export": ("exported", lambda m: torch.export.export(m, (X,))),
    "export, inside": ("exported", lambda m: torch.export.export(nn.Sequential(m), (X,))),
    "make_fx": ("torch.fx", lambda m: make_fx(m)(X)),
    "symbolic_trace, inside": ("torch.fx", lambda m: torch.fx.symbolic_trace(nn.Sequential(m))),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("tracer", TRACERS)
def test_tracers_are_named_before_and_after_the_first_call(model: Any, tracer: str) -> None:
    named, trace = TRACERS[tracer]
    for _ in range(2):
        with pytest.raises(UnsupportedGraphError, match=named) as caught:
            trace(model)
        assert "build it again and load_state_dict" in str(caught.value)
        train(model)
        model.zero_grad()


def test_a_symbolic_trace_of_the_model_itself_is_an_ordinary_module(model: Any) -> None:
    """Fx takes the class's forward, not the call: nothing private is in the trace, nor is it taken for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decorated, "forward", lambda self, x: self.layer(x))
        traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(X), model(X))
    train(traced)
    with pytest.raises(PrivacyError, match="did not come out of the clipped backward"):
        train(model)


def test_gradients_that_are_asked_for_are_named(model: Any) -> None:
    for _ in range(2):
        loss = model(X).square().mean(1).mean()
        with pytest.raises(PrivacyError, match=r"torch.autograd.grad was asked for gradients"):
            torch.autograd.grad(loss, list(model.parameters()))
        assert all(p.grad is None for p in model.parameters())
    train(model)
    x = X.clone().requires_grad_()
    model.zero_grad()
    (slope,) = torch.autograd.grad(model(x).square().mean(1).mean(), x)
    assert slope.shape == x.shape


def test_a_mode_that_sees_operations_is_named() -> None:
    model = dp_compile(layers(), backend="eager")
    with FlopCounterMode(display=False), pytest.raises(UnsupportedGraphError, match="FlopCounterMode"):
        model(X)
    train(model)


def test_copies_before_the_first_call(model: Any) -> None:
    saved = io.BytesIO()
    torch.save(model, saved) if type(model) is not Decorated else torch.save(model.state_dict(), saved)
    found = [copy.deepcopy(model), copy.deepcopy(nn.Sequential(model))]
    if type(model) is not Decorated:  # a class of this file, by a name that is the decorated one
        saved.seek(0)
        found += [torch.load(saved, weights_only=False), pickle.loads(pickle.dumps(model))]
    for one in found:
        torch.testing.assert_close(one(X), model(X))
        train(one)
    assert all(p.grad is None for p in model.parameters())


def test_ways_to_look_at_a_model(model: Any) -> None:
    shapes: list[torch.Size] = []
    handles = [m.register_forward_hook(lambda m, a, y: shapes.append(y.shape)) for m in model.modules()]
    with torch.no_grad():
        model(X)
    for handle in handles:
        handle.remove()
    assert len(shapes) >= 1
    values = [getattr(model, name) for name in dir(model) if hasattr(model, name)]
    assert values and repr(model) and vars(model) and str(inspect.signature(model.forward))
    assert model.apply(lambda m: None) is model and model.train().eval().train() is model
    model.load_state_dict(model.state_dict(), strict=True)
    assert model.load_state_dict({}, strict=False).missing_keys
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(2 * vector, model.parameters())
    torch.testing.assert_close(nn.utils.parameters_to_vector(model.parameters()), 2 * vector)
    assert len(list(model.named_modules())) == len(list(model.modules()))
    train(model)


def test_a_step_under_such_a_mode_leaves_the_next_one_as_it_was() -> None:
    model = dp_compile(layers(), backend="eager")
    optimizer = dpcompile.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, noise_multiplier=1.0, expected_batch_size=6
    )
    step = dpcompile.compile_step(model, lambda y, t: (y - t).square().mean(1), optimizer)
    targets = torch.zeros(6, 3)
    with FlopCounterMode(display=False), pytest.raises(UnsupportedGraphError, match="FlopCounterMode"):
        step(X, targets)
    step(X, targets)
    assert optimizer.logical_step == 1
