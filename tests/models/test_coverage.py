"""Every model of the suite, unmodified: right under every rule, or refused with its reason."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Gradients, PseudoLoss, clip, error_of, per_example_gradients, train_step
from torch import nn

import dpcompile
from dpcompile import DPCompileError
from models import ALL
from models.case import Case
from models.table import line

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have

NORMS = ("auto", "ghost", "instantiate")
BATCH = 5

pytestmark = [  # what plain torch and transformers say of these models
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type.*encountered:UserWarning"),  # PEFT
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Dynamo's own, of Functions
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning"),
]


@functools.lru_cache(4)
def solved(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any, Any, Gradients]:
    """A model, a call of it, and every example's gradient."""
    case = next(c for c in ALL if c.id == name)
    torch.manual_seed(1)
    model = case.make()
    if dtype != torch.float32:
        model = model.to(dtype)
    args, kwargs = case.call(BATCH, dtype)
    return model, args, kwargs, per_example_gradients(
        model, args, kwargs, PseudoLoss(BATCH, case.out_dim), in_dims=case.in_dims
    )  # fmt: skip


def marks_of(case: Case, run: int, place: int) -> list[Any]:
    """One process for all runs of a model, so that its gradients are computed once.

    Of the forced rules one is not slow, by turns, and of every second model.
    """
    forced = 1 + place // 2 % 2 if place % 2 == 0 else 0
    slow = case.rare or (run > 0 and (case.slow or run != forced))
    return [pytest.mark.xdist_group(case.id), *([pytest.mark.slow] if slow else [])]


def runs() -> list[Any]:
    """Model by model, under "auto" and, every second one, a forced rule by turns; the rest is slow."""
    return [
        pytest.param(case, norm, id=f"{case.id}-{norm}", marks=marks_of(case, i, place))
        for place, case in enumerate(ALL)
        for i, norm in enumerate(NORMS)
        if i == 0 or case.refused is None
    ]


Record = Callable[..., None]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Note for the table what a model came to: outcome, plan, error."""
    return lambda *what: request.node.user_properties.append(("model", line(*what)))


@pytest.mark.parametrize(("case", "norm"), runs())
def test_model(case: Case, norm: str, record: Record) -> None:
    if case.refused is not None:
        return refused(case, record)
    rules = right(case, norm, record)
    assert norm != "instantiate" or rules <= {"keep"}, rules
    assert norm != "ghost" or not rules & {"redo", "direct"}, rules


@pytest.mark.inductor_zoo
@pytest.mark.parametrize("case", ALL, ids=lambda c: c.id)
def test_model_through_inductor(case: Case, record: Record) -> None:
    """All models, an hour or more: ``pytest tests -m inductor_zoo``."""
    if case.refused is not None:
        return refused(case, record, backend="inductor")
    right(case, "auto", record, backend="inductor")


HEAVY = ("adapters", "architectures", "experts", "language", "speech", "vision")  # take long to compile
MENDED = {  # what Inductor gets wrong without us, under the rule that shows it
    "spatial/TutorialCNN": "redo",
    "spatial/AvgPool2d-ceil": "auto",
    "spatial/AvgPool3d-ceil": "auto",
    "spatial/AdaptiveMaxPool3d-channels-last": "auto",
}


def sample() -> list[Any]:
    """Sixty models, evenly from light and heavy families; rules by turns, and handwritten modules in float64."""
    runs = [case for case in ALL if case.refused is None and case.id not in MENDED]
    light, heavy = [c for c in runs if c.family not in HEAVY], [c for c in runs if c.family in HEAVY]
    turns = itertools.cycle(("auto", "redo", "auto", "ghost", "instantiate"))
    chosen = zip(evenly(light, 51) + evenly(heavy, 5), turns, strict=False)
    fixed = [(next(c for c in ALL if c.id == name), norm) for name, norm in MENDED.items()]
    return [pytest.param(case, norm, id=f"{case.id}-{norm}") for case, norm in [*fixed, *chosen]]


def evenly(cases: list[Case], count: int) -> list[Case]:
    return [cases[i * len(cases) // count] for i in range(count)]


@pytest.mark.parametrize(("case", "norm"), sample())
def test_sample_through_inductor(case: Case, norm: str, record: Record) -> None:
    right(case, norm, record, "inductor", torch.float64 if case.family == "modules" else torch.float32)


def right(
    case: Case, norm: str, record: Record, backend: str = "eager", dtype: torch.dtype = torch.float32
) -> set[str]:
    """Compile, step, compare; the rules of the plan."""
    model, args, kwargs, gradients = solved(case.id, dtype)
    bound = clip(gradients, 1.0).norms.median().item() * 1.01
    private = dp_compile(
        copy.deepcopy(model), max_grad_norm=bound, in_dims=case.in_dims, norm=norm, backend=backend, dynamic=False
    )
    try:
        train_step(private, args, kwargs, PseudoLoss(BATCH, case.out_dim))
        errors = error_of(private, clip(gradients, bound))
    except Exception as error:
        kinds = {DPCompileError: "refused", AssertionError: "wrong"}
        record(case, next((name for kind, name in kinds.items() if isinstance(error, kind)), "crashed"))
        raise
    close = max(errors) <= case.tolerance  # False for NaN
    record(case, "right" if close else "wrong", private.plan, max(errors))
    assert close, f"norms are off by {errors[0]:.1e}, clipped sums by {errors[1]:.1e}"
    return set(private.plan.rules().values())


def refused(case: Case, record: Record, backend: str = "eager") -> None:
    torch.manual_seed(1)
    args, kwargs = case.call(BATCH)
    private = dp_compile(case.make(), in_dims=case.in_dims, backend=backend, dynamic=False)
    with pytest.raises(DPCompileError, match=f"(?s){case.refused}") as caught:
        train_step(private, args, kwargs, PseudoLoss(BATCH, case.out_dim))
        record(case, "wrong")
    assert "what to do: " in str(caught.value)
    if case.family == "mixing":
        assert_line_of(case.make, str(caught.value))
    record(case, "refused")


def assert_line_of(source: Any, message: str) -> None:
    """The message names the file of ``source`` and a line inside it."""
    lines, first = inspect.getsourcelines(source)
    name = re.escape(inspect.getsourcefile(source) or "")
    found = [int(n) for n in re.findall(rf"{name}:(\d+)", message)]
    assert any(first <= n < first + len(lines) for n in found), (
        f"no line of {first}..{first + len(lines) - 1}: {message}"
    )


# Refused for what they keep, or for what one row of a parameter means: these gradients do not show it.
NOT_BETWEEN_GRADIENTS = (
    "RunningMean", "RunningMeanByData", "MovingCodebook", "RenormedTable", "RowsOfItsOwn",
    "HookedGradient",  # one example's loss alone has one example's gradient to divide by
)  # fmt: skip


MIXING = [c for c in ALL if c.family == "mixing" and c.name != "Prototype"]  # which has no loss per example


@pytest.mark.parametrize("case", MIXING, ids=lambda c: c.name)
def test_mixing_model_mixes(case: Case) -> None:
    """The plain model: what other examples are changes an example's loss or gradient."""
    torch.manual_seed(1)
    model = case.make()
    assert any(_meets(model, case) for _ in range(8)) == (case.name not in NOT_BETWEEN_GRADIENTS)


def _meets(model: nn.Module, case: Case) -> bool:
    args, others = case.call(BATCH)[0], case.call(BATCH)[0]
    for example in range(BATCH):
        row = torch.arange(BATCH) == example
        mixed = [torch.where(row.view(-1, *[1] * (a.ndim - 1)), a, o) for a, o in zip(args, others, strict=True)]
        found, wanted = (_loss_and_gradients(copy.deepcopy(model), x, example) for x in (args, mixed))
        if not torch.allclose(found, wanted, equal_nan=True):
            return True
    return False


def _loss_and_gradients(model: nn.Module, args: Any, example: int) -> torch.Tensor:
    torch.manual_seed(2)
    output = model(*args)
    loss = PseudoLoss(BATCH)(output, slice(None))[example]
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([loss.detach().reshape(1), *(g.flatten() for g in gradients if g is not None)])
