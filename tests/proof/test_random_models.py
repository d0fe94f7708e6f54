"""Random small modules: right as the oracle says, or refused; never a third outcome."""

from __future__ import annotations

import copy
import os
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from random_models import FAIR, MIXING, TOKENS, Program, Step
from sampled import SAMPLED

import dpcompile
from dpcompile import DPCompileError
from dpcompile.graph.labels import Examples
from dpcompile.module import engine_of

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have
EXAMPLES = int(os.environ.get("DPCOMPILE_EXAMPLES", 60 if SAMPLED else 300))
number = st.integers(0, 11)
steps = st.tuples(st.sampled_from(sorted(FAIR)), number, number)
programs = st.tuples(
    st.lists(steps, min_size=1, max_size=6),
    st.one_of(st.none(), st.none(), st.tuples(st.sampled_from(sorted(MIXING)), number, number, st.integers(0, 6))),
).map(lambda p: p[0] if p[1] is None else [*p[0][: p[1][3]], p[1][:3], *p[0][p[1][3] :]])


def outcome_of(
    program: list[Step],
    sizes: tuple[int, int, int],
    axis: int,
    frozen: int,
    norm: str,
    reduction: str,
    dynamic: bool,
) -> str | None:
    """Raises AssertionError where the model is neither right nor refused; None where there is nothing to train."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    batch, positions, width = sizes
    model = Program(program, axis, frozen)
    x = torch.randn(batch, positions, width, dtype=torch.float64).transpose(0, axis).contiguous()
    ids = torch.randint(0, TOKENS, (batch, positions))
    applied = model.build(x, ids)
    mixes = bool(applied & set(MIXING))
    output = model(x, ids)
    if not output.requires_grad:
        return None
    loss = PseudoLoss(batch, model.out_axis)
    gradients = per_example_gradients(model, (x, ids), {}, loss, in_dims=(axis, 0))
    norms = clip(gradients, 1.0).norms
    if not torch.isfinite(norms).all() or norms.max() > 1e6:
        return None
    bound = max(norms.median().item(), 1e-3)
    try:
        private = dp_compile(
            copy.deepcopy(model), max_grad_norm=bound, norm=norm, in_dims=(axis, 0), loss_reduction=reduction,
            backend="eager", dynamic=dynamic,
        )  # fmt: skip
        train_step(private, (x, ids), {}, loss, reduction=reduction)
    except DPCompileError as error:
        assert str(error).count("what to do: ") == 1
        if not mixes and os.environ.get("DPCOMPILE_VERBOSE"):
            print("refused", program, sizes, axis, norm, dynamic, "\n  ", str(error).replace("\n", "\n   "))
        return "refused, mixing" if mixes else "refused, though nothing mixes"
    transformed = engine_of(private).transformed
    assert transformed is not None
    (label,) = transformed.output_labels
    if "swapped_rows" in applied and label != Examples(model.out_axis):
        # The sizes made it a transpose, which is followed: the examples lie elsewhere than this loss takes them to be.
        return "the examples moved"
    assert_right(private, clip(gradients, bound), 1e-6)
    return "right, though an operation mixes" if mixes else "right"


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
@given(
    program=programs,
    sizes=st.tuples(st.integers(2, 5), st.sampled_from([2, 3, 4]), st.sampled_from([2, 3, 4, 6])),
    axis=st.sampled_from([0, 0, 1]),
    frozen=st.integers(0, 7),
    norm=st.sampled_from(["auto", "auto", "ghost", "instantiate", "redo", "direct"]),
    reduction=st.sampled_from(["mean", "sum"]),
    dynamic=st.sampled_from([False, False, False, True]),
)
def right_or_refused(outcomes: Counter[str], **drawn: Any) -> None:
    outcome = outcome_of(**drawn)
    assume(outcome is not None)
    outcomes[str(outcome)] += 1


def test_right_or_refused(drawn: Counter[str]) -> None:
    """Every program drawn; and refusing everything is no way to pass."""
    right_or_refused(drawn)
    fair_ones = drawn["right"] + drawn["refused, though nothing mixes"]
    assert drawn["right"] >= 0.8 * fair_ones, dict(drawn)
    assert drawn["refused, mixing"] >= 0.8 * (drawn["refused, mixing"] + drawn["right, though an operation mixes"])


def run_one(*program: Step) -> str | None:
    """One program by hand, nothing frozen."""
    return outcome_of(list(program), (3, 4, 4), 0, -1, "auto", "mean", False)


@pytest.mark.parametrize("name", sorted(FAIR))
def test_every_fair_operation_alone_is_right(name: str) -> None:
    """Between two layers; none of them is refused."""
    assert run_one(("linear", 2, 0), (name, 1, 1), (name, 2, 4), ("linear", 1, 1), ("scale", 0, 0)) == "right"


@pytest.mark.parametrize("name", sorted(MIXING))
def test_every_mixing_operation_alone_is_refused(name: str) -> None:
    for a in range(8 if name == "along_the_examples" else 2):
        assert run_one(("linear", 2, 0), (name, a, 1), ("linear", 1, 1)) == "refused, mixing", a
