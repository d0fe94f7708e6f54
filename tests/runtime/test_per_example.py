"""Per-example gradients on request: against one backward per example, and nothing of them comes into the training."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import ALL, B, Case
from oracle import leaves
from oracle import per_example_gradients as one_by_one
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import (
    DPCompileError,
    ExampleMixingError,
    PrivacyError,
    PrivacyWarning,
    UnsupportedGraphError,
    dp_compile,
    make_private,
    per_example,
    per_example_gradients,
)
from dpcompile.module import engine_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:per-example gradients are not private"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]
MODELS = [case for case in ALL if case.refused is None and not case.slow and not case.rare]
KINDS = [pytest.param(c, id=c.id, marks=[] if i % 22 == 0 else pytest.mark.slow) for i, c in enumerate(MODELS)]


class Indexed:
    """A loss of any output, by the number of the example: linear and squared, of every entry with its own weight."""

    def __init__(self, out_dim: int) -> None:
        self.out_dim = out_dim

    def __call__(self, output: Any, number: Tensor) -> Tensor:
        total = torch.zeros(len(number))
        for position, leaf in enumerate(leaves(output)):
            each = leaf.movedim(self.out_dim, 0).reshape(len(number), -1)
            weight = torch.arange(each.shape[1], dtype=each.dtype) + 1 + position
            weight = torch.cos(weight * (1 + number.to(each.dtype))[:, None])
            total = total + (weight * each + 0.5 * weight.roll(1, 1) * each.square()).sum(1)
        return total


def numbered(case: Case) -> Any:
    """The same loss as the oracle calls it."""
    return lambda output, rows: Indexed(case.out_dim)(output, torch.arange(B)[rows])


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    scale = max(g.abs().max().item() for g in wanted.values())
    for name, g in wanted.items():
        assert found[name].shape == g.shape and not found[name].requires_grad
        assert (found[name].double() - g).abs().max().item() <= max(tolerance, 1e-5) * max(scale, 1e-3), name


@pytest.mark.parametrize("case", KINDS)
def test_any_model_against_one_backward_per_example(case: Case) -> None:
    torch.manual_seed(1)
    model = case.make()
    args, kwargs = case.call(B)
    wanted = one_by_one(model, args, kwargs, numbered(case), in_dims=case.in_dims)
    private = dp_compile(model, in_dims=case.in_dims, backend="eager", dynamic=False)
    module = engine_of(private).module
    if kwargs:
        args, kwargs = (), {**_named(module, args), **kwargs}
    found = per_example_gradients(private, Indexed(case.out_dim))(kwargs or args, torch.arange(B))
    agree(found, wanted, case.tolerance)
    assert all(p.grad is None for p in module.parameters())


def _named(module: nn.Module, args: Any) -> dict[str, Any]:
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False))


class Small(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
        self.dropout = nn.Dropout(dropout)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.dropout(torch.tanh(self.first(x))) * self.frozen * self.scale)


def small(**options: Any) -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(0)
    model: Any = dp_compile(Small(), backend="eager", max_grad_norm=0.5, **options)
    return model, torch.randn(6, 5), torch.randint(0, 3, (6,))


@pytest.mark.parametrize("vmap", [True, False])
def test_the_norms_are_those_of_training(monkeypatch: pytest.MonkeyPatch, vmap: bool) -> None:
    """Both ways, and what is left of the model: no gradient, no count of calls, no random number."""
    model, x, y = small()
    if not vmap:
        monkeypatch.setattr(per_example.torch.func, "vmap", _refusing)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = per_example_gradients(model, F.cross_entropy)(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    monkeypatch.undo()
    F.cross_entropy(model(x), y).backward()
    norms = sum(g.flatten(1).double().square().sum(1) for g in found.values())
    torch.testing.assert_close(torch.as_tensor(norms).sqrt().float(), model.grad_norms)
    weights = (0.5 / model.grad_norms).clamp(max=1.0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, torch.einsum("b,b...->...", weights, found[name]))


def _refusing(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("not here")


def test_chosen_parameters_and_batches() -> None:
    model, x, y = small()
    gradients = per_example_gradients(model, F.cross_entropy, parameters=["last.bias"])
    found = gradients(x, y)["last.bias"]
    torch.testing.assert_close(found, torch.softmax(model.eval()(x), 1).detach() - F.one_hot(y, 3))
    torch.testing.assert_close(gradients(x[2:4], y[2:4])["last.bias"], found[2:4])
    assert gradients(x[:0], y[:0])["last.bias"].shape == (0, 3)
    model.last.bias.data[0] += 1.0  # it looks at the weights of now
    assert not torch.allclose(gradients({"x": x}, y)["last.bias"], found)
    shared = per_example_gradients(model, lambda out, w: (out * w).sum(), parameters=["last.bias"], target_dims=None)
    torch.testing.assert_close(shared((x,), torch.arange(3.0))["last.bias"], torch.arange(3.0).expand(6, 3))


def test_dropout_is_drawn_for_each_example() -> None:
    torch.manual_seed(0)
    model = dp_compile(Small(dropout=0.5), backend="eager")
    found = per_example_gradients(model, F.cross_entropy, parameters=["last.weight"])(
        torch.ones(64, 5), torch.zeros(64, dtype=torch.long)
    )["last.weight"]
    assert len({tuple(g.ne(0).any(0).tolist()) for g in found}) > 4


def training() -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 5), torch.randint(0, 3, (32,)))
    model = Small()
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return make_private(model, sgd, DataLoader(data, 8), noise_multiplier=1.0, seed=3, backend="eager")


def trained(*, looks: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrivacyWarning)  # one seed twice, on purpose
        model, optimizer, loader = training()
    gradients = per_example_gradients(model, F.cross_entropy)
    for x, y in loader:
        if looks:
            gradients(x, y)
        loss = F.cross_entropy(model(x), y)
        if looks:
            gradients(x, y)
        loss.backward()
        if looks:
            gradients(x, y)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_training_is_the_same_with_and_without() -> None:
    (model, optimizer), (other, its_optimizer) = trained(looks=False), trained(looks=True)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    assert optimizer.accountant.history == its_optimizer.accountant.history
    torch.testing.assert_close(model.grad_norms, other.grad_norms)


def test_they_do_not_get_into_p_grad() -> None:
    model, optimizer, loader = training()
    gradients = per_example_gradients(model, F.cross_entropy)
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    for name, g in gradients(x, y).items():
        model.get_parameter(name).grad = g.mean(0)
    with pytest.raises(PrivacyError, match="did not come out of the clipped backward alone"):
        optimizer.step()


def into_data(model: Any, value: Tensor) -> None:
    model.frozen.data = value


def into_a_parameter(model: Any, value: Tensor) -> None:
    model.frozen = nn.Parameter(value, requires_grad=False)


def into_a_buffer(model: Any, value: Tensor) -> None:
    model.scale = value


@pytest.mark.parametrize("written", [into_data, into_a_parameter, into_a_buffer])
def test_they_do_not_get_into_the_model(written: Any) -> None:
    model, x, y = small()
    F.cross_entropy(model(x), y).backward()
    written(model, per_example_gradients(model, F.cross_entropy)(x, y)["first.bias"][0])
    with pytest.raises(ExampleMixingError, match="'(frozen|scale)'"):
        model(x)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(0))


def test_what_is_refused() -> None:
    model, x, y = small()
    with pytest.raises(PrivacyError, match="Small is not a private model"):
        per_example_gradients(Small(), F.cross_entropy)
    with pytest.raises(DPCompileError, match="no parameter 'last.wieght'\n.*'last.weight'"):
        per_example_gradients(model, F.cross_entropy, parameters=["last.wieght"])
    with pytest.raises(DPCompileError, match="parameter 'frozen' is frozen"):
        per_example_gradients(model, F.cross_entropy, parameters=["frozen"])
    with pytest.raises(UnsupportedGraphError, match="whose batches are of users"):
        per_example_gradients(small(examples_per_user=2)[0], F.cross_entropy)
    with pytest.raises(DPCompileError, match=r"a tensor \(1, 3\) for one example"):
        per_example_gradients(model, lambda out, _: out)(x)
    with pytest.raises(DPCompileError, match="inputs and targets have 4 and 6 examples"):
        per_example_gradients(model, F.cross_entropy)(x, y[:4])
    with pytest.raises(ExampleMixingError, match="mixes examples"):
        per_example_gradients(dp_compile(Mixing(), backend="eager"), F.cross_entropy)(x, y)
    with pytest.warns(PrivacyWarning, match="per-example gradients are not private"):
        per_example_gradients(model, F.cross_entropy)
