"""Another C without another graph: sums, norms and noise are those of a model compiled with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import clip, per_example_gradients
from small_models import labelled, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import DPOptimizer, PrivacyError, compile_step, dp_compile, make_private
from dpcompile.clipping.groups import Bounds
from dpcompile.module import engine_of
from dpcompile.runtime.bound import ClipBound
from dpcompile.runtime.sums import Delivered

B, COMPILED = 9, 0.5
BOUNDS = (0.5, 0.07, 3.0, 0.5, 1e-4, 1e4)
WAYS = {
    "graph": {},
    "redo": {"norm": "redo"},
    "ghost": {"norm": "ghost"},
    "a second backward": {"norm": "two_pass"},
    "regions": {"regions": "blocks"},
    "by layer": {"clipping": "per_layer"},
    "a sum": {"loss_reduction": "sum"},
    "checked": {"check": True},
    "inductor": {"backend": "inductor"},
}


def batch() -> tuple[Tensor, Tensor]:
    return labelled(B)


def wrapped(module: nn.Module, **options: Any) -> tuple[Any, DPOptimizer]:
    options.setdefault("backend", "eager")
    model = dp_compile(module, max_grad_norm=COMPILED, **options)
    inner = torch.optim.SGD(module.parameters(), lr=0.1)
    return model, DPOptimizer(inner, model, noise_multiplier=0.0, expected_batch_size=B)


def truth(module: nn.Module, bound: float, clipping: str = "flat") -> Any:
    x, y = batch()
    each = per_example_gradients(
        module, [x], {}, lambda out, rows: F.cross_entropy(out, y[rows], reduction="none"), in_dims=0
    )
    groups = {n: n.rpartition(".")[0] for n in each} if clipping == "per_layer" else None
    return clip(each, bound, groups=groups)


def gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


@pytest.mark.parametrize("way", WAYS)
def test_every_bound_is_clipped_to(way: str) -> None:
    module = net()
    model, optimizer = wrapped(module, **WAYS[way])
    x, y = batch()
    for bound in BOUNDS:
        optimizer.max_grad_norm = bound
        assert optimizer.max_grad_norm == optimizer.mechanism.max_grad_norm == bound
        F.cross_entropy(model(x), y, reduction=WAYS[way].get("loss_reduction", "mean")).backward()
        wanted = truth(net_of(module), bound, WAYS[way].get("clipping", "flat"))
        torch.testing.assert_close(model.grad_norms.double(), wanted.norms, rtol=1e-5, atol=1e-7)
        for name, p in module.named_parameters():
            torch.testing.assert_close(gradient(p).double(), wanted.sums[name], rtol=1e-4, atol=1e-6 * bound)
        optimizer.step()
        optimizer.zero_grad()


def net_of(module: nn.Module) -> nn.Module:
    """An ordinary model with these weights."""
    plain = net()
    plain.load_state_dict(module.state_dict())
    return plain


def test_nothing_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpcompile.runtime import engine

    compiled = []
    original = engine.compile_joint
    monkeypatch.setattr(engine, "compile_joint", lambda *a, **k: compiled.append(1) or original(*a, **k))
    model, optimizer = wrapped(net())
    x, y = batch()
    for bound in BOUNDS:
        optimizer.max_grad_norm = bound
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(compiled) == 1


def test_the_compiled_step_follows() -> None:
    x, y = batch()
    module = net()
    model, optimizer = wrapped(module)
    step = compile_step(model, nn.CrossEntropyLoss(reduction="none"), optimizer)
    for bound in (0.5, 0.07, 3.0):
        optimizer.max_grad_norm = bound
        before, wanted = net_of(module), truth(net_of(module), bound)
        loss = step(x, y)
        torch.testing.assert_close(loss, F.cross_entropy(before(x), y), rtol=1e-5, atol=1e-6)
        for (name, p), old in zip(module.named_parameters(), before.parameters(), strict=True):
            torch.testing.assert_close(p.double(), old.double() - 0.1 * wanted.sums[name] / B, rtol=1e-4, atol=1e-7)


def test_a_gradient_scaler_changes_nothing() -> None:
    module = net()
    model, optimizer = wrapped(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.max_grad_norm = 0.07
    x, y = batch()
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    wanted = truth(net_of(module), 0.07)
    for name, p in module.named_parameters():
        torch.testing.assert_close(gradient(p).double(), wanted.sums[name], rtol=1e-4, atol=1e-7)


def test_draws_in_turns_with_padding() -> None:
    torch.manual_seed(3)
    data = TensorDataset(torch.randn(40, 6), torch.randint(0, 3, (40,)))

    def trained(bound: float, compiled: float) -> list[Tensor]:
        module = net()
        inner = torch.optim.SGD(module.parameters(), lr=0.5)
        options: dict[str, Any] = {"backend": "eager", "seed": 5, "max_grad_norm": compiled, "physical_batch_size": 3}
        model, optimizer, loader = make_private(module, inner, DataLoader(data, 8), noise_multiplier=0.7, **options)
        optimizer.max_grad_norm = bound
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(module.parameters())

    for got, want in zip(trained(0.2, 5.0), trained(0.2, 0.2), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_a_change_within_a_step_is_refused() -> None:
    model, optimizer = wrapped(net())
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    optimizer.max_grad_norm = 0.1
    with pytest.raises(
        PrivacyError, match=r"(?s)between a forward, which is clipped to 0.5, and its backward.*0\.1.*next"
    ):
        loss.backward()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(
        PrivacyError, match=r"(?s)to become 2.0 between a backward, clipped to 0.1, and its step.*after opt"
    ):
        optimizer.max_grad_norm = 2.0
    optimizer.max_grad_norm = 0.1
    optimizer.step()
    optimizer.max_grad_norm = 2.0


def test_a_mechanism_with_a_bound_of_its_own_is_refused() -> None:
    model, optimizer = wrapped(net())
    optimizer.mechanism.max_grad_norm = 0.1
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(PrivacyError, match=r"clipped to 0.1, the model clips to 0.5"):
        optimizer.step()


@pytest.mark.parametrize("bound", [0, -1, math.nan, math.inf, "1", True])
def test_what_is_no_bound_is_refused(bound: Any) -> None:
    _, optimizer = wrapped(net())
    with pytest.raises(PrivacyError, match="max_grad_norm must be a positive finite number"):
        optimizer.max_grad_norm = bound
    assert optimizer.max_grad_norm == COMPILED


def test_bounds_that_cannot_be_are_refused() -> None:
    _, optimizer = wrapped(net())
    for bound in (1e13, 1e-14):
        with pytest.raises(PrivacyError, match=r"(?s)times away from 0.5.*compile the model"):
            optimizer.max_grad_norm = bound
    for clipping, name in (("automatic", "'automatic'"), (lambda norms: 1 / norms, "a function")):
        _, optimizer = wrapped(net(), clipping=clipping)
        with pytest.raises(PrivacyError, match=rf"(?s)clipping={name} was to change.*'flat', 'per_layer', 'per_block'"):
            optimizer.max_grad_norm = 1.0


@pytest.mark.parametrize("bound", [0.3, 0.7, 1e-3, 1 / 3, 3.0000001, 2.0**-20 * 3])
def test_the_ratio_is_not_rounded_down(bound: float) -> None:
    """Then a sum of norm C0 in the graph has norm C at most."""
    clipped = ClipBound("flat", COMPILED)
    clipped.move(Bounds(bound), under_way=False)
    found = Delivered(None, torch.ones(1), 0, [("w", torch.tensor([COMPILED], dtype=torch.float64))])
    ((_, total),) = clipped.out_of(found, Bounds(bound)).sums
    assert bound * (1 - 1e-6) < float(total) <= bound
    mask = clipped.into(torch.tensor([1.0, 0.0]))
    assert float(mask[1]) == 0 and math.isclose(float(mask[0]), COMPILED / bound, rel_tol=1e-6)


def test_row_norms_and_the_engine_say_the_gradients_own_size() -> None:
    model, optimizer = wrapped(net())
    optimizer.max_grad_norm = 7.0
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(engine_of(model).row_norms, model.grad_norms)
    assert repr(optimizer).count("max_grad_norm=7.0") == 1
