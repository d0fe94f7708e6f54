"""The models of the suite with two rows to each user: right or refused, and what mixes users is refused as ever.

A model in twenty is tried by CI; ``pytest tests/models -m slow -k users`` has them all.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import PseudoLoss, clip, error_of, per_example_gradients, train_step

import dpcompile
from dpcompile import DPCompileError, ExampleMixingError
from models import ALL
from models.case import Case
from models.test_coverage import pytestmark as warnings_of_models

dp_compile: Any = dpcompile.dp_compile
USERS, K = 3, 2
REFUSED = {
    "modules/AllSizesEqual": "made for a batch of five",
    "vision/ConditionalDetrForObjectDetection": "its learned queries go by the row number, as far as is known",
}

pytestmark = [pytest.mark.full, *warnings_of_models]


def some(cases: list[Case]) -> list[Any]:
    return [pytest.param(c, id=c.id, marks=[pytest.mark.slow] if i % 20 else []) for i, c in enumerate(cases)]


@pytest.mark.parametrize("case", some([c for c in ALL if c.refused is None and c.id not in REFUSED]))
def test_right(case: Case) -> None:
    torch.manual_seed(1)
    model, loss = case.make(), PseudoLoss(USERS * K, case.out_dim)
    args, kwargs = case.call(USERS * K)
    rows = per_example_gradients(model, args, kwargs, loss, in_dims=case.in_dims)
    gradients = {n: g.unflatten(0, (USERS, K)).sum(1) for n, g in rows.items()}
    bound = clip(gradients, 1.0).norms.median().item() * 1.01
    options: dict[str, Any] = {"in_dims": case.in_dims, "backend": "eager", "examples_per_user": K}
    private = dp_compile(copy.deepcopy(model), max_grad_norm=bound, **options)
    train_step(private, args, kwargs, loss)
    errors = error_of(private, clip(gradients, bound))
    assert max(errors) <= case.tolerance, f"norms are off by {errors[0]:.1e}, clipped sums by {errors[1]:.1e}"


@pytest.mark.parametrize("case", some([c for c in ALL if c.family == "mixing"]))
def test_refused(case: Case) -> None:
    torch.manual_seed(1)
    args, kwargs = case.call(USERS * K)
    private = dp_compile(case.make(), in_dims=case.in_dims, backend="eager", examples_per_user=K)
    with pytest.raises((DPCompileError, ExampleMixingError)):
        train_step(private, args, kwargs, PseudoLoss(USERS * K, case.out_dim))
