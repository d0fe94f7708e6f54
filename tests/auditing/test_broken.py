"""Engines that are broken on purpose: the audit contradicts what they count; docs/auditing.md says which it cannot."""

from __future__ import annotations

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from audited import BROKEN, audited

from dpcompile.noise.mechanism import GaussianMechanism

pytestmark = pytest.mark.full  # runs that are trained, each of seconds

# Their canaries have a parameter to themselves: what is wrong with another one they do not see.
UNSEEN_BY_DIRAC = {"left_out_of_the_norm", "one_unclipped"}


@pytest.mark.parametrize("name", sorted(set(BROKEN) - UNSEEN_BY_DIRAC))
def test_canaries_with_a_parameter_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BROKEN[name](monkeypatch)
    report = audited()
    assert report.contradicted and report.noise is not None and report.noise < 0.8


@pytest.mark.parametrize("name", sorted(UNSEEN_BY_DIRAC))
def test_what_they_cannot_see(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = audited()
    BROKEN[name](monkeypatch)
    assert audited() == wanted


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_canaries_in_every_parameter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BROKEN[name](monkeypatch)
    report = audited("spread", canaries=480)
    assert report.contradicted and report.noise is not None and report.noise < 0.97


@pytest.mark.slow
@pytest.mark.parametrize("clipping", ["automatic", "per_layer", "per_block"])
@pytest.mark.parametrize("name", ["half_the_noise", "twice_the_bound", "repeated_noise"])
def test_under_other_clipping(name: str, clipping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BROKEN[name](monkeypatch)
    assert audited("spread", canaries=480, clipping=clipping).contradicted


@pytest.mark.parametrize("name", ["no_noise", "one_unclipped"])
def test_canaries_that_are_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is that of any mechanism, so a run is contradicted of which little was promised."""
    options = {"rows": 80, "noise_multiplier": 40.0, "steps": 8, "max_grad_norm": 0.05}
    assert not audited("data", canaries=80, **options).contradicted  # type: ignore[arg-type]
    BROKEN[name](monkeypatch)
    report = audited("data", canaries=80, **options)  # type: ignore[arg-type]
    assert report.contradicted and report.right > 0.8 * report.guesses


def test_any_mechanism_that_promised_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without assuming independence: guesses alone contradict."""
    BROKEN["no_noise"](monkeypatch)
    report = audited(noise_multiplier=8.0)
    assert report.proved is not None and report.any_mechanism > 2 * report.proved


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_steps_in_one_pass_with_the_noise(optimizer: type, monkeypatch: pytest.MonkeyPatch) -> None:
    std = GaussianMechanism.std
    monkeypatch.setattr(GaussianMechanism, "std", property(lambda self: std.fget(self) / 2))  # type: ignore[misc]
    assert audited(optimizer=optimizer).contradicted


@pytest.mark.parametrize("name", ["half_the_noise", "repeated_noise"])
def test_samples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not know who was drawn sees it too."""
    BROKEN[name](monkeypatch)
    assert audited(sample_rate=0.5, noise_multiplier=1.5).contradicted


def test_several_physical_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    BROKEN["twice_the_bound"](monkeypatch)
    assert audited(physical=64).contradicted


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *sorted(BROKEN)])
def test_through_inductor(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if name is not None:
        BROKEN[name](monkeypatch)
    inductor, autograd = torch._inductor.config, torch._functorch.config  # keys do not know of what is patched here
    with inductor.patch(fx_graph_cache=False), autograd.patch(enable_autograd_cache=False):
        assert audited("spread", canaries=480, backend="inductor").contradicted is (name is not None)
