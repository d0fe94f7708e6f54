"""What stands around a private model: tracers, transforms, empty batches, two passes, quantised weights."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.utils.data import DataLoader, TensorDataset

import dpcompile
from dpcompile import DPCompileError, DPOptimizer, PoissonLoader, UnsupportedGraphError

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have

B, D = 4, 3


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def norms_one_by_one(model: nn.Module, example_loss: Any) -> Tensor:
    norms = []
    for i in range(B):
        model.zero_grad()
        example_loss(i).backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())
    return torch.stack(norms)


# --- tracers and transforms -----------------------------------------------------------------------------------------


def transformed(how: str, model: Any, x: Tensor) -> Any:
    one = lambda a: model(a).sum()  # noqa: E731
    return {
        "trace": lambda: torch.jit.trace(model, x),
        "script": lambda: torch.jit.script(model),
        "export": lambda: torch.export.export(model, (x,)),
        "vmap": lambda: torch.func.vmap(lambda a: model(a[None]))(x),
        "grad": lambda: torch.func.grad(one)(x),
        "jacrev": lambda: torch.func.jacrev(model)(x),
        "functional": lambda: torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(
            dict(model.named_parameters())
        ),
        "replicate": lambda: model._replicate_for_data_parallel(),
    }[how]()


WAYS = {
    "trace": r"traced by torch.jit(.|\n)*load_state_dict",
    "script": r"scripted by torch.jit(.|\n)*load_state_dict",
    "export": r"exported(.|\n)*load_state_dict",
    "replicate": r"DataParallel(.|\n)*use DistributedDataParallel",
}


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["trace", "script", "export", "vmap", "grad", "jacrev", "functional", "replicate"])
def test_what_would_lose_the_backward_names_the_way_out(how: str) -> None:
    private, x = dp_compile(Critic(), backend="eager"), torch.randn(B, D)
    private(x).sum().backward()
    with pytest.raises(UnsupportedGraphError, match=WAYS.get(how, r"torch.func(.|\n)*inside forward")):
        transformed(how, private, x)


def test_a_strict_export_quotes_the_way_out() -> None:
    private = dp_compile(Critic(), backend="eager")
    with pytest.raises(Unsupported, match=r"cannot be exported(.|\n)*load_state_dict"):
        torch.export.export(private, (torch.randn(B, D),), strict=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_an_ordinary_model_with_the_private_weights_is_exported() -> None:
    private, x = dp_compile(Critic(), backend="eager"), torch.randn(B, D)
    ordinary = Critic()
    ordinary.load_state_dict(private.state_dict())
    assert torch.equal(torch.jit.trace(ordinary, x)(x), private(x))  # type: ignore[operator]
    assert torch.equal(torch.export.export(ordinary, (x,)).module()(x), private(x))


def test_pickled_compiled_and_in_dataparallel() -> None:
    private, x = dp_compile(Critic(), backend="eager"), torch.randn(B, D)
    private(x).sum().backward()
    wanted = private.grad_norms
    restored = pickle.load(io.BytesIO(pickle.dumps(private)))
    for outer, inner in ((restored, restored), (torch.compile(private, backend="eager"), private)):
        inner.zero_grad()
        outer(x).sum().backward()
        torch.testing.assert_close(inner.grad_norms, wanted)


def test_a_sparse_table_has_a_dense_clipped_sum() -> None:
    torch.manual_seed(0)

    def make(sparse: bool) -> Any:
        torch.manual_seed(1)
        return nn.Sequential(nn.Embedding(10, D, sparse=sparse), nn.Flatten(), nn.Linear(2 * D, 2))

    ids = torch.randint(0, 10, (B, 2))
    found = []
    for sparse in (False, True):
        private = dp_compile(make(sparse), backend="eager")
        private(ids).sum(1).mean().backward()
        found.append((private.grad_norms, private[0].weight.grad))
    torch.testing.assert_close(found[0], found[1])


# --- two passes, and derivatives of derivatives ---------------------------------------------------------------------


class Pair(Critic):
    def forward(self, real: Tensor, fake: Tensor) -> Any:  # type: ignore[override]
        return self.net(real), self.net(fake)


class Joined(Critic):
    def forward(self, real: Tensor, fake: Tensor) -> Any:  # type: ignore[override]
        return self.net(torch.cat([real, fake])).chunk(2)


class JoinedLoss(Critic):
    def forward(self, real: Tensor, fake: Tensor) -> Any:  # type: ignore[override]
        scores = self.net(torch.cat([real, fake]))
        targets = torch.cat([torch.ones_like(real[:, :1]), torch.zeros_like(fake[:, :1])])
        return 2 * F.binary_cross_entropy_with_logits(scores, targets)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    real_loss = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
    return real_loss + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))


@pytest.mark.parametrize("kind", [Pair, Joined, JoinedLoss])
def test_a_discriminators_two_passes_in_one_forward(kind: Any) -> None:
    torch.manual_seed(0)
    plain, real, fake = kind(), torch.randn(B, D), torch.randn(B, D)
    private = dp_compile(copy.deepcopy(plain), backend="eager")
    scores = private(real, fake)
    (hinge(*scores) if isinstance(scores, tuple) else scores).backward()
    wanted = norms_one_by_one(plain, lambda i: hinge(plain.net(real[i : i + 1]), plain.net(fake[i : i + 1])))
    torch.testing.assert_close(private.grad_norms, wanted)


def test_two_calls_name_one_forward_of_both() -> None:
    private = dp_compile(Critic(), backend="eager")
    scores = private(torch.randn(B, D)), private(torch.randn(B, D))
    with pytest.raises(DPCompileError, match=r"called twice(.|\n)*return self.net\(real\), self.net\(fake\)"):
        hinge(*scores).backward()


class Penalised(Critic):
    """Wasserstein loss with a gradient penalty (Gulrajani et al. 2017), example by example."""

    def forward(self, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:  # type: ignore[override]
        slope = torch.func.grad(lambda x: self.net(x).sum())(mix * real + (1 - mix) * fake)
        return (self.net(fake) - self.net(real)).squeeze(1) + 10 * (slope.norm(dim=1) - 1) ** 2


def test_a_gradient_penalty_in_forward() -> None:
    torch.manual_seed(0)
    plain, (real, fake), mix = Penalised(), torch.randn(2, B, D), torch.rand(B, 1)
    private = dp_compile(copy.deepcopy(plain), backend="eager", loss_reduction="sum")  # not linear in the cotangents
    private(real, fake, mix).sum().backward()

    def example_loss(i: int) -> Tensor:
        x = (mix * real + (1 - mix) * fake)[i : i + 1].requires_grad_()
        (slope,) = torch.autograd.grad(plain.net(x).sum(), x, create_graph=True)
        return (plain.net(fake[i]) - plain.net(real[i])).sum() + 10 * (slope.norm() - 1) ** 2

    torch.testing.assert_close(private.grad_norms, norms_one_by_one(plain, example_loss), rtol=1e-4, atol=1e-5)


def test_a_gradient_penalty_outside_names_the_way_in() -> None:
    private, x = dp_compile(Critic(), backend="eager"), torch.randn(B, D).requires_grad_()
    with pytest.raises(UnsupportedGraphError, match=r"create_graph=True(.|\n)*torch.func.grad"):
        torch.autograd.grad(private(x).sum(), x, create_graph=True)
    assert torch.autograd.grad(private(x).sum(), x)[0].shape == x.shape


# --- batches without examples, or with one ---------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_an_empty_batch_is_a_step_of_noise(first: bool) -> None:
    steps = []
    for size in (0, None):
        torch.manual_seed(0)
        private = dp_compile(Critic(), backend="eager")
        inner = torch.optim.SGD(private.parameters(), lr=0.1)
        optimizer = DPOptimizer(inner, private, noise_multiplier=1.0, expected_batch_size=B, seed=3)
        x = torch.randn(B, D)
        if not first:
            private(x).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if size is None:  # what the step should be: zero gradients of a batch that clips to nothing
            (private(x) * 0).mean().backward()
        else:
            private(x[:0]).mean().backward()
            assert private.grad_norms.shape == (0,)
            assert all(not p.grad.any() for p in private.parameters())
        optimizer.step()
        steps.append([p.detach().clone() for p in private.parameters()])
    torch.testing.assert_close(steps[0], steps[1])


def test_a_last_batch_of_one() -> None:
    torch.manual_seed(0)
    private, x = dp_compile(Critic(), backend="eager"), torch.randn(B, D)
    private(x).sum().backward()
    wanted = private.grad_norms[:1] / B
    private.zero_grad()
    private(x[:1]).sum().backward()
    torch.testing.assert_close(private.grad_norms, wanted)


# --- quantised bases -------------------------------------------------------------------------------------------------


class FourBit(torch.autograd.Function):
    """A product with weights of four bits, as quantisation libraries write it: gradients for the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(packed, scale)
        return x @ unpacked(packed, scale).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # noqa: D102
        return grad @ unpacked(*ctx.saved_tensors), None, None


def unpacked(packed: Tensor, scale: Tensor) -> Tensor:
    return torch.stack([(packed & 15).float() - 8, (packed >> 4).float() - 8], -1).flatten(1) * scale


class Adapted(nn.Module):
    """A frozen base of four bits, as a buffer or as a parameter, with a low-rank adapter."""

    def __init__(self, inner: int, outer: int, function: bool, parameter: bool) -> None:
        super().__init__()
        packed = torch.randint(0, 255, (outer, inner // 2), dtype=torch.uint8)
        if parameter:
            self.packed = nn.Parameter(packed, requires_grad=False)
        else:
            self.register_buffer("packed", packed)
        self.register_buffer("scale", torch.rand(outer, 1) * 0.1)
        self.down, self.up = nn.Linear(inner, 2, bias=False), nn.Linear(2, outer, bias=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        base = FourBit.apply if self.function else lambda x, p, s: F.linear(x, unpacked(p, s))
        return base(x, self.packed, self.scale) + self.up(self.down(x))  # type: ignore[operator]


@pytest.mark.parametrize(("function", "parameter"), [(False, False), (True, True)])
def test_adapters_of_a_base_of_four_bits(function: bool, parameter: bool) -> None:
    torch.manual_seed(0)
    layers = Adapted(4, 6, function, parameter), nn.Tanh(), Adapted(6, 2, function, parameter)
    plain, x = nn.Sequential(*layers), torch.randn(B, 3, 4)
    private = dp_compile(copy.deepcopy(plain), backend="eager")
    private(x).square().sum((1, 2)).mean().backward()
    wanted = norms_one_by_one(plain, lambda i: plain(x[i : i + 1]).square().sum())
    torch.testing.assert_close(private.grad_norms, wanted)


# --- loaders ---------------------------------------------------------------------------------------------------------


def test_a_generator_that_has_no_part_is_named() -> None:
    data = TensorDataset(torch.randn(8, D))
    loader = DataLoader(data, batch_size=2, shuffle=True, generator=torch.Generator())
    with pytest.warns(UserWarning, match="generator has no part in private draws.*seed="):
        PoissonLoader.from_dataloader(loader)
