"""Every model of the suite, unmodified: right under every rule, or refused with its reason."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from oracle import Gradients, PseudoLoss, clip, error_of, per_example_gradients, train_step
from torch import nn

import dpcompile
from dpcompile import DPCompileError
from models import ALL
from models.case import Case
from models.table import record

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have

NORMS = ("auto", "ghost", "instantiate")
BATCH = 5

pytestmark = [  # what plain torch and transformers say of these models
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings(
        "ignore:.*should not be instantiated:DeprecationWarning"
    ),  # Dynamo, of autograd functions
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type.*encountered:UserWarning"),  # PEFT
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@functools.lru_cache(4)
def solved(name: str) -> tuple[nn.Module, Any, Any, Gradients]:
    """A model, a call of it, and every example's gradient."""
    case = next(c for c in ALL if c.name == name)
    torch.manual_seed(1)
    model = case.make()
    args, kwargs = case.call(BATCH)
    return model, args, kwargs, per_example_gradients(
        model, args, kwargs, PseudoLoss(BATCH, case.out_dim), in_dims=case.in_dims
    )  # fmt: skip


def runs() -> list[Any]:
    """Model by model; what is slow only under "auto" unless asked for."""
    return [
        pytest.param(case, norm, id=f"{case.name}-{norm}", marks=[pytest.mark.slow] if case.slow and i else [])
        for case in ALL
        for i, norm in enumerate(NORMS)
        if i == 0 or case.refused is None
    ]


@pytest.mark.parametrize(("case", "norm"), runs())
def test_model(case: Case, norm: str) -> None:
    if case.refused is not None:
        return refused(case)
    model, args, kwargs, gradients = solved(case.name)
    bound = clip(gradients, 1.0).norms.median().item() * 1.01
    private = dp_compile(
        copy.deepcopy(model), max_grad_norm=bound, in_dims=case.in_dims, norm=norm, backend="eager", dynamic=False
    )
    try:
        train_step(private, args, kwargs, PseudoLoss(BATCH, case.out_dim))
    except DPCompileError:
        record(case, "refused")
        raise
    errors = error_of(private, clip(gradients, bound))
    record(case, "right" if max(errors) <= case.tolerance else "wrong", private.plan, max(errors))
    assert max(errors) <= case.tolerance, f"norms are off by {errors[0]:.1e}, clipped sums by {errors[1]:.1e}"
    rules = set(private.plan.rules().values())
    assert norm != "instantiate" or rules <= {"keep"}, rules
    assert norm != "ghost" or not rules & {"redo", "direct"}, rules


def refused(case: Case) -> None:
    torch.manual_seed(1)
    args, kwargs = case.call(BATCH)
    private = dp_compile(case.make(), in_dims=case.in_dims, backend="eager", dynamic=False)
    with pytest.raises(DPCompileError, match=case.refused) as caught:
        train_step(private, args, kwargs, PseudoLoss(BATCH, case.out_dim))
        record(case, "wrong")
    assert "what to do: " in str(caught.value)
    record(case, "refused")
