"""What users hold: the module, its attributes, and what may happen between forward, backward and step."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import math
import pickle
import types
import warnings
import weakref
from typing import Any

import pytest
import torch
from models import B, Block, D, LanguageModel, T, V
from oracle import PseudoLoss, Truth, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dpcompile
from dpcompile import DPCompileError, PrivacyError, UnsupportedGraphError
from dpcompile.capture.arguments import signature_of
from dpcompile.module import engine_of
from dpcompile.runtime.delivery import warn_of_lost_examples

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have


class Net(nn.Module):
    """A docstring."""

    calibration: Tensor

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, width), nn.Linear(width, 3)
        self.register_buffer("calibration", torch.ones(3))

    def forward(self, x: Tensor, power: int = 1, *, scale: float = 1.0) -> Tensor:
        """Forward's own docstring."""
        return self.second(self.first(x).relu()).pow(power) * scale * self.calibration

    def width(self) -> int:
        return self.first.out_features


@dp_compile(backend="eager", max_grad_norm=0.5)
class Decorated(nn.Module):
    """Decorated with options."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Derived(Decorated):
    """A subclass of a decorated class, with a layer more."""

    def __init__(self) -> None:
        super().__init__(4)
        self.third = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(super().forward(x))


def batch(n: int = B) -> Tensor:
    return torch.randn(n, D)


def private_net(model: nn.Module | None = None, **options: Any) -> Any:
    return dp_compile(model or Net(), **{"backend": "eager", "max_grad_norm": 0.5, **options})


def truth_of(model: nn.Module, x: Tensor, bound: float = 0.5) -> Truth:
    return clip(per_example_gradients(model, (x,), {}, PseudoLoss(len(x))), bound)


def step(private: Any, x: Tensor) -> None:
    train_step(private, (x,), {}, PseudoLoss(len(x)))


def assert_step_right(private: Any, plain: nn.Module, x: Tensor, bound: float = 0.5) -> None:
    private.zero_grad()
    step(private, x)
    assert_right(private, truth_of(plain, x, bound), 1e-4)


# --- it is the user's module ------------------------------------------------------------------------------------------


def test_it_looks_like_the_model() -> None:
    model = Net()
    private = dp_compile(model)
    assert isinstance(private, Net) and isinstance(private, nn.Module)
    assert type(private).__name__ == "Net" and private.__doc__ == "A docstring."
    assert list(private.state_dict()) == list(model.state_dict())
    assert [n for n, _ in private.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(a is b for a, b in zip(private.parameters(), model.parameters(), strict=True))
    assert private.calibration is model.calibration
    assert inspect.signature(private.forward) == inspect.signature(model.forward)
    assert private.forward.__doc__ == "Forward's own docstring."
    assert private.width() == 5 and repr(private) == repr(model)
    assert dict(private.named_modules()).keys() == dict(model.named_modules()).keys()


def test_the_model_itself_stays_ordinary() -> None:
    model = Net()
    x = batch()
    private = private_net(model)
    step(private, x)
    assert type(model) is Net
    wanted = model(x)
    torch.testing.assert_close(private(x), wanted)
    model.zero_grad()
    wanted.sum().backward()
    assert model.second.bias.grad is not None and not hasattr(model, "grad_norms")


def test_state_is_shared_both_ways() -> None:
    model = Net()
    private = private_net(model)
    private.eval()
    assert not model.training and not model.first.training
    model.train()
    assert private.training
    private.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
    assert not any(p.any() for p in model.parameters())
    private.note = "hello"
    assert model.note == "hello"
    assert private.requires_grad_(False) is private and not any(p.requires_grad for p in model.parameters())


def test_arguments_and_outputs_are_the_models() -> None:
    model, x = Net(), batch()
    private = private_net(model)
    torch.testing.assert_close(private(x, 2, scale=0.5), model(x, 2, scale=0.5))
    torch.testing.assert_close(private(x=x, power=3), model(x, 3))
    with pytest.raises((TypeError, DPCompileError), match="argument"):
        private(x, 1, 2.0, 3)
    with pytest.raises(Exception, match="must have same reduction dim"):
        private(torch.randn(B, D + 1))


def _doubled(module: nn.Module, args: Any, out: Any) -> Any:
    return out * 2


def test_hooks_of_the_model_run() -> None:
    model = Net()
    model.first.register_forward_hook(_doubled)
    private = private_net(model)
    x = batch()
    assert_step_right(private, model, x)


@pytest.mark.parametrize("make", [lambda: private_net(), Decorated, Derived], ids=["view", "decorated", "derived"])
def test_deepcopy_is_private_and_independent(make: Any) -> None:
    private, x = make(), batch()
    step(private, x)
    twin = copy.deepcopy(private)
    assert isinstance(twin, nn.Module) and list(twin.state_dict()) == list(private.state_dict())
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in private.parameters()}
    plain = _plain_like(twin)
    assert_step_right(twin, plain, x)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert next(private.parameters()).any()


def _plain_like(private: Any) -> nn.Module:
    """An ordinary module that computes the same."""

    class Plain(nn.Module):
        first: nn.Module
        second: nn.Module
        third: nn.Module

        def __init__(self) -> None:
            super().__init__()
            self.__dict__.update(copy.deepcopy(dict(private.__dict__)))

        def forward(self, x: Tensor) -> Tensor:
            out = self.second(self.first(x).relu())
            return self.third(out) if "third" in self._modules else out

    plain = Plain()
    plain.zero_grad()
    return plain


@pytest.mark.parametrize("make", [lambda: private_net(), Decorated, Derived], ids=["view", "decorated", "derived"])
def test_pickle_and_save(make: Any) -> None:
    private, x = make(), batch()
    step(private, x)
    buffer = io.BytesIO()
    torch.save(private, buffer)
    buffer.seek(0)
    for loaded in (pickle.loads(pickle.dumps(private)), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(loaded.state_dict(), private.state_dict())
        assert engine_of(loaded).max_grad_norm == 0.5
        assert_step_right(loaded, _plain_like(loaded), x)


def test_state_dict_goes_into_the_plain_model_and_back() -> None:
    private, buffer = private_net(), io.BytesIO()
    torch.save(private.state_dict(), buffer)
    buffer.seek(0)
    plain = Net()
    plain.load_state_dict(torch.load(buffer))
    other = private_net()
    other.load_state_dict(plain.state_dict())
    x = batch()
    torch.testing.assert_close(other(x), plain(x))


# --- decorator --------------------------------------------------------------------------------------------------------


def test_decorator_with_options() -> None:
    model, x = Decorated(), batch()
    assert isinstance(model, Decorated) and Decorated.__name__ == "Decorated"
    assert Decorated.__doc__ == "Decorated with options." and Decorated.__module__ == __name__
    assert list(inspect.signature(Decorated.__init__).parameters)[1:] == ["width"]
    assert_step_right(model, _plain_like(model), x)


def test_decorator_without_options() -> None:
    @dp_compile
    class Bare(nn.Linear):
        pass

    model = Bare(3, 2)
    assert isinstance(model, Bare) and isinstance(model, nn.Linear) and engine_of(model).max_grad_norm == 1.0
    assert engine_of(model) is engine_of(model) and engine_of(model) is not engine_of(Bare(3, 2))


def test_decorated_library_class() -> None:
    private = dp_compile(nn.Linear, backend="eager", max_grad_norm=0.5)(D, 3)
    plain = nn.Linear(D, 3)
    plain.load_state_dict(private.state_dict())
    assert_step_right(private, plain, batch())
    assert type(plain) is nn.Linear


def test_subclass_of_a_decorated_class() -> None:
    model, x = Derived(), batch()
    assert isinstance(model, Derived) and isinstance(model, Decorated)
    assert_step_right(model, _plain_like(model), x)


# --- attributes -------------------------------------------------------------------------------------------------------


def test_attributes_before_and_after() -> None:
    private = private_net()
    for name in ("plan", "graph", "certificate"):
        with pytest.raises(DPCompileError, match="nothing is compiled yet"):
            getattr(private, name)
    with pytest.raises(DPCompileError, match="no gradient norms yet"):
        private.grad_norms  # noqa: B018
    private.trace(batch())
    assert private.plan.rules() == {n: "outer" if "weight" in n else "keep" for n, _ in private.named_parameters()}
    assert "first.weight" in str(private.plan) and "why" in str(private.plan)
    assert "first.weight: mm" in str(private.certificate)
    assert "aten.mm" in private.graph.print_readable(print_output=False)
    with pytest.raises(DPCompileError, match="no gradient norms yet"):
        private.grad_norms  # noqa: B018
    assert all(p.grad is None for p in private.parameters())
    step(private, batch())
    norms = private.grad_norms
    assert norms.shape == (B,) and norms.dtype == torch.float32 and not norms.requires_grad


def test_trace_raises_what_the_call_would() -> None:
    class Centred(Net):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.second(self.first(x - x.mean(0)))

    with pytest.raises(DPCompileError, match="mixes examples"):
        private_net(Centred()).trace(batch())


def test_the_graph_is_complete_in_itself() -> None:
    """It takes inputs and cotangents, and returns outputs, clipped sums and norms."""
    model, x = Net(7), batch()
    private = private_net(model)
    step(private, x)
    graph = private.graph.graph
    shapes = [tuple(n.meta["val"].shape) for n in graph.nodes if n.op == "placeholder"]
    assert shapes.count((B,)) == 2 and (B, D) in shapes
    returned = [tuple(n.meta["val"].shape) for n in graph.output_node().args[0] if isinstance(n, torch.fx.Node)]
    assert {(B, 3), (B,), *(tuple(p.shape) for p in model.parameters())} == set(returned)


def test_grad_norms_survive_an_evaluation_and_a_step() -> None:
    private = private_net()
    step(private, batch())
    norms = private.grad_norms.clone()
    with torch.no_grad():
        private(batch(3))
    private.zero_grad()
    torch.testing.assert_close(private.grad_norms, norms)


# --- without gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(mode: Any) -> None:
    """Any batch, also what would be refused in training, and no gradients."""

    class Ranked(Net):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x).sort(0).values

    model = Ranked().eval()
    private = private_net(model)
    for n in (1, 2, B):
        with mode():
            out = private(batch(n))
        assert out.shape == (n, 3) and not out.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_everything_frozen() -> None:
    private = private_net(Net().requires_grad_(False))
    out = private(batch())
    assert not out.requires_grad
    x = batch().requires_grad_()
    private(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in private.parameters())


def test_training_evaluation_training() -> None:
    model = Net()
    private = private_net(model)
    for n in (B, 2, B):
        x = batch(n)
        assert_step_right(private, model, x)
        with torch.no_grad():
            torch.testing.assert_close(private(x), model(x))


# --- recompilation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_other_batch_sizes(dynamic: bool | None) -> None:
    model = Net()
    private = private_net(model, dynamic=dynamic)
    for n in (4, 6, 1, 9, 2):
        assert_step_right(private, model, batch(n))
        assert private.grad_norms.shape == (n,)


def test_freezing_and_thawing_recompiles() -> None:
    """Never a stale graph: frozen parameters are left out of the norm, thawed ones are in it."""
    model, x = Net(), batch()
    private = private_net(model)
    assert_step_right(private, model, x)
    for name, wanted in (("first", False), ("second", False), ("first", True), ("second", True)):
        getattr(private, name).requires_grad_(wanted)
        private.zero_grad()
        for p in model.parameters():
            p.grad = None
        if not any(p.requires_grad for p in model.parameters()):
            assert not private(x).requires_grad
            continue
        assert_step_right(private, model, x)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert set(engine_of(private).trainable()) == trained == set(private.plan.rules())


def test_freezing_between_forward_and_backward_leaves_nothing_unclipped() -> None:
    model, x = Net(), batch()
    private = private_net(model)
    loss = PseudoLoss(B)(private(x), slice(None)).mean()
    private.first.requires_grad_(False)
    loss.backward()
    for p in private.first.parameters():
        assert p.grad is None or p.grad.norm() <= 0.5 * B * 1.001


def test_a_layer_swapped_after_compilation() -> None:
    """New parameters are clipped, or refused; never left alone."""
    model, x = Net(), batch()
    private = private_net(model)
    assert_step_right(private, model, x)
    private.second = nn.Linear(5, 3)
    try:
        private.zero_grad()
        step(private, x)
    except DPCompileError as error:
        assert "parameter" in str(error)
        return
    assert_right(private, truth_of(model, x), 1e-4)


def test_tied_after_compilation() -> None:
    """Two parameters become one: their gradients add before the norm."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh())

    model, x = Pair(), batch()
    private = private_net(model)
    assert_step_right(private, model, x)
    private.second.weight = private.first.weight
    private.zero_grad()
    try:
        step(private, x)
    except DPCompileError:
        return
    assert_right(private, truth_of(model, x), 1e-4)


@pytest.mark.parametrize("change", ["double", "load_assign", "data", "in_place"])
def test_parameters_changed_after_compilation(change: str) -> None:
    model, x = Net(), batch()
    private = private_net(model)
    assert_step_right(private, model, x)
    if change == "double":
        private.double()
        x = x.double()
    elif change == "load_assign":
        private.load_state_dict({k: v.clone() + 0.1 for k, v in model.state_dict().items()}, assign=True)
    elif change == "data":
        private.first.weight.data = torch.randn(5, D)
    else:
        with torch.no_grad():
            private.first.weight.mul_(2)
    private.zero_grad()
    try:
        step(private, x)
    except DPCompileError as error:
        assert change == "load_assign" and "parameter" in str(error)
        return
    assert_right(private, truth_of(model, x), 1e-4)


def test_a_change_of_mode_recompiles() -> None:
    class Moody(Net):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.second(self.first(x)) * (2.0 if self.training else 1.0)

    model, x = Moody(), batch()
    private = private_net(model)
    for mode in (True, False, True):
        private.train(mode)
        assert_step_right(private, model, x)


def test_python_numbers_as_arguments() -> None:
    model, x = Net(), batch()
    private = private_net(model)
    for scale in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        private.zero_grad()
        PseudoLoss(B)(private(x, scale=scale), slice(None)).mean().backward()
        truth = clip(per_example_gradients(model, (x,), {}, lambda o, r, s=scale: PseudoLoss(B)(o * s, r)), 0.5)
        assert_right(private, truth, 1e-4)


def test_endless_recompilation_is_an_error_not_a_fallback() -> None:
    """Past torch's limit the model must not run uncompiled, that is unclipped."""
    private = private_net(dynamic=False)
    with pytest.raises(DPCompileError, match="recompiled too often"):
        for n in range(2, 40):
            private.zero_grad()
            step(private, batch(n))
    assert not any(p.grad is not None and p.grad.norm() > 0.5 * 40 for p in private.parameters())


def test_compilation_that_is_switched_off() -> None:
    """``torch.compiler.set_stance("force_eager")`` would run the model unclipped."""
    private, x = private_net(), batch()
    with torch.compiler.set_stance("force_eager"):
        try:
            step(private, x)
        except DPCompileError:
            return
    with pytest.raises(PrivacyError):
        engine_of(private).ledger.verify(engine_of(private).trainable())


def test_dynamo_disabled_by_configuration() -> None:
    private, x = private_net(), batch()
    with torch._dynamo.config.patch(disable=True):
        try:
            step(private, x)
        except (DPCompileError, RuntimeError):
            return
    with pytest.raises(PrivacyError):
        engine_of(private).ledger.verify(engine_of(private).trainable())


def test_suppressed_errors_do_not_fall_back_to_an_unclipped_run() -> None:
    class Centred(Net):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.second(self.first(x - x.mean(0)))

    private = private_net(Centred())
    with torch._dynamo.config.patch(suppress_errors=True):
        try:
            step(private, batch())
        except DPCompileError:
            return
    with pytest.raises(PrivacyError):
        engine_of(private).ledger.verify(engine_of(private).trainable())


# --- backward ---------------------------------------------------------------------------------------------------------


def test_second_backward_through_one_forward() -> None:
    private, x = private_net(), batch()
    loss = private(x).square().sum(1).mean()
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="second backward through the same forward"):
        loss.backward()


def test_two_losses_of_one_forward() -> None:
    private, x = private_net(), batch()
    out = private(x)
    out.square().sum(1).mean().backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="second backward through the same forward"):
        out.sum().backward()


def test_two_calls_in_one_backward() -> None:
    """An example in both would count twice, with up to 2C."""
    private = private_net()
    out = private(batch()).square().sum() + private(batch()).square().sum()
    with pytest.raises(PrivacyError):
        out.backward()
    with pytest.raises(PrivacyError):
        engine_of(private).ledger.verify(engine_of(private).trainable())


@pytest.mark.parametrize("options", [{}, {"regions": "blocks"}])
def test_two_calls_under_reentrant_checkpoints(options: dict[str, Any]) -> None:
    """Each has a backward of its own, within the one that was called."""

    def both(calls: int) -> None:
        private = dp_compile(nn.Sequential(nn.Linear(D, D), nn.Tanh()), backend="eager", **options)
        x = batch().requires_grad_()
        outs = [checkpoint(private, x, use_reentrant=True).square().sum() for _ in range(calls)]
        sum(outs[1:], outs[0]).backward()

    both(1)
    with pytest.raises(PrivacyError, match="called twice before one backward"):
        both(2)


def test_own_output_as_input_in_one_backward() -> None:
    private = private_net(nn.Linear(D, D))
    x = batch()
    with pytest.raises(PrivacyError):
        private(private(x)).square().sum().backward()


def test_forwards_without_backward_are_harmless() -> None:
    model = Net()
    private = private_net(model)
    for _ in range(2):
        private(batch())
    x = batch()
    assert_step_right(private, model, x)


def test_forward_forward_backward_backward() -> None:
    """Two micro-batches whose backwards come later, each its own."""
    model, x, y = Net(), batch(), batch(3)
    private = private_net(model)
    first, second = private(x), private(y)
    PseudoLoss(3)(second, slice(None)).mean().backward()
    PseudoLoss(B)(first, slice(None)).mean().backward()
    a, b = truth_of(model, x), truth_of(model, y)
    for n, p in private.named_parameters():
        torch.testing.assert_close(p.grad.double(), a.sums[n] + b.sums[n], rtol=1e-4, atol=1e-6)
    engine_of(private).ledger.verify(engine_of(private).trainable())


@pytest.mark.parametrize("parameter_too", [False, True])
def test_torch_autograd_grad(parameter_too: bool) -> None:
    """``torch.autograd.grad`` of parameters cannot get a clipped gradient, nor an unclipped one."""
    private = private_net()
    x = batch().requires_grad_()
    out = private(x).square().sum()
    wanted = [x, *private.parameters()] if parameter_too else list(private.parameters())
    try:
        found = torch.autograd.grad(out, wanted, allow_unused=True)
    except (DPCompileError, RuntimeError):
        return
    parts = found[1:] if parameter_too else found
    assert all(g is None for g in parts)


def test_create_graph() -> None:
    """Gradients of gradients would not be clipped."""
    private = private_net()
    x = batch().requires_grad_()
    with pytest.raises((DPCompileError, RuntimeError)):
        (g,) = torch.autograd.grad(private(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        engine_of(private).ledger.verify(engine_of(private).trainable())


@pytest.mark.parametrize("norm", ["auto", "instantiate"])
def test_input_gradients_are_ordinary(norm: str) -> None:
    """Only the parameters' gradients are clipped."""
    model = Block()
    x = torch.randn(B, T, D)
    private = private_net(model, norm=norm)
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, wanted = private(own), model(other)
    weight = torch.randn_like(wanted)
    (out * weight).sum().backward()
    grads = {n: p.grad.clone() for n, p in private.named_parameters()}
    model.zero_grad()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(own.grad, other.grad)
    assert any(p.grad is None or not torch.allclose(grads[n], p.grad) for n, p in model.named_parameters())


def test_input_gradients_of_a_module_before_it() -> None:
    """A plain module in front trains on ordinary gradients, and the ledger knows nothing of it."""
    front, model = nn.Linear(D, D), Net()
    private = private_net(model)
    x = batch()
    private(front(x)).square().sum().backward()
    assert front.weight.grad is not None
    engine_of(private).ledger.verify(engine_of(private).trainable())


def test_backward_on_part_of_the_batch() -> None:
    """Examples that the loss leaves out have norm 0."""
    model, x = Net(), batch()
    private = private_net(model, loss_reduction="sum")
    private(x)[:2].square().sum().backward()
    assert torch.equal(private.grad_norms[2:], torch.zeros(B - 2)) and (private.grad_norms[:2] > 0).all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode() -> None:
    model, x = Net(), batch()
    private = private_net(model)
    with torch.autograd.detect_anomaly(check_nan=False):
        assert_step_right(private, model, x)


# --- what else reaches p.grad -----------------------------------------------------------------------------------------


def verify(private: Any) -> None:
    engine_of(private).ledger.verify(engine_of(private).trainable())


def test_honest_gradients_pass() -> None:
    private = private_net()
    step(private, batch())
    verify(private)


def test_backward_of_the_undecorated_model() -> None:
    model = Net()
    private = private_net(model)
    step(private, batch())
    model(batch()).sum().backward()
    with pytest.raises(PrivacyError, match="did not come out of the clipped backward alone"):
        verify(private)
    private.zero_grad()
    engine_of(private).ledger.clear()
    model(batch()).sum().backward()
    with pytest.raises(PrivacyError, match="did not come out of the clipped backward alone"):
        verify(private)


def test_clipped_backward_after_an_ordinary_one() -> None:
    model = Net()
    private = private_net(model)
    model(batch()).sum().backward()
    with pytest.raises(PrivacyError, match="did not come out of the clipped backward alone"):
        step(private, batch())
        verify(private)


def test_forward_method_called_directly() -> None:
    """``model.forward(x)`` goes past the compiled call."""
    private = private_net()
    step(private, batch())
    private.forward(batch()).sum().backward()
    with pytest.raises(PrivacyError, match="did not come out of the clipped backward alone"):
        verify(private)


def test_regulariser_in_the_loss() -> None:
    private = private_net()
    x = batch()
    loss = PseudoLoss(B)(private(x), slice(None)).mean() + 0.1 * private.first.weight.square().sum()
    with pytest.raises(PrivacyError, match="first.weight"):
        loss.backward()
        verify(private)


def test_submodule_called_by_itself() -> None:
    private = private_net()
    step(private, batch())
    private.first(batch()).sum().backward()
    with pytest.raises(PrivacyError, match="first"):
        verify(private)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: torch.nn.utils.clip_grad_norm_(p.parameters(), 1e-3),
        lambda p: p.second.bias.grad.add_(1),
        lambda p: setattr(p.second.bias, "grad", torch.ones(3)),
        lambda p: p.first.weight.grad.mul_(2),
    ],
)
def test_changed_gradients(change: Any) -> None:
    private = private_net()
    step(private, batch())
    change(private)
    with pytest.raises(PrivacyError, match="did not come out of the clipped backward alone"):
        verify(private)


def test_other_outputs_are_not_clipped_so_they_may_not_hold_parameters() -> None:
    """The model hands out a parameter itself: a loss on it is ordinary, and noticed."""

    class Leaky(Net):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x), self.first.weight

    private = private_net(Leaky())
    with pytest.raises(DPCompileError):
        out, weight = private(batch())
        (out.square().sum(1).mean() + weight.square().sum()).backward()
        verify(private)


def test_hidden_state_with_a_graph_is_refused() -> None:
    """An activation kept from the last step would let two steps' examples meet."""

    class Stateful(Net):
        def forward(self, x: Tensor, state: Tensor) -> Any:  # type: ignore[override]
            hidden = self.first(x) + state
            return self.second(hidden), hidden

    private = private_net(Stateful())
    out, hidden = private(batch(), torch.zeros(B, 5))
    out, hidden = private(batch(), hidden)
    with pytest.raises((PrivacyError, UnsupportedGraphError)):
        out.square().sum().backward()
        verify(private)


# --- several models ---------------------------------------------------------------------------------------------------


def test_several_models_at_once() -> None:
    torch.manual_seed(3)
    models: list[Any] = [Net(5), Net(5), Net(7)]
    privates = [private_net(m, max_grad_norm=c) for m, c in zip(models, (0.1, 0.5, 2.0), strict=True)]
    for _ in range(2):
        for model, private, bound in zip(models, privates, (0.1, 0.5, 2.0), strict=True):
            assert_step_right(private, model, batch(), bound)


def test_two_bounds_on_one_model_do_not_share_graphs() -> None:
    model, x = Net(), batch()
    small, large = private_net(model, max_grad_norm=0.01), private_net(model, max_grad_norm=100.0)
    assert_step_right(small, model, x, 0.01)
    engine_of(small).ledger.clear()
    model.zero_grad()
    assert_step_right(large, model, x, 100.0)


def test_models_are_freed() -> None:
    private = private_net()
    step(private, batch())
    watched = weakref.ref(private.first.weight), weakref.ref(engine_of(private))
    del private
    torch._dynamo.reset()
    gc.collect()
    assert [w() for w in watched] == [None, None]


def test_engine_of_an_ordinary_model() -> None:
    with pytest.raises(PrivacyError, match="not a private model"):
        engine_of(Net())


def test_two_private_models_in_one_loss() -> None:
    """Student and teacher, generator and critic: each keeps its own sums."""
    a, b = private_net(nn.Linear(D, 3)), private_net(nn.Linear(D, 3))
    x = batch()
    plain_a, plain_b = copy.deepcopy(engine_of(a).module), copy.deepcopy(engine_of(b).module)
    (a(x) - b(x)).square().sum(1).mean().backward()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = plain_a, plain_b

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) - self.b(x)

    gradients = per_example_gradients(Both(), (x,), {}, lambda o, r: o.square().sum(1))
    for private, prefix in ((a, "a."), (b, "b.")):
        own = {n[2:]: g for n, g in gradients.items() if n.startswith(prefix)}
        assert_right(private, clip(own, 0.5), 1e-4)


# --- check=True -------------------------------------------------------------------------------------------------------


def test_check_passes_on_a_right_model() -> None:
    torch.manual_seed(0)
    private = private_net(LanguageModel(), check=True)
    ids = torch.randint(0, V, (B, T))
    for _ in range(2):
        private.zero_grad()
        train_step(private, (ids,), {}, PseudoLoss(B))


def test_check_notices_a_wrong_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpcompile.rewriting import norm_nodes

    right = norm_nodes.outer
    monkeypatch.setattr(norm_nodes, "outer", lambda *args, **kwargs: right(*args, **kwargs) * 0.8)
    private = private_net(check=True)
    with pytest.raises(PrivacyError, match="norm"):
        step(private, batch())


def test_plan_certificate_and_graph_do_not_depend_on_values() -> None:
    seen = []
    for scale in (1.0, 1e6, 0.0):
        private = private_net()
        step(private, scale * batch())
        code = "\n".join(map(str, private.graph.graph.nodes))
        seen.append((str(private.plan), str(private.certificate), code))
    assert seen[0] == seen[1] == seen[2]


# --- gradient accumulation dtype, empty batches -----------------------------------------------------------------------


def test_empty_batch() -> None:
    """No examples: zero gradients, or a refusal, or what the plain model says; never a wrong sum."""
    private = private_net()
    try:
        private(torch.randn(0, D)).sum().backward()
    except Exception as error:
        assert not isinstance(error, AssertionError)
        return
    assert all(p.grad is None or not p.grad.any() for p in private.parameters())


@pytest.mark.parametrize("budget", [1, 1.0, 1.5, 10**9])
def test_memory_budget_is_right(budget: float) -> None:
    model = Block()
    x = torch.randn(B, T, D)
    private = private_net(model, memory_budget=budget)
    step(private, x)
    assert_right(private, truth_of(model, x), 1e-4)


def test_memory_budget_changes_the_plan() -> None:
    """There is a size for which the fastest plan is not the smallest, and a budget takes the smaller one."""
    changed = []
    for positions in (16, 20, 24, 28):
        free, tight = (private_net(nn.Linear(64, 64), memory_budget=b) for b in (100.0, 1.0))
        for private in (free, tight):
            private.trace(torch.randn(8, positions, 64))
        peaks = [p.plan.prediction.peak for p in (free, tight)]
        assert peaks[1] <= peaks[0]
        if (free.plan.rules(), free.plan.parts) != (tight.plan.rules(), tight.plan.parts):
            changed.append(positions)
            assert peaks[1] < peaks[0] and ("budget" in str(tight.plan) or "parts" in str(tight.plan))
    assert changed


class Apart(nn.Module):
    """Two inputs whose sizes never meet, with the examples along another dimension of each."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x.transpose(0, 1)), self.table(ids)


def test_example_axes_that_got_symbols_of_their_own() -> None:
    """Dynamo gives every size that changed a symbol of its own, also where all are the batch size."""
    torch.manual_seed(0)
    model = Apart()
    private = dp_compile(copy.deepcopy(model), in_dims=(1, 0), dynamic=True, backend="eager")
    for batch in (3, 2, 5):
        args, loss = (torch.randn(3, batch, 4), torch.randint(0, 7, (batch, 3))), PseudoLoss(batch)
        private.zero_grad()
        train_step(private, args, {}, loss)
        assert_right(private, clip(per_example_gradients(model, args, {}, loss, in_dims=(1, 0)), 1.0), 1e-5)
    with pytest.raises(DPCompileError, match="disagree about the number of examples: 'x' has 4, 'ids' has 3"):
        private(torch.randn(3, 4, 4), torch.randint(0, 7, (3, 3)))


def test_a_forward_in_the_place_of_another_has_its_own_signature() -> None:
    layer = nn.Linear(4, 3)
    assert list(signature_of(layer.forward).parameters) == ["input"]
    assert list(signature_of(nn.Linear.forward).parameters) == ["self", "input"]
    layer.forward = types.MethodType(lambda self, x, scale: scale * x, layer)
    assert list(signature_of(layer.forward).parameters) == ["x", "scale"]


@pytest.mark.parametrize(
    ("norms", "mask", "lost"),
    [
        ([1.0, 3e38, 3e38], [1, 1, 1], 0),
        ([1.0, math.nan, math.inf], [1, 0, 0], 0),
        ([1.0, math.nan, math.inf], [1, 1, 0], 1),
        ([1.0, math.nan, math.inf], [1, 1, 1], 2),
    ],
)
def test_lost_examples_are_told(norms: list[float], mask: list[float], lost: int) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn_of_lost_examples(torch.tensor(norms), torch.tensor(mask, dtype=torch.float32))
    assert [str(w.message)[:1] for w in told] == [str(lost)] * bool(lost)
