"""A small private run to audit, and ways to break the engine that the audit is to notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dpcompile import PoissonLoader, audit, make_private
from dpcompile.auditing.report import AuditReport
from dpcompile.graph.insert import behind, insert
from dpcompile.noise import mechanism
from dpcompile.rewriting import rewrite

__all__ = ["BROKEN", "audited", "losses", "private"]

D = 20  # each weight has at least as many elements as there are canaries


def wide() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, D + 4, bias=False), nn.Tanh(), nn.Linear(D + 4, D, bias=False))


def losses(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def private(
    make: Callable[[], nn.Module] = wide,
    optimizer: Any = torch.optim.SGD,
    *,
    rows: int = 8,
    steps: int = 8,
    sample_rate: float = 1.0,
    physical: int = 256,
    noise_multiplier: float = 2.0,
    **options: Any,
) -> tuple[Any, Any, Any]:
    model = make()
    torch.manual_seed(2)
    dataset = TensorDataset(torch.randn(rows, D), torch.randint(0, D, (rows,)))
    loader = PoissonLoader(
        dataset, expected_batch_size=8, sample_rate=sample_rate, physical_batch_size=physical, steps=steps, seed=0
    )
    inner = optimizer(model.parameters(), lr=0.1)
    options = {"backend": "eager", **options}
    return make_private(model, inner, loader, noise_multiplier=noise_multiplier, seed=1, **options)


def audited(kind: str = "dirac", canaries: int = 400, seed: int = 1, **options: Any) -> AuditReport:
    given = {k: options.pop(k) for k in ("delta", "confidence") if k in options}
    return audit(*private(**options), losses, kind=kind, canaries=canaries, seed=seed, **given)  # type: ignore[arg-type]


def _with_noise(patch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    drawn = mechanism.add_gaussian_
    patch.setattr(mechanism, "add_gaussian_", lambda pieces, **given: drawn(pieces, **change(given)))


def no_noise(patch: pytest.MonkeyPatch) -> None:
    _with_noise(patch, lambda given: {**given, "std": 1e-30})


def half_the_noise(patch: pytest.MonkeyPatch) -> None:
    _with_noise(patch, lambda given: {**given, "std": given["std"] / 2})


def repeated_noise(patch: pytest.MonkeyPatch) -> None:
    _with_noise(patch, lambda given: {**given, "step": 0})


def noise_in_pairs(patch: pytest.MonkeyPatch) -> None:
    _with_noise(patch, lambda given: {**given, "step": given["step"] // 2})


def two_noises_in_turn(patch: pytest.MonkeyPatch) -> None:
    _with_noise(patch, lambda given: {**given, "step": given["step"] % 2})


def a_step_without_noise(patch: pytest.MonkeyPatch) -> None:
    _with_noise(patch, lambda given: {**given, "std": 1e-30 if given["step"] == 5 else given["std"]})


def twice_the_bound(patch: pytest.MonkeyPatch) -> None:
    clip = rewrite.clip_group
    patch.setattr(rewrite, "clip_group", lambda *a, bound, **given: clip(*a, bound=2 * bound, **given))


def left_out_of_the_norm(patch: pytest.MonkeyPatch) -> None:
    clip = rewrite.clip_group
    patch.setattr(rewrite, "clip_group", lambda squared, *a, **given: clip(squared[1:], *a, **given))


def one_unclipped(patch: pytest.MonkeyPatch) -> None:
    """The sum of the first parameter's gradients takes every example as it is."""
    sums = rewrite.clipped_sums

    def broken(joint: Any, norms: Sequence[Any], weights: Sequence[Any], second: Any) -> Iterator[Any]:
        every = insert(joint.graph, behind(joint.graph, [joint.mask]), lambda m: m.double() * m.shape[0], [joint.mask])
        return sums(joint, norms, [every, *weights[1:]], second)

    patch.setattr(rewrite, "clipped_sums", broken)


def one_without_noise(patch: pytest.MonkeyPatch) -> None:
    drawn = mechanism.add_gaussian_

    def broken(pieces: list[Tensor], *, parameters: list[int], **given: Any) -> None:
        kept = pieces[0] / given["divisor"]
        drawn(pieces, parameters=parameters, **given)
        pieces[0].copy_(kept)

    patch.setattr(mechanism, "add_gaussian_", broken)


BROKEN = {
    f.__name__: f
    for f in (
        no_noise,
        half_the_noise,
        repeated_noise,
        noise_in_pairs,
        two_noises_in_turn,
        a_step_without_noise,
        twice_the_bound,
        left_out_of_the_norm,
        one_unclipped,
        one_without_noise,
    )
}
