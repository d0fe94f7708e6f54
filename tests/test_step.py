"""compile_step against the ordinary loop with the same seeds, and its refusals."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpcompile import (
    DPOptimizer,
    ExampleMixingError,
    PoissonLoader,
    PrivacyAccountant,
    PrivacyError,
    UnsupportedGraphError,
    compile_step,
    dp_compile,
    set_mask,
)

B = 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())


def twins(optimizer: Any = torch.optim.SGD, *, noise: float = 1.0, backend: str = "eager", **options):
    torch.manual_seed(0)
    models = [Net()]
    models.append(copy.deepcopy(models[0]))
    made = []
    for model in models:
        private = dp_compile(model, max_grad_norm=0.5, backend=backend)
        inner = optimizer(model.parameters(), **options)
        made += [private, DPOptimizer(inner, private, noise_multiplier=noise, expected_batch_size=B, seed=7)]
    return made


def data(n: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def close(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1})],
)
def test_equals_the_ordinary_loop(optimizer, options) -> None:
    loop, loop_optimizer, whole, whole_optimizer = twins(optimizer, **options)
    step = compile_step(whole, F.cross_entropy, whole_optimizer)
    x, y = data()
    for _ in range(3):
        loss = F.cross_entropy(loop(x), y)
        loss.backward()
        loop_optimizer.step()
        loop_optimizer.zero_grad()
        torch.testing.assert_close(step(x, y), loss.detach())
        torch.testing.assert_close(whole.grad_norms, loop.grad_norms, rtol=1e-4, atol=1e-6)
        close(loop, whole)
    assert whole_optimizer.logical_step == 3


def test_noise_is_that_of_the_optimizer() -> None:
    """The very same draws: without noise the weights differ."""
    _, _, noisy, noisy_optimizer = twins(lr=0.1)
    _, _, quiet, quiet_optimizer = twins(lr=0.1, noise=0.0)
    x, y = data()
    compile_step(noisy, F.cross_entropy, noisy_optimizer)(x, y)
    compile_step(quiet, F.cross_entropy, quiet_optimizer)(x, y)
    assert not torch.allclose(noisy.first.weight, quiet.first.weight, atol=1e-3)


@pytest.mark.parametrize("draws", [True, False])
def test_loader_with_several_physical_batches(draws: bool) -> None:
    loop, loop_optimizer, whole, whole_optimizer = twins(lr=0.1)
    dataset = torch.utils.data.TensorDataset(*data(20))
    losses = []
    for model, optimizer, compiled in ((loop, loop_optimizer, False), (whole, whole_optimizer, True)):
        loader = PoissonLoader(dataset, expected_batch_size=B, physical_batch_size=4, seed=3)
        loader.attach(model, optimizer)
        step = compile_step(model, F.cross_entropy, optimizer) if compiled else None
        for x, y in loader if draws else loader.parts():
            if step is not None:
                losses.append(step(x, y))
                assert len(model.grad_norms) == int((x != 0).any(1).sum())
            else:
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert draws == (len(losses) == len(loader)), "no logical batch was cut"
    assert whole_optimizer.logical_step == loop_optimizer.logical_step == len(loader)
    close(loop, whole)


def test_a_batch_of_the_loader_is_stepped_on_once() -> None:
    _, _, model, optimizer = twins(lr=0.1)
    loader = PoissonLoader(torch.utils.data.TensorDataset(*data(20)), expected_batch_size=B, seed=3)
    step = compile_step(model, F.cross_entropy, optimizer)
    for x, y in loader.attach(model, optimizer):
        step(x, y)
        with pytest.raises(PrivacyError, match="a second backward on one batch of the loader"):
            step(x, y)
    with pytest.raises(PrivacyError, match="on what is no batch of the loader"):
        step(*data(8))
    assert optimizer.logical_step == len(loader)


def test_a_draw_broken_off_leaves_nothing_behind() -> None:
    loop, loop_optimizer, whole, whole_optimizer = twins(lr=0.1)
    dataset = torch.utils.data.TensorDataset(*data(20))
    for model, optimizer, breaks in ((loop, loop_optimizer, False), (whole, whole_optimizer, True)):
        loader = PoissonLoader(dataset, expected_batch_size=B, physical_batch_size=2, seed=3).attach(model, optimizer)
        step = compile_step(model, F.cross_entropy, optimizer)
        batches = loader.parts()
        first = next(batches)
        if breaks:
            step(*first)
            assert optimizer.accumulating
        for x, y in loader.parts():
            step(x, y)
        assert optimizer.logical_step == len(loader)
    close(loop, whole)


def test_schedulers_do_not_recompile() -> None:
    _, _, model, optimizer = twins(lr=1.0)
    step = compile_step(model, F.cross_entropy, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    x, y = data()
    step(x, y)
    torch._dynamo.utils.counters.clear()
    for _ in range(10):  # more than Dynamo's limit of recompilations
        step(x, y)
        scheduler.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.5**10)


def test_accountant_counts_steps() -> None:
    model = dp_compile(Net(), backend="eager")
    accountant = PrivacyAccountant(noise_multiplier=1.0, sample_rate=0.1, method="rdp")
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DPOptimizer(inner, model, noise_multiplier=1.0, expected_batch_size=B, seed=1, accountant=accountant)
    compile_step(model, F.cross_entropy, optimizer)(*data())
    assert accountant.steps == 1


def test_gradients_are_spent_afterwards() -> None:
    _, _, model, optimizer = twins(lr=0.1)
    compile_step(model, F.cross_entropy, optimizer)(*data())
    with pytest.raises(PrivacyError, match="second optimizer step on the same gradients"):
        optimizer.step()


def test_loss_normalised_by_its_own_count() -> None:
    """A loss that counts is harmless on a batch of one: the loop has to spell that out."""
    loop, loop_optimizer, whole, whole_optimizer = twins(lr=0.1, noise=0.0)
    x, _ = data()
    y = torch.tensor([[0, 1], [2, -100], [1, 1], [-100, 0], [2, 2], [0, 0]])

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = outputs.unsqueeze(1).expand(-1, 2, -1)
        return F.cross_entropy(outputs.reshape(-1, 3), targets.reshape(-1), ignore_index=-100)

    compile_step(whole, loss_fn, whole_optimizer)(x, y)
    outputs = loop(x)
    sum(loss_fn(outputs[i : i + 1], y[i : i + 1]) / B for i in range(B)).backward()  # type: ignore[union-attr]
    loop_optimizer.step()
    close(loop, whole)


def test_inputs_by_name_and_in_a_tuple() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x + shift)}

    x, y = data()
    results = []
    for inputs in ((x, torch.ones(4)), {"x": x, "shift": torch.ones(4)}):
        torch.manual_seed(0)
        model = dp_compile(Two(), backend="eager", in_dims={"shift": None})
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = DPOptimizer(inner, model, noise_multiplier=0.0, expected_batch_size=B)
        step = compile_step(model, lambda out, y: F.cross_entropy(out["logits"], y), optimizer)
        results.append((step(inputs, y), model))
    torch.testing.assert_close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])


def test_refusals() -> None:
    model = dp_compile(Net(), backend="eager")
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DPOptimizer(inner, model, noise_multiplier=1.0, expected_batch_size=B, seed=1)
    with pytest.raises(PrivacyError, match="Net is not a private model"):
        compile_step(Net(), F.cross_entropy, optimizer)
    with pytest.raises(PrivacyError, match="needs a DPOptimizer, got SGD"):
        compile_step(model, F.cross_entropy, inner)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="belongs to another private model"):
        compile_step(dp_compile(Net(), backend="eager"), F.cross_entropy, optimizer)


@pytest.mark.parametrize(
    ("loss_fn", "said"),
    [
        (nn.CrossEntropyLoss, r"loss_fn is the class CrossEntropyLoss: give an object of it, CrossEntropyLoss\(\)"),
        (None, "targets; None cannot be called"),
        (lambda outputs: outputs.sum(), r"<lambda>\(outputs\) cannot be: too many positional arguments"),
        (F.triplet_margin_loss, r"triplet_margin_loss\(anchor.* cannot be: missing a required argument: 'negative'"),
        (nn.Softmax(1), "Softmax.* cannot be: too many positional arguments"),
    ],
)
def test_a_loss_that_cannot_be_called_so(loss_fn: Any, said: str) -> None:
    model = dp_compile(Net(), backend="eager")
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DPOptimizer(inner, model, noise_multiplier=1.0, expected_batch_size=B, seed=1)
    with pytest.raises(TypeError, match=said):
        compile_step(model, loss_fn, optimizer)
    compile_step(model, nn.CrossEntropyLoss(), optimizer)
    compile_step(model, lambda *both: F.cross_entropy(*both), optimizer)


def test_mixing_model_is_refused_with_its_line() -> None:
    class Centred(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = super().forward(x)
            return hidden - hidden.mean(0)

    model = dp_compile(Centred(), backend="eager")
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DPOptimizer(inner, model, noise_multiplier=1.0, expected_batch_size=B, seed=1)
    with pytest.raises(ExampleMixingError, match=r"(?s)`sub` mixes examples.*test_step\.py:\d+.*hidden\.mean\(0\)"):
        compile_step(model, F.cross_entropy, optimizer)(*data())
    assert optimizer.logical_step == 0, "a refused step must not count"


def test_loss_with_several_values_per_example_is_refused() -> None:
    _, _, model, optimizer = twins(lr=0.1)
    step = compile_step(model, lambda out, y: out, optimizer)
    with pytest.raises(UnsupportedGraphError, match="one value per example"):
        step(*data())


@pytest.mark.slow
def test_inductor() -> None:
    loop, loop_optimizer, whole, whole_optimizer = twins(torch.optim.AdamW, lr=0.01, backend="inductor")
    step = compile_step(whole, F.cross_entropy, whole_optimizer)
    x, y = data()
    for _ in range(2):
        F.cross_entropy(loop(x), y).backward()
        loop_optimizer.step()
        loop_optimizer.zero_grad()
        step(x, y)
    close(loop, whole)


class Configured(Net):
    """Reads what the user may change between two steps."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.scales, self.scale = 1.0, [1.0], torch.ones(3)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = super().forward(x)
        self.seen = hidden  # with its gradient: it has no part in the loss
        if not self.training:
            hidden = hidden * 3
        return (hidden * self.scale + self.shift) * self.scales[0] / self.temperature


CLASS_WEIGHTS = {"weight": torch.ones(3)}


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return (F.cross_entropy(outputs, targets, reduction="none") * CLASS_WEIGHTS["weight"][targets]).mean()


CHANGES = {
    "attribute": lambda model, optimizer: setattr(model, "temperature", 4.0),
    "list": lambda model, optimizer: model.scales.__setitem__(0, 4.0),
    "tensor attribute": lambda model, optimizer: setattr(model, "scale", torch.full((3,), 4.0)),
    "buffer replaced": lambda model, optimizer: setattr(model, "shift", torch.arange(3.0)),
    "buffer written": lambda model, optimizer: model.shift.copy_(torch.arange(3.0)),
    "eval": lambda model, optimizer: model.eval(),
    "frozen": lambda model, optimizer: model.first.requires_grad_(False),
    "hook": lambda model, optimizer: model.first.register_forward_hook(lambda module, args, out: out * 2),
    "loss": lambda model, optimizer: CLASS_WEIGHTS.update(weight=torch.tensor([1.0, 2.0, 3.0])),
    "noise": lambda model, optimizer: setattr(optimizer, "noise_multiplier", 50.0),
    "batch size": lambda model, optimizer: setattr(optimizer, "expected_batch_size", 60),
    "weight decay": lambda model, optimizer: optimizer.param_groups[0].update(weight_decay=0.5),
    "betas": lambda model, optimizer: optimizer.param_groups[0].update(betas=(0.5, 0.5), eps=1e-3),
    "maximize": lambda model, optimizer: optimizer.param_groups[0].update(maximize=True),
    "rate": lambda model, optimizer: optimizer.param_groups[0].update(lr=0.3),
    "state": lambda model, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_sees_what_changes_after_the_first_step(change) -> None:
    """As the ordinary loop does."""
    x, y = data()
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        CLASS_WEIGHTS["weight"] = torch.ones(3)
        model = dp_compile(Configured(), max_grad_norm=0.5, backend="eager")
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        optimizer = DPOptimizer(inner, model, noise_multiplier=1.0, expected_batch_size=B, seed=7)
        step = compile_step(model, weighted, optimizer) if compiled else None
        for i in range(4):
            if i == 2:
                CHANGES[change](model, optimizer)
            if step is not None:
                step(x, y)
            else:
                losses = F.cross_entropy(model(x), y, reduction="none") * CLASS_WEIGHTS["weight"][y]
                losses.mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(model)
    close(*ends)


def test_replaced_parameter_is_refused() -> None:
    _, _, model, optimizer = twins(lr=0.1)
    step = compile_step(model, F.cross_entropy, optimizer)
    step(*data())
    model.last.weight = nn.Parameter(torch.randn(3, 8))
    with pytest.raises(PrivacyError, match=r"'last.weight' was replaced after dp_compile"):
        step(*data())
    assert optimizer.logical_step == 1


def test_frozen_loss_module_may_change() -> None:
    loop, loop_optimizer, whole, whole_optimizer = twins(lr=0.1)
    loss = nn.CrossEntropyLoss(weight=torch.ones(3), reduction="sum")
    step = compile_step(whole, loss, whole_optimizer)
    x, y = data()
    for i in range(3):
        loss.weight = torch.tensor([1.0, 1.0 + i, 1.0])
        step(x, y)
        (loss(loop(x), y) / B).backward()
        loop_optimizer.step()
        loop_optimizer.zero_grad()
    close(loop, whole)


SCHEDULES = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=25),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.9, patience=0),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=4, cycle_momentum=True),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o, 0.5), torch.optim.lr_scheduler.CosineAnnealingLR(o, 9)],
        milestones=[4],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_schedulers_of_every_number(schedule, kind) -> None:
    loop, loop_optimizer, whole, whole_optimizer = twins(kind, lr=0.01, momentum=0.9)
    schedulers = [SCHEDULES[schedule](o) for o in (loop_optimizer, whole_optimizer)]
    step = compile_step(whole, F.cross_entropy, whole_optimizer)
    x, y = data()
    for _ in range(12):
        F.cross_entropy(loop(x), y).backward()
        loop_optimizer.step()
        loop_optimizer.zero_grad()
        step(x, y)
        for scheduler in schedulers:
            scheduler.step(*([1.0] if schedule == "plateau" else []))
    close(loop, whole)


def test_batches_of_other_sizes() -> None:
    loop, loop_optimizer, whole, whole_optimizer = twins(lr=0.1)
    step = compile_step(whole, F.cross_entropy, whole_optimizer)
    for n in (6, 4, 9, 4, 6):
        x, y = data(n)
        F.cross_entropy(loop(x), y).backward()
        loop_optimizer.step()
        loop_optimizer.zero_grad()
        step(x, y)
    close(loop, whole)


def test_a_step_without_the_mask_that_it_needs_is_refused() -> None:
    _, _, model, optimizer = twins(lr=0.1)
    step = compile_step(model, F.cross_entropy, optimizer)
    x, y = data()
    set_mask(model, torch.ones(len(x), dtype=torch.bool))
    step(x, y)
    with pytest.raises(PrivacyError, match="a second backward on one batch of the loader"):
        step(x, y)
    set_mask(model, None)
    step(x, y)
    assert optimizer.logical_step == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_was_broken_off_leaves_nothing(error, monkeypatch) -> None:
    loop, loop_optimizer, whole, whole_optimizer = twins(lr=0.1)
    step = compile_step(whole, F.cross_entropy, whole_optimizer)
    x, y = data()
    step(x, y)
    with monkeypatch.context() as patch:
        patch.setattr(whole_optimizer.engine.masks, "take", lambda *_: (_ for _ in ()).throw(error("now")))
        with pytest.raises(error, match="now"):
            step(x, y)
    step(x, y)
    assert whole_optimizer.logical_step == 2
    for _ in range(2):
        F.cross_entropy(loop(x), y).backward()
        loop_optimizer.step()
        loop_optimizer.zero_grad()
    close(loop, whole)


def test_not_compiled_is_refused() -> None:
    _, _, model, optimizer = twins(lr=0.1)
    step = compile_step(model, F.cross_entropy, optimizer)
    with torch.compiler.set_stance("force_eager"), pytest.raises(UnsupportedGraphError, match="ran without being"):
        step(*data())
    assert optimizer.logical_step == 0


def test_two_parameters_with_one_gradient() -> None:
    """Their sums are the same value of the graph, and physical batches are added to it in place."""

    class Biases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3] + self.a + self.b

    model = dp_compile(Biases(), max_grad_norm=100.0, backend="eager")
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = DPOptimizer(inner, model, noise_multiplier=0.0, expected_batch_size=1)
    step = compile_step(model, F.cross_entropy, optimizer)
    x, y = data()
    optimizer.accumulating = True
    step(x, y)
    optimizer.accumulating = False
    step(x, y)
    leaf = torch.zeros(3, requires_grad=True)
    (2 * F.cross_entropy(x[:, :3] + leaf, y, reduction="sum")).backward()
    torch.testing.assert_close(-model.a, leaf.grad)
    torch.testing.assert_close(-model.b, leaf.grad)


def test_a_model_that_is_replicated_later_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dp_compile(nn.Linear(3, 2), backend="eager")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, noise_multiplier=1.0, expected_batch_size=4, seed=1
    )
    step = compile_step(model, nn.functional.mse_loss, optimizer)
    monkeypatch.setattr(type(optimizer.engine.replicas), "known", True)
    with pytest.raises(UnsupportedGraphError, match=r"(?s)replicated by DistributedDataParallel.*the ordinary loop"):
        step(torch.randn(4, 3), torch.randn(4, 2))
    assert optimizer.logical_step == 0


def test_a_step_runs_compiled_code_alone() -> None:
    """Once it is compiled, no graph runs operation by operation in Python."""
    _, _, whole, optimizer = twins(lr=0.1, backend="inductor")
    step = compile_step(whole, F.cross_entropy, optimizer)
    for _ in range(3):
        step(*data())
    graphs: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith("<eval_with_key>"):
            graphs.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        step(*data())
    finally:
        sys.setprofile(None)
    assert not graphs
