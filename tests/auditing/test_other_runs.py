"""Audits of users, of noise and batch size by the step, of draws with a cap: sound runs hold, broken ones do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from audited import BROKEN, D, losses, wide
from torch.utils.data import TensorDataset

from dpcompile import AdaptiveClip, PoissonLoader, PrivacyError, audit, make_private
from dpcompile.auditing.report import AuditReport
from dpcompile.data.users import Users

pytestmark = pytest.mark.full  # runs that are trained, each of seconds

SIZE, STEPS = 8.0, 8


def audited(
    kind: str = "dirac",
    canaries: int = 400,
    *,
    of_user: int | None = None,
    rows: int = 12,
    sample_rate: Any = 1.0,
    expected_batch_size: Any = SIZE,
    noise_multiplier: float = 2.0,
    cap: int | None = None,
    **options: Any,
) -> AuditReport:
    model = wide()
    torch.manual_seed(2)
    dataset = TensorDataset(torch.randn(rows, D), torch.randint(0, D, (rows,)))
    groups = {} if of_user is None else {"groups": [i // 3 for i in range(rows)], "examples_per_user": of_user}
    loader = PoissonLoader(
        dataset,
        expected_batch_size=expected_batch_size,
        sample_rate=sample_rate,
        physical_batch_size=256,
        steps=STEPS,
        max_batch_size=cap,
        seed=0,
        **groups,
    )
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"backend": "eager", "noise_multiplier": noise_multiplier, "seed": 1, **options}
    return audit(*make_private(model, inner, loader, **options), losses, kind=kind, canaries=canaries, seed=1)  # type: ignore[arg-type]


def falling(step: int) -> float:
    return 1.5 if step < 4 else 0.8


RUNS: dict[str, dict[str, Any]] = {
    "users": {"of_user": 2},
    "users, spread": {"of_user": 2, "kind": "spread", "canaries": 480},
    "noise by the step": {"noise_schedule": falling},
    "batch size by the step": {"expected_batch_size": lambda t: 8.0 if t % 2 else 4.0, "sample_rate": lambda t: 1.0},
    "a C for each layer": {
        "kind": "spread",
        "canaries": 480,
        "clipping": "per_layer",
        "max_grad_norm": AdaptiveClip(learning_rate=0.05, count_noise=40.0),
    },
}
"""Canaries in every step."""


@pytest.mark.parametrize("name", RUNS)
def test_sound_runs_hold(name: str) -> None:
    report = audited(**RUNS[name])
    assert not report.contradicted and report.steps == STEPS
    assert report.noise is not None and 1 < report.noise < 1.6 and report.epsilon > 3  # the attack is a good one


def clipping_rows(patch: pytest.MonkeyPatch) -> None:
    """Every row of a user to C, as if it were one of its own."""
    from dpcompile.rewriting import rewrite

    clip = rewrite.clip_group
    patch.setattr(rewrite, "clip_group", lambda *a, bound, **given: clip(*a, bound=2 * bound, **given))


CASES: list[tuple[str, str, Callable[[pytest.MonkeyPatch], None]]] = [
    *((name, "no noise", BROKEN["no_noise"]) for name in RUNS),
    *((name, "half the noise", BROKEN["half_the_noise"]) for name in RUNS),
    ("users", "rows in the place of users", clipping_rows),
    ("users, spread", "one unclipped", BROKEN["one_unclipped"]),
    ("noise by the step", "repeated noise", BROKEN["repeated_noise"]),
    ("noise by the step", "a step without noise", BROKEN["a_step_without_noise"]),
    ("a C for each layer", "left out of the norm", BROKEN["left_out_of_the_norm"]),
]


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, fault, _ in CASES])
def test_broken_runs_are_contradicted(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (break_it,) = (b for n, f, b in CASES if (n, f) == (name, fault))
    break_it(monkeypatch)
    report = audited(**RUNS[name])
    assert report.contradicted and report.noise is not None and report.noise < 0.97


@pytest.mark.parametrize("broken", [False, True])
def test_samples_whose_rate_and_noise_go_by_the_step(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken:
        BROKEN["half_the_noise"](monkeypatch)
    report = audited(
        sample_rate=lambda t: 0.8 if t < 4 else 0.5,
        noise_schedule=falling,
        noise_multiplier=1.5,
    )
    assert report.contradicted is broken


@pytest.mark.parametrize("broken", [False, True])
def test_users_among_the_data(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of a user are in or out; the bound is that of any mechanism."""
    options = {"rows": 240, "of_user": 2, "noise_multiplier": 40.0, "max_grad_norm": 0.05}
    if broken:
        BROKEN["no_noise"](monkeypatch)
    report = audited("data", 80, **options)  # type: ignore[arg-type]
    assert report.contradicted is broken and report.independent is None
    if not broken:
        with pytest.raises(PrivacyError, match="(?s)81 canaries among 80 users of the dataset.*kind='dirac'"):
            audited("data", 81, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [None, "no_noise", "one_unclipped"])
@pytest.mark.parametrize("of_user", [None, 2])
def test_draws_with_a_cap(name: str | None, of_user: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is that of any mechanism, so a run is contradicted of which little was promised."""
    if name is not None:
        BROKEN[name](monkeypatch)
    unit = 4 if of_user else 12  # users, or rows
    report = audited("spread", 480, of_user=of_user, cap=unit // 2, noise_multiplier=16.0)
    assert report.contradicted is (name is not None) and report.independent is None is report.noise
    assert report.proved is not None and report.proved < 1.5


def test_whose_examples_are_whose() -> None:
    groups = ["b", "a", "b", "c", "a", "b"]
    assert Users(groups, 6, 2).of_examples.tolist() == [0, 1, 0, 2, 1, 0]
