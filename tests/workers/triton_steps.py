"""Updates of optimizers by the Triton kernels: checks of triton_worker.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
from fakes import PrivateModel, engine_of
from torch.utils._python_dispatch import TorchDispatchMode
from triton_noise import on_cpu

from dpcompile.kernels.triton import steps
from dpcompile.noise.banded import BandedMechanism
from dpcompile.optim import optimizer as optim
from dpcompile.optim import update
from dpcompile.optim.optimizer import DPOptimizer

optim.engine_of = cast(Any, engine_of)
SIZES = (1025, 1)  # one program that is full, and one that is not
Inner = Callable[[PrivateModel], torch.optim.Optimizer]


def _groups(model: PrivateModel) -> list[dict]:
    first, *rest = model.parameters()
    return [{"params": [first], "lr": 0.01, "weight_decay": 0.0}, {"params": rest}]


def _optimizer(inner: Inner, model: PrivateModel, sigma: float) -> DPOptimizer:
    return DPOptimizer(inner(model), model, noise_multiplier=sigma, expected_batch_size=3.0, seed=2**64 - 5)


def trained(inner: Inner, *, fused: bool, sigma: float, dtype: torch.dtype) -> tuple[PrivateModel, DPOptimizer]:
    """Two steps; with ``fused`` by the kernel, which has to take each of them, else by torch on a CPU's noise."""
    generator = torch.Generator().manual_seed(3)
    model = PrivateModel(**cast(Any, {f"p{n}": torch.randn(n, generator=generator, dtype=dtype) for n in SIZES}))
    private, taken = _optimizer(inner, model, sigma), []
    parts: Any = (update.fused_adam, update.fused_sgd)
    own = [part.update_ for part in parts]
    for part, function in zip(parts, own, strict=True):
        part.update_ = lambda *a, f=function: taken.append(fused and f(*a)) or taken[-1]
    try:
        for _ in range(2):
            model.engine.deliver(**{f"p{n}": torch.randn(n, generator=generator, dtype=dtype) for n in SIZES})
            private.step()
            private.zero_grad()
    finally:
        for part, function in zip(parts, own, strict=True):
            part.update_ = function
    assert sum(map(bool, taken)) == 2 * fused
    return model, private


def _same_as_the_inner_optimizer(inner: Inner, sigma: float, dtype: torch.dtype) -> None:
    ours, one = trained(inner, fused=True, sigma=sigma, dtype=dtype)
    with on_cpu():
        theirs, two = trained(inner, fused=False, sigma=sigma, dtype=dtype)
    tolerance: Any = {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
        assert one.state[a].keys() == two.state[b].keys()
        for name, value in one.state[a].items():
            torch.testing.assert_close(value, two.state[b][name], **tolerance)


ADAMS: dict[str, Inner] = {
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.1),
    "adam, l2": lambda m: torch.optim.Adam(m.parameters(), lr=0.1, weight_decay=0.3, betas=(0.5, 0.7)),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.2, eps=1e-3),
    "adamw, tensor lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.1, dtype=torch.float64)),
    "adamw, groups": lambda m: torch.optim.AdamW(_groups(m), lr=0.1),
}
SGDS: dict[str, Inner] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "decay": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.3),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "dampening": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.4),
    "nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "groups": lambda m: torch.optim.SGD(_groups(m), lr=0.1, momentum=0.5),
}


def check_adams_are_the_inner_optimizers() -> None:
    for inner in ADAMS.values():
        _same_as_the_inner_optimizer(inner, 1.0, torch.float32)
    for sigma in (0.0, 1.0):
        _same_as_the_inner_optimizer(ADAMS["adam, l2"], sigma, torch.float64)


def check_sgd_is_the_inner_optimizers() -> None:
    for inner in SGDS.values():
        _same_as_the_inner_optimizer(inner, 1.0, torch.float32)
    for name, sigma in itertools.product(("decay", "nesterov"), (0.0, 1.0)):
        _same_as_the_inner_optimizer(SGDS[name], sigma, torch.float64)


def check_correlated_noise_goes_into_both() -> None:
    for inner in (ADAMS["adamw"], SGDS["momentum"]):
        results = []
        for fused in (True, False):
            model = PrivateModel(a=torch.ones(5), b=torch.ones(1030))
            weights, optimizer = [model.a, model.b], inner(model)
            optimizer.register_step_pre_hook(lambda *_: None)
            mechanism = BandedMechanism(1.0, 1.0, 3.0, 2**64 - 5, coefficients=(1.0, 0.5, 0.375))
            for step in range(4):
                release = update.Release([torch.full_like(w, 2.0) for w in weights], [4, 7], step)
                if fused:
                    parts = (update.fused_adam, update.fused_sgd)
                    assert any(part.update_(optimizer, weights, release, mechanism) for part in parts)
                    continue
                with on_cpu():
                    mechanism.release(release)
                    model.a.grad, model.b.grad = release.totals
                    optimizer.step()
            results.append([w.detach() for w in weights])
        torch.testing.assert_close(*results)


def check_a_buffer_that_one_parameter_lacks() -> None:
    """Added to the optimizer after steps of the others: its first step has no momentum yet."""
    results = []
    for fused in (True, False):
        model = PrivateModel(a=torch.ones(5), b=torch.ones(7))
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
        private = DPOptimizer(inner, model, noise_multiplier=0.5, expected_batch_size=2.0, seed=0)
        inner.state[model.a]["momentum_buffer"] = torch.full((5,), 2.0)
        model.engine.deliver(a=torch.ones(5), b=torch.ones(7))
        if fused:
            private.step()
        else:
            with on_cpu():
                private.step()
        results.append([model.a, model.b, *(inner.state[p]["momentum_buffer"] for p in (model.a, model.b))])
    torch.testing.assert_close(*results)


def check_what_is_not_plain_is_stepped_by_itself() -> None:
    class Other(torch.optim.SGD):
        pass

    def hooked(m: PrivateModel) -> torch.optim.Optimizer:
        inner = torch.optim.SGD(m.parameters(), lr=0.1)
        inner.register_step_post_hook(lambda *_: None)
        return inner

    own = steps.step_
    for inner in (
        lambda m: Other(m.parameters(), lr=0.1),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, maximize=True),
        lambda m: torch.optim.RMSprop(m.parameters(), lr=0.1),
        hooked,
    ):
        kinds: list[str] = []
        steps.step_ = lambda kind, *a, k=kinds, **o: k.append(kind) or own(kind, *a, **o)
        try:
            model = PrivateModel(a=torch.zeros(5))
            private = DPOptimizer(inner(model), model, noise_multiplier=1.0, expected_batch_size=2.0, seed=0)
            model.engine.deliver()
            private.step()
        finally:
            steps.step_ = own
        assert kinds == ["mean"] and model.a.detach().abs().min() > 0


def check_one_launch_for_each_group() -> None:
    """However many parameters; noise alone is one launch too."""
    own, launched = steps.numbers_table, []
    for inner, groups in ((ADAMS["adamw"], 1), (ADAMS["adamw, groups"], 2), (SGDS["momentum"], 1), (SGDS["sgd"], 1)):
        model = PrivateModel(**cast(Any, {f"p{n}": torch.zeros(n) for n in range(1, 9)}))
        if groups == 2:
            first, *rest = model.parameters()
            parts: Any = [{"params": [first]}, {"params": rest}]
            private = DPOptimizer(
                torch.optim.AdamW(parts), model, noise_multiplier=1.0, expected_batch_size=2.0, seed=0
            )
        else:
            private = _optimizer(inner, model, 1.0)
        model.engine.deliver()
        launched.clear()
        steps.numbers_table = lambda *a: launched.append(1) or own(*a)
        try:
            private.step()
        finally:
            steps.numbers_table = own
        assert len(launched) == groups, (len(launched), groups)


class Waits(TorchDispatchMode):
    """Operations that would wait for a GPU whose tensors these are."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "item")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in self.NAMES:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def check_nothing_waits_for_the_device() -> None:
    """But for Adam's counts of steps, which lie on the host."""
    for inner, counts in ((SGDS["sgd"], 0), (SGDS["momentum"], 0), (ADAMS["adamw"], 2 * 4)):
        model = PrivateModel(a=torch.zeros(5), b=torch.zeros(7), w=torch.zeros(3), c=torch.zeros(1))
        private = _optimizer(inner, model, 1.0)
        weights = [p for _, p in model.named_parameters()]
        for _ in range(2):
            model.engine.deliver()
            private.step()
            private.zero_grad()
        release = update.Release([torch.zeros_like(p) for p in weights], [0, 1, 2, 3], 7)
        with Waits() as waits:
            part = update.fused_adam if counts else update.fused_sgd
            with private.applying():
                assert part.update_(private.optimizer, weights, release, private.mechanism)
        assert len(waits.seen) <= counts and set(waits.seen) <= {"_local_scalar_dense"}, waits.seen
        assert all(state["step"].device.type == "cpu" for state in private.optimizer.state.values() if "step" in state)


def check_numbers_on_the_device_are_left_to_torch() -> None:
    """A learning rate, or counts of steps, that would have to be waited for."""
    lr = torch.tensor(0.1, device="meta")
    for part, inner in ((update.fused_adam, torch.optim.AdamW), (update.fused_sgd, torch.optim.SGD)):
        weights = [torch.nn.Parameter(torch.zeros(3))]
        optimizer = inner(weights, lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: None)
        optimizer.param_groups[0]["lr"] = lr
        release = update.Release([torch.ones(3)], [0], 0)
        assert not part.update_(optimizer, weights, release, cast(Any, None))
        assert torch.equal(release.totals[0], torch.ones(3)) and weights[0].grad is None
    optimizer = torch.optim.Adam(weights, lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: None)
    optimizer.state[weights[0]]["step"] = torch.zeros((), device="meta")
    assert not update.fused_adam.update_(optimizer, weights, update.Release([torch.ones(3)], [0], 0), cast(Any, None))
