"""Loss scaling with torch.amp.GradScaler: the update is that of the unscaled loss, or the scaler is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import labelled, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpcompile import DPOptimizer, PrivacyError, dp_compile, make_private
from dpcompile.module import engine_of

C, B = 0.5, 8


def batch() -> tuple[Tensor, Tensor]:
    return labelled(B)


def private(module: nn.Module, **options: Any) -> tuple[Any, DPOptimizer]:
    model = dp_compile(module, backend="eager", max_grad_norm=C, **options)
    inner = torch.optim.SGD(module.parameters(), lr=1.0)
    return model, DPOptimizer(inner, model, noise_multiplier=0.0, expected_batch_size=B)


def updated(scaler: Any, explicit: bool = False, **options: Any) -> tuple[list[Tensor], Tensor]:
    """Weights and norms after one step of two micro-batches."""
    module = net()
    model, optimizer = private(module, **options)
    x, y = batch()
    for accumulating in (True, False):
        optimizer.accumulating = accumulating
        loss = F.cross_entropy(model(x), y, reduction=options.get("loss_reduction", "mean"))
        if scaler is None:
            loss.backward()
            optimizer.step()
            continue
        scaler.scale(loss).backward()
        if explicit and not accumulating:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), float("inf"))
        scaler.step(optimizer)
        scaler.update()
    return [p.detach().clone() for p in module.parameters()], model.grad_norms


@pytest.mark.parametrize(
    "options",
    [
        {"clipping": "automatic", "loss_reduction": "sum"},
        {"clipping": lambda norms: 0.3 / (norms + 0.1)},
        {"regions": "blocks", "clipping": "per_layer"},
        {"regions": "blocks", "norm": "two_pass"},
    ],
    ids=["automatic", "a function", "per_layer", "two_pass"],
)
def test_the_update_is_that_of_the_unscaled_loss(options: dict[str, Any]) -> None:
    plain, norms = updated(None, **options)
    for scale in (2.0**-10, 1000.0):
        found, scaled_norms = updated(torch.amp.GradScaler("cpu", init_scale=scale), **options)
        torch.testing.assert_close(scaled_norms, norms, rtol=1e-5, atol=0)
        for a, b in zip(plain, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.full
def test_inductor_reads_the_scale_in_the_backward() -> None:
    plain, norms = updated(None)
    module = net()
    model = dp_compile(module, max_grad_norm=C)
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=1.0), model, noise_multiplier=0.0, expected_batch_size=B
    )
    x, y = batch()
    for scale in (1.0, 512.0, 3.0):
        optimizer.zero_grad()
        torch.amp.GradScaler("cpu", init_scale=scale).scale(F.cross_entropy(model(x), y)).backward()
        torch.testing.assert_close(model.grad_norms, norms, rtol=1e-5, atol=0)


def test_unscaling_by_hand_is_undone() -> None:
    plain, _ = updated(None)
    found, _ = updated(torch.amp.GradScaler("cpu", init_scale=1024.0), explicit=True)
    for a, b in zip(plain, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.3)
    with pytest.raises(
        PrivacyError, match=r"clipped backward alone(.*\n)+.*leave unscale_\(\) of the gradient scaler out"
    ):
        updated(scaler, explicit=True)


def test_a_scale_that_grows_within_a_step() -> None:
    plain, _ = updated(None)
    found, _ = updated(torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1))
    for a, b in zip(plain, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_float16_that_would_underflow() -> None:
    """Cotangents of 1e-8 vanish in float16; scaled they do not."""
    wanted: list[Tensor] = []
    for half in (False, True):
        module = net()
        model, _ = private(module)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
        x, y = batch()
        with torch.autocast("cpu", torch.float16, enabled=half):
            out = model(x)
        scaler.scale(F.cross_entropy(out.float(), y) * 1e-6).backward()
        wanted.append(model.grad_norms.clone())
    torch.testing.assert_close(wanted[1], wanted[0], rtol=2e-2, atol=0)


def test_a_lost_example_does_not_skip_the_step() -> None:
    """Skipping it, or changing the scale for it, would tell of the data without noise."""
    module = net()
    model, optimizer = private(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = batch()
    x[0, 0] = float("inf")
    with pytest.warns(RuntimeWarning, match=f"1 of {B} examples.*smaller init_scale"):
        scaler.scale(F.cross_entropy(model(x), y, reduction="sum") / B).backward()
    before = copy.deepcopy(module.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.logical_step == 1 and scaler.get_scale() == 1024.0
    assert not all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_a_scaler_that_did_not_scale_the_loss_is_refused() -> None:
    x, y = batch()
    for first, second, said in ((None, 8.0, "none that is known"), (8.0, 16.0, "scale 8")):
        model, optimizer = private(net())
        own, other = (torch.amp.GradScaler("cpu", init_scale=s or 1.0) for s in (first, second))
        loss = F.cross_entropy(model(x), y)
        (loss if first is None else own.scale(loss)).backward()
        other.scale(torch.zeros(()))
        with pytest.raises(PrivacyError, match=f"scaler that steps the optimizer is at scale.*{said}"):
            other.step(optimizer)


def test_losses_of_two_scales_in_one_backward_are_refused() -> None:
    x, y = batch()
    model, _ = private(net())
    out = model(x)
    scalers = [torch.amp.GradScaler("cpu", init_scale=s) for s in (8.0, 16.0)]
    losses = [s.scale(F.cross_entropy(out, y)) for s in scalers]
    with pytest.raises(PrivacyError, match="scaled differently"):
        torch.stack(losses).sum().backward()


def test_a_scaler_that_is_off_and_a_loss_stepped_without_one() -> None:
    plain, _ = updated(None)
    off, _ = updated(torch.amp.GradScaler("cpu", enabled=False))
    assert all(map(torch.equal, plain, off))
    module = net()
    model, optimizer = private(module)
    x, y = batch()
    for _ in range(2):
        torch.amp.GradScaler("cpu", init_scale=4.0).scale(F.cross_entropy(model(x), y)).backward()
    optimizer.step()
    for a, b in zip(plain, module.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-7)


def test_the_ordinary_loop_with_padding_and_check() -> None:
    x, y = torch.randn(24, 6), torch.randint(0, 3, (24,))
    module = net()
    model, optimizer, loader = make_private(
        module, torch.optim.SGD(module.parameters(), lr=0.0), DataLoader(TensorDataset(x, y), batch_size=6),
        noise_multiplier=0.0, max_grad_norm=C, physical_batch_size=5, backend="eager", check=True, seed=1,
    )  # fmt: skip
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for a, b in loader:
        scaler.scale(F.cross_entropy(model(a), b)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert engine_of(model).ledger.scales == [] and optimizer.logical_step == len(loader)


def test_a_scaler_of_ones_own_is_refused_where_it_divides() -> None:
    x, y = batch()
    model, optimizer = private(net())
    (1024.0 * F.cross_entropy(model(x), y)).backward()
    for p in model.parameters():
        p.grad /= 1024.0
    with pytest.raises(PrivacyError, match=r"clipped backward alone(.*\n)+.*use torch.amp.GradScaler"):
        optimizer.step()


def test_a_loss_scaled_by_hand_is_a_larger_loss() -> None:
    x, y = batch()
    norms = []
    for scale in (1.0, 1024.0):
        model, optimizer = private(net())
        (scale * F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        norms.append(model.grad_norms)
    torch.testing.assert_close(1024.0 * norms[0], norms[1])
