"""``audit`` of the engine as it is: what it says, what it leaves alone, what it refuses."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from audited import D, audited, losses, private, wide
from dp_accounting import DpEvent, NonPrivateDpEvent
from launching import launch, passed
from small_models import labelled, net
from torch import nn
from torch.utils.data import TensorDataset

from dpcompile import DPOptimizer, PoissonLoader, PrivacyAccountant, audit, dp_compile, make_private
from dpcompile.auditing.canaries import sign, spread_places
from dpcompile.auditing.report import AuditReport
from dpcompile.errors import PrivacyError
from dpcompile.noise.mechanism import GaussianMechanism, Release

pytestmark = pytest.mark.full  # runs that are trained, each of seconds


@dataclass
class Other:
    """The Gaussian mechanism under another name, which the accountant does not know."""

    noise_multiplier: float
    expected_batch_size: float
    max_grad_norm: float = 1.0
    seed: int = 3
    secure: bool = False
    bands: int = 1

    def release(self, release: Release) -> None:
        GaussianMechanism(self.noise_multiplier, self.max_grad_norm, self.expected_batch_size, self.seed).release(
            release
        )

    def event(self, sample_rate: float) -> DpEvent:
        return NonPrivateDpEvent()

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seed = state["seed"]


def halved(norms: torch.Tensor) -> torch.Tensor:
    return 0.5 / norms.clamp_min(1.0)


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer", "per_block", halved])
@pytest.mark.parametrize("kind", ["dirac", "spread"])
def test_the_right_engine_is_not_contradicted(kind: str, clipping: Any) -> None:
    report = audited(kind, clipping=clipping)
    assert not report.contradicted and report.steps == 8 and report.canaries == 400
    assert report.proved == pytest.approx(6.573, abs=1e-3)
    assert report.noise is not None and report.noise > 1
    if clipping in ("flat", "automatic") or (kind, clipping) == ("spread", "per_layer"):  # and the attack is a good one
        assert report.noise < 1.35 and report.epsilon > 4


@pytest.mark.parametrize("options", [{}, {"sample_rate": 0.3, "noise_multiplier": 1.0}], ids=["all rows", "samples"])
def test_the_right_engine_on_examples(options: dict[str, Any]) -> None:
    report = audited("data", canaries=30, rows=40, steps=3, **options)
    assert not report.contradicted and report.independent is None is report.noise
    assert report.attack[0] in ("update", "loss") and report.guesses >= report.right > 0


def test_samples_are_secret() -> None:
    """The attack does not know who was drawn; the room for noise is that of the steps as they were counted."""
    report = audited(sample_rate=0.1, noise_multiplier=0.5, steps=30)
    assert report.attack == ("samples", "samples") and not report.contradicted
    assert report.noise is not None and 1 < report.noise < 1.6
    assert report.independent is not None and 1 < report.independent < (report.proved or 0)


def test_more_delta_or_less_confidence_leave_room_for_less() -> None:
    one, other = audited(delta=1e-5), audited(delta=1e-2, confidence=0.8)
    assert one.proved is not None and other.proved is not None and other.proved < one.proved
    assert other.noise is not None and one.noise is not None and 1 < other.noise < one.noise


def test_physical_batches_and_their_number_change_nothing() -> None:
    whole, parts = audited(physical=512), audited(physical=64)
    assert whole == parts


def test_any_optimizer() -> None:
    """Not all updates tell the gradient; then the private gradients are looked at, which are the same."""
    sgd, adam = audited(), audited(optimizer=torch.optim.Adam)
    momentum = audited(optimizer=functools.partial(torch.optim.SGD, momentum=0.9))
    assert (sgd.observed, adam.observed, momentum.observed) == ("weights", "gradients", "gradients")
    for report in (adam, momentum):
        assert report.right == sgd.right and report.noise == pytest.approx(sgd.noise, rel=1e-3)


def test_several_optimizers_as_one() -> None:
    model = wide()
    parts = [torch.optim.SGD([model[0].weight], lr=0.1), torch.optim.Adam([model[2].weight], lr=0.01)]  # type: ignore[index]
    dataset = TensorDataset(torch.randn(8, D), torch.randint(0, D, (8,)))
    loader = PoissonLoader(dataset, expected_batch_size=8, sample_rate=1.0, steps=4, seed=0)
    given = make_private(model, parts, loader, noise_multiplier=1.0, seed=1, backend="eager")
    report = audit(*given, losses, kind="spread", canaries=300, seed=2)
    assert report.observed == "gradients" and not report.contradicted and report.epsilon > 3


def test_nothing_of_the_users_changes() -> None:
    model, optimizer, loader = private(rows=20)
    inner = [dict(g) for g in optimizer.optimizer.param_groups]
    before = {n: v.clone() for n, v in model.state_dict().items()}
    random, grads = torch.get_rng_state(), [p.grad for p in model.parameters()]
    for kind in ("dirac", "data"):
        audit(model, optimizer, loader, losses, kind=kind, canaries=20, steps=2)  # type: ignore[arg-type]
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(random, torch.get_rng_state()) and [p.grad for p in model.parameters()] == grads
    assert (optimizer.logical_step, loader.step, optimizer.accountant.steps) == (0, 0, 0)
    assert [dict(g) for g in optimizer.optimizer.param_groups] == inner
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.logical_step == 8
    later = audit(model, optimizer, loader, losses, canaries=20, steps=2)  # in the middle of training, and after it
    assert later.steps == 2 and optimizer.logical_step == 8 == optimizer.accountant.steps


def test_by_default_every_audit_is_another_one() -> None:
    given = private(steps=2)
    one, other = (audit(*given, losses, canaries=100) for _ in range(2))
    assert one != other


class Attended(nn.Module):
    """Called with keywords, its outputs in a dict, a frozen parameter, and an attribute that the loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes = nn.Linear(6, 3), 3
        self.scale = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, *, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.body(features * self.scale)}


def test_models_and_losses_of_other_forms() -> None:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        assert model.classes == 3
        return F.cross_entropy(model(features=batch[0])["logits"], batch[1], reduction="none")

    torch.manual_seed(0)
    model = Attended()
    loader = PoissonLoader(TensorDataset(*labelled(30)), expected_batch_size=15, steps=3, seed=0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    given = make_private(model, optimizer, loader, noise_multiplier=1.0, backend="eager", seed=1)
    for kind, canaries in (("dirac", 40), ("spread", 18), ("data", 20)):
        if kind == "spread":
            with pytest.raises(PrivacyError, match="18 canaries: half of them"):
                audit(*given, loss, kind="spread", canaries=canaries)
        else:
            assert not audit(*given, loss, kind=kind, canaries=canaries, seed=1).contradicted  # type: ignore[arg-type]


@dp_compile(backend="eager", max_grad_norm=0.5)
class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dirac", "spread", "data"])
@pytest.mark.parametrize("decorated", [False, True], ids=["blocks", "decorated"])
def test_decorated_classes_and_regions(decorated: bool, kind: Any) -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    model: Any = Decorated() if decorated else dp_compile(blocks, backend="eager", regions="blocks")
    dataset = TensorDataset(torch.randn(20, D), torch.randint(0, D, (20,)))
    loader = PoissonLoader(dataset, expected_batch_size=8, sample_rate=1.0, steps=4, seed=0)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    given = make_private(model, inner, loader, noise_multiplier=1.0, seed=1)
    report = audit(*given, losses, kind=kind, canaries=20 if kind == "data" else 300, seed=2)
    assert not report.contradicted and report.steps == 4
    if decorated and kind == "dirac":
        given[1].max_grad_norm = 0.25  # taken over: the attack and the noise go by the C of now
        moved = audit(*given, losses, kind=kind, canaries=300, seed=2)
        assert (moved.right, moved.noise) == (report.right, pytest.approx(report.noise, rel=1e-3))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_that_are_sums(reduction: str) -> None:
    report = audited(loss_reduction=reduction)
    assert report.noise == pytest.approx(audited().noise)


def test_padding_examples_are_the_users() -> None:
    model = net()
    loader = PoissonLoader(
        TensorDataset(*labelled(12)), expected_batch_size=3, steps=3, seed=0,
        padding_example=(torch.ones(6), torch.tensor(2)),
    )  # fmt: skip
    given = make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), loader, noise_multiplier=1.0,
                         backend="eager", seed=1)  # fmt: skip
    assert not audit(*given, losses, canaries=40, seed=1).contradicted


@pytest.mark.parametrize("mechanism", [None, "own"])
def test_without_an_accountant_nothing_is_proved(mechanism: str | None) -> None:
    torch.manual_seed(0)
    model = dp_compile(net(), backend="eager")
    loader = PoissonLoader(TensorDataset(*labelled(12)), expected_batch_size=12, sample_rate=1.0, steps=4, seed=0)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    numbers: dict[str, Any] = {"noise_multiplier": 0.3, "expected_batch_size": 12}
    numbers = {"mechanism": Other(**numbers)} if mechanism else numbers
    optimizer = DPOptimizer(inner, model, **numbers)
    report = audit(model, optimizer, loader, losses, canaries=100, seed=1)
    assert report.proved is None is report.noise and not report.contradicted and report.epsilon > 1
    assert "?  proved: no accountant" in str(report) and optimizer.logical_step == 0


def test_an_audit_begins_with_the_first_step_of_a_mechanism() -> None:
    model = dp_compile(net(), backend="eager")
    loader = PoissonLoader(TensorDataset(*labelled(12)), expected_batch_size=2, steps=1, seed=0)
    optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, mechanism=Other(1.0, 2.0))
    loader.attach(model, optimizer)
    for batch in loader:
        losses(model, batch).mean().backward()
        optimizer.step()
    with pytest.raises(PrivacyError, match="(?s)the mechanism, a Other, has released 1 steps.*audit before"):
        audit(model, optimizer, loader, losses, canaries=100)


def test_no_noise_is_proved_to_be_anything() -> None:
    report = audited(noise_multiplier=0.0, steps=1)
    assert report.proved == math.inf and not report.contradicted and report.noise == math.inf
    assert report.any_mechanism > 3 and json.loads(report.to_json())["proved"] == "inf"


def test_what_is_refused() -> None:
    given = private()
    for options, message in [
        ({"kind": "pixel"}, "(?s)unknown kind of canaries 'pixel'.*'dirac', 'spread' or 'data'"),
        ({"canaries": 19}, "(?s)19 canaries: half of them choose.*take 20 or more"),
        ({"canaries": 0.5}, "canaries is 0.5"),
        ({"steps": 0}, "steps is 0"),
        ({"delta": 0.0}, r"delta is 0.0, not in \(0, 1\)"),
        ({"confidence": 1.0}, r"(?s)confidence is 1.0, not in \[0.5, 1\).*0.95"),
        ({"kind": "spread", "canaries": 481}, "(?s)481 canaries cannot each have.*which has 480.*kind='dirac'"),
        ({"kind": "data", "canaries": 20}, "(?s)20 canaries among 8 rows.*kind='dirac'"),
    ]:
        with pytest.raises(PrivacyError, match=message):
            audit(*given, losses, **options)
    for loss, message in [
        (
            lambda model, batch: losses(model, batch).mean(),
            r"(?s)the loss gives \[\] for \d+ examples.*reduction='none'",
        ),
        (lambda model, batch: torch.zeros(len(batch[0])), "(?s)the loss did not call the model.*call the model that"),
        (lambda model, batch: 1.0, "the loss gives float for"),
    ]:
        with pytest.raises(PrivacyError, match=message):
            audit(*given, loss, canaries=20)  # type: ignore[arg-type]
    with pytest.raises(
        PrivacyError, match=r"(?s)in_dims is \{'input': 0\}.*per positional argument, or take kind='data'"
    ):
        audited(in_dims={"input": 0})
    assert not audited(in_dims=(0,), steps=2).contradicted


def test_a_replicated_model_is_what_is_audited() -> None:
    assert passed(launch(2, "audited_worker.py")) == {"right", "half the noise"}


def test_the_report() -> None:
    report = AuditReport("dirac", 8, 400, 120, 118, 1e-5, 0.95, 3.25, 7.5, 0.71, 6.5, "weights", ("all", "part 5"))
    assert report.epsilon == 7.5 and report.contradicted
    assert str(report) == (
        "audit of 8 steps by 400 canaries (dirac), from the weights\n"
        "epsilon at delta 1e-05, confidence 0.95:\n"
        "  at least    3.250  of any mechanism: 118 of 120 guesses right, 80 canaries without\n"
        "  at least    7.500  if canaries are independent: noise at most 0.71 times that counted\n"
        "  at most     6.500  proved and counted\n"
        "CONTRADICTED: the run was not what was counted"
    )
    again = json.loads(report.to_json())
    assert again["epsilon"] == 7.5 and again["contradicted"] is True and again["attack"] == ["all", "part 5"]


def test_signs_cancel_noise_that_is_repeated() -> None:
    signs = torch.tensor([sign(t) for t in range(16)])
    for period in (1, 2, 4):
        assert all(signs[start::period].sum() == 0 for start in range(period))
    assert (signs.view(-1, 2).sum(1) == 0).all()


def test_places_are_of_one_canary_each() -> None:
    places = spread_places([50, 7, 30], 30, torch.Generator().manual_seed(0))
    for column, size in zip(places.T, (50, 7, 30), strict=True):
        held = column[column >= 0]
        assert len(held.unique()) == len(held) == min(size, 30) and held.max() < size
    assert ((places >= 0).sum(1) >= 2).all()


def test_accountants_of_other_relations() -> None:
    model, optimizer, loader = private(relation="replace_one")
    assert isinstance(optimizer.accountant, PrivacyAccountant)
    report = audit(model, optimizer, loader, losses, canaries=100, seed=1, steps=2)
    assert report.proved is not None and report.proved > audited(canaries=100, steps=2).proved  # type: ignore[operator]
