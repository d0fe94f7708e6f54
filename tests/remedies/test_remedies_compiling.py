"""What cannot be compiled, and what is compared: what the messages say to do, tried."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from faulty_compiler import Fault, doing_harm
from private_steps import X
from remedies import Right, equals, plain, refused, right
from test_remedies_proof import Net
from torch import Tensor, nn

from dpcompile import dp_compile
from dpcompile.runtime.reference import Reference


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], None]:
    return doing_harm(monkeypatch)


def compared(function: Callable[..., Any], *args: Any, in_dims: Any = 0, extra: Any = None, **options: Any) -> Right:
    chosen: dict[str, Any] = {"backend": "eager", **options}
    model = dp_compile(Net(function, extra), in_dims=in_dims, **chosen)
    return right(model, *(args or (X,)), in_dims=in_dims)


# --- switched off ---------------------------------------------------------------------------------------------------


@refused("switch torch.compile on again (TORCHDYNAMO_DISABLE, torch.compiler.set_stance)")
def test_a_stance_without_compilation(told: int) -> Right:
    with torch.compiler.set_stance("default" if told else "force_eager"):
        return right(dp_compile(plain(), backend="eager"), X)


@refused("switch torch.compile on again (TORCHDYNAMO_DISABLE, or Dynamo's config)")
def test_dynamo_switched_off(told: int) -> Right:
    with torch._dynamo.config.patch(disable=not told):
        return right(dp_compile(plain(), backend="eager"), X)


@refused("let parameters that the call uses need gradients (requires_grad_())")
def test_a_plan_of_nothing(told: int) -> Right:
    model: Any = dp_compile(plain().requires_grad_(bool(told)), backend="eager")
    return equals(model.trace(X, rates="h100") is not None, True)


# --- what Dynamo says -----------------------------------------------------------------------------------------------


@refused("make sure that the plain model runs on them")
def test_features_of_another_size(told: int) -> Right:
    return right(dp_compile(nn.Sequential(nn.Linear(5 if told else 6, 3)), backend="eager"), X)


class Prepared(nn.Module):
    """Prepares its scale on the first call, under a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.lock, self.scale = plain(), None, None

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            with LOCK:
                self.scale = torch.linspace(0.5, 1.5, 3)
        return self.layer(x) * self.scale


LOCK = threading.Lock()


@refused("call the model once before it is made private, under torch.no_grad()")
def test_a_lock_on_the_first_call(told: int) -> Right:
    model = Prepared()
    if told:
        with torch.no_grad():
            model(X)
    return right(dp_compile(model, backend="eager"), X)


@refused(
    "use torch.where, or shapes that do not depend on values (torch.nn.functional.one_hot(x, n).sum(0) for "
    "torch.bincount); pass what is known before the call as a Python number; give layers no random depth "
    "(layerdrop=0), and experts of Transformers experts_implementation='grouped_mm' (cut over ranks: "
    "ep_implementation='all_reduce')",
    ways=4,
)
def test_a_branch_on_values(told: int) -> Right:
    ids = torch.arange(24).view(8, 3) % 4
    if told == 2:
        count = lambda net, x, i: net.layer(x) * nn.functional.one_hot(i, 5).sum(1)  # noqa: E731
        return compared(count, X, ids)
    if told == 3:
        number = 2.0 if X.sum() > 0 else 1.0
        return compared(lambda net, x: net.layer(x) * number)
    depth = (0.5, 0.0, 0.0, 0.0, 0.0)[told]

    def function(net: Net, x: Tensor) -> Tensor:
        h = net.layer(x)
        if told == 1:
            return torch.where(h.sum(1, keepdim=True) > 0, 2 * h, h)
        if depth and torch.rand(()) < depth:
            return h
        return 2 * h if told else 2 * h if h.sum() > 0 else h

    return compared(function)


SIDE_EFFECTS = (
    "keep Python side effects, prints and branches on tensor values out of forward; move them around the call of the "
    "model, or allow graph breaks with dp_compile(..., regions='breaks')"
)


def _looked_at(h: Tensor) -> None:
    """Something that Dynamo does not follow."""


looked_at: Any = torch.compiler.disable(_looked_at)


@refused(SIDE_EFFECTS, ways=3)
def test_a_side_effect(told: int) -> Right:
    def function(net: Net, x: Tensor) -> Tensor:
        h = net.layer(x)
        if told in (0, 3):
            looked_at(h)
        return net.layer(h)

    if told == 2:
        looked_at(X)
    return compared(function, **({"regions": "breaks"} if told == 3 else {}))


@refused("compute with dense tensors in forward, or with indices and values (index_add, gather)", ways=2)
def test_sparse_in_forward(told: int) -> Right:
    places = torch.tensor([4, 3, 2, 1, 0])

    def function(net: Net, x: Tensor) -> Tensor:
        h = net.layer(x)
        if told == 0:
            return torch.sparse.mm(h.to_sparse(), net.layer.weight)
        return h @ net.layer.weight if told == 1 else h.gather(1, places.expand(len(x), 5))

    return compared(function)


@refused("take derivatives inside the model with torch.func.grad, jvp or vjp", ways=3)
def test_derivatives_in_forward(told: int) -> Right:
    def function(net: Net, x: Tensor) -> Tensor:
        own = lambda a: net.layer(a).tanh().sum()  # noqa: E731
        if told == 0:
            x = x.requires_grad_()
            return torch.autograd.grad(own(x), x, create_graph=True)[0]
        if told == 1:
            return torch.func.grad(own)(x)
        if told == 2:
            return torch.func.jvp(lambda a: net.layer(a).tanh(), (x,), (torch.ones_like(x),))[1]
        return torch.func.vjp(own, x)[1](torch.ones(()))[0]

    return compared(function)


@refused("remove the module's backward hooks, or do it in an autograd.Function in forward", ways=2)
def test_a_backward_hook(told: int) -> Right:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> Tensor:
            return 0.5 * g[0]

    model = Net(lambda net, x: (Halved.apply if told == 2 else lambda h: h)(net.layer(x)))
    hook = model.layer.register_full_backward_hook(lambda module, before, after: None)
    if told:
        hook.remove()
    return right(dp_compile(model, backend="eager"), X)


@refused(
    "make it a tensor: pass torch.tensor(value), with in_dims={'its name': None}, or hold it in a buffer, and compute "
    "with that in forward",
    ways=2,
    slow=True,
)
def test_a_number_that_keeps_changing(told: int) -> Right:
    def function(net: Net, x: Tensor, tau: Any = None) -> Tensor:
        h = net.layer(x)
        return torch.where(h > 0, h, net.extra if tau is None else tau)

    extra = torch.tensor(0.0) if told == 2 else None
    model: Any = dp_compile(Net(function, extra), backend="eager", in_dims=(0, None)[: 1 + (told < 2)])
    for i in range(12):
        value = 0.1 + 0.01 * i
        if told == 2:
            model.extra = torch.tensor(value)
            found = right(model, X, in_dims=(0,))
        else:
            more = torch.tensor(value) if told else value
            found = right(model, X, more, in_dims=(0, None))
        model.zero_grad()
    return found


@refused("use dynamic=True, or fixed physical batch sizes (PoissonLoader gives them)", ways=2, slow=True)
def test_sizes_that_keep_changing(told: int) -> Right:
    model = dp_compile(plain(), backend="eager", dynamic=told == 1)
    for size in range(2, 14):
        found = right(model, torch.randn(8 if told == 2 else size, 5))
    return found


@refused("make sure that the plain model runs on these inputs, and under torch.compile with fullgraph=True")
def test_a_backward_of_another_size(told: int) -> Right:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> Tensor:
            return g[0] if told else g[0][:, :2]

    return compared(lambda net, x: Function.apply(net.layer(x)))


# --- what is compared -----------------------------------------------------------------------------------------------


@refused(
    "a model that draws random numbers, or calls operators that torch.vmap cannot run, cannot be compared: check it "
    "with .eval(), or without check",
    ways=2,
)
def test_a_check_of_dropout(told: int) -> Right:
    torch.manual_seed(1)
    model: Any = dp_compile(nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)), backend="eager", check=told < 2)
    if told == 1:
        model.eval()
        return right(model, X)
    model(X).square().sum(1).mean().backward()
    return equals(bool(torch.isfinite(model.grad_norms).all()), True)


@refused(
    "do not train with this compiled model: pass backend='eager', or take another release of torch than "
    f"{torch.__version__}, and report it; nothing was written to p.grad"
)
def test_harm_by_the_compiler(told: int, compiler: Any) -> Right:
    def harm(results: list[Any], backward: bool) -> None:
        for i, x in enumerate(results):
            if backward and isinstance(x, Tensor) and tuple(x.shape) == (3, 5):
                results[i] = 0.5 * x

    compiler(harm)
    return right(dp_compile(plain(), backend="eager" if told else "inductor"), X)


class Out:
    """The uncompiled run of the comparison, which fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        from dpcompile.runtime import verify

        def run(*_: Any) -> Any:
            raise error

        self.reference = type("Failing", (Reference,), {"run": run})
        monkeypatch.setattr(verify, "Reference", self.reference)


@refused("so its compiled code was not compared with it; verify=False does not try", warns=True)
def test_no_memory_to_compare(told: int, compiler: Any, monkeypatch: Any) -> Right:
    compiler(lambda results, backward: None)
    Out(monkeypatch, torch.OutOfMemoryError("none left"))
    return right(dp_compile(plain(), backend="inductor", verify=not told), X)


@refused("pass verify=False, and report it")
def test_a_graph_that_is_not_run_uncompiled(told: int, compiler: Any, monkeypatch: Any) -> Right:
    compiler(lambda results, backward: None)
    Out(monkeypatch, ValueError("no such operator"))
    return right(dp_compile(plain(), backend="inductor", verify=not told), X)
