"""More random programs: writes in place, row numbers, casts of indices, dtype views, custom Functions, buffers.

Each is right as one backward per example says, and stays right when the examples change places or one of them is taken
out of the batch; or it is refused. ``python tests/proof/test_random_programs.py --seeds 0 3000`` runs many.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from random_models import FAIR as PLAIN_FAIR
from random_models import MIXING as PLAIN_MIXING
from random_models import TOKENS, Operation, Program, State, Step
from sampled import SAMPLED
from torch import Tensor

import dpcompile
from dpcompile import DPCompileError
from dpcompile.graph.labels import Examples
from dpcompile.module import engine_of

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have

SHARE_OF_CI = 20 if SAMPLED else 60
FAIR: dict[str, Operation] = {}
BY_ROW: dict[str, Operation] = {}


def fair(operation: Operation) -> Operation:
    FAIR[operation.__name__] = operation
    return operation


def by_row(operation: Operation) -> Operation:
    BY_ROW[operation.__name__] = operation
    return operation


def along(n: Tensor, d: int, ndim: int) -> Tensor:
    """A vector on dimension ``d`` of ``ndim``."""
    return n.view([-1 if k == d else 1 for k in range(ndim)])


# --- operations on single examples ------------------------------------------------------------------------------------


@fair
def written_in_place(s: State, a: int, b: int) -> None:
    """A chain of views of a copy, and writes to all of them."""
    d = s.pick(a)
    y = s.x.clone()
    if d is not None and y.shape[d] > 1:
        part = y.narrow(d, b % 2, y.shape[d] - 1)
        part.mul_(0.5)
        (part.transpose(0, part.ndim - 1) if a % 2 else part.select(d, 0)).add_(0.25)
    (y.tanh_, y.relu_, lambda: y.add_(1.0), lambda: y.clamp_(-1, 1))[b % 4]()
    s.x = y


@fair
def written_through_a_view(s: State, a: int, b: int) -> None:
    y = s.x * 1.0
    z = y.unsqueeze(0).transpose(0, -1)
    z.mul_(s.weight(slot=b))
    if a % 2:
        z.squeeze(-1).sub_(0.1)
    s.x = y


@fair
def filled_in_place(s: State, a: int, b: int) -> None:
    d = s.pick(a)
    if d is not None and s.x.shape[d] > 1:
        y = torch.zeros_like(s.x) if b % 2 else torch.empty_like(s.x).fill_(0.5)
        y.narrow(d, 0, 1).copy_(s.x.narrow(d, 1, 1))
        y.narrow(d, 1, s.x.shape[d] - 1).add_(s.x.narrow(d, 0, s.x.shape[d] - 1))
        s.x = y


@fair
def masked_in_place(s: State, a: int, b: int) -> None:
    y = s.x + 0.0
    if a % 2:
        y[y < 0] = 0.1
    else:
        y.masked_fill_(y.detach() > 0.5, 0.25)
    s.x = y


@fair
def looked_up_by_casts(s: State, a: int, b: int) -> None:
    """Token numbers that went through other dtypes."""
    if s.axis == s.x.ndim - 1:
        return
    ids = s.ids.to((torch.int32, torch.uint8, torch.float16, torch.int8, torch.bfloat16)[a % 5])
    table = s.weight(TOKENS, s.x.shape[-1], slot=b)
    rows = (F.embedding(ids.long(), table) if b % 2 else table[ids.to(torch.int32).long()]).amax(1)
    shape = [1] * s.x.ndim
    shape[s.axis], shape[-1] = rows.shape
    s.x = s.x + rows.view(shape)


@fair
def signs_by_bits(s: State, a: int, b: int) -> None:
    """The sign bit, read through a view as integers."""
    bits = s.x.detach().float().contiguous().view(torch.int32) if a % 2 else s.x.detach().clone().view(torch.int64)
    s.x = torch.where(bits < 0, s.x * 0.3, s.x)


@fair
def picked_by_itself(s: State, a: int, b: int) -> None:
    """Each example's own position, as advanced indexing wants it."""
    y = s.x.movedim(s.axis, 0)
    if y.ndim < 2:
        return
    own = torch.arange(len(y)).to((torch.int64, torch.int32)[a % 2])
    pick = s.ids[:, 0] % y.shape[1]
    if b % 3 == 0:
        y = y * 1.0
        y[own, pick] = 0.5
    elif b % 3 == 1:
        y = y + y[own, pick].unsqueeze(1)
    else:
        y = torch.zeros_like(y).index_put((own, pick), y[own, 0], accumulate=bool(a % 2))
    s.x = y.movedim(0, s.axis)


@fair
def added_within(s: State, a: int, b: int) -> None:
    """Scatter and index additions along other dimensions."""
    d = s.pick(a)
    if d is None:
        return
    n = s.x.shape[d]
    to = (torch.arange(n) * 2) % n
    if b % 2:
        s.x = torch.zeros_like(s.x).index_add(d, to, s.x)
    else:
        s.x = torch.zeros_like(s.x).scatter_add(d, along(to, d, s.x.ndim).expand_as(s.x), s.x)


@fair
def masked_by_lengths(s: State, a: int, b: int) -> None:
    d = s.pick(a)
    if d is not None:
        lengths = along(s.ids[:, 0] % s.x.shape[d] + 1, s.axis, s.x.ndim)
        inside = along(torch.arange(s.x.shape[d]), d, s.x.ndim) < lengths
        s.x = s.x.masked_fill(~inside, 0.0) if b % 2 else torch.where(inside, s.x, s.x * 0.1)


@fair
def pooled(s: State, a: int, b: int) -> None:
    if s.axis == 0 and s.x.ndim == 3 and s.x.shape[-1] > 2:
        pools = (
            lambda x: F.max_pool1d(x, 2, 1), lambda x: F.avg_pool1d(x, 3, 1, padding=1),
            lambda x: F.adaptive_avg_pool1d(x, 2), lambda x: F.pad(x, (1, 0), "replicate"),
            lambda x: F.interpolate(x, scale_factor=2.0), lambda x: F.pad(x, (0, 1), value=0.3),
        )  # fmt: skip
        s.x = pools[b % 6](s.x)


@fair
def of_images(s: State, a: int, b: int) -> None:
    if s.axis == 0 and s.x.ndim == 3:
        s.x = F.conv2d(s.x.unsqueeze(1), s.weight(2, 1, 3, 3, slot=b), s.weight(2, slot=b), padding=1)
        s.x = s.x.amax(1) if a % 2 else s.x.flatten(1, 2)


@fair
def laid_out_anew(s: State, a: int, b: int) -> None:
    d = a % s.x.ndim
    s.x = s.x.transpose(0, d).contiguous().transpose(0, d) if b % 2 else s.x.movedim(d, -1).clone().movedim(-1, d)


@fair
def narrower_and_back(s: State, a: int, b: int) -> None:
    s.x = s.x + s.x.detach().to((torch.float32, torch.bfloat16, torch.float16)[a % 3]).to(s.x.dtype) * 0.1


class Reversal(torch.autograd.Function):
    """Linear in its cotangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return g[0] * -0.7


class StraightThrough(torch.autograd.Function):
    """Its cotangent where the value was small."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() < 1, g[0], 0.0) if g[0].ndim % 2 else g[0] * (x.abs() < 1)


class Bounded(torch.autograd.Function):
    """Not linear in its cotangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return g[0].clamp(-0.02, 0.02) if g[0].ndim % 2 else g[0].sign() * 0.1


@fair
def function_of_its_own(s: State, a: int, b: int) -> None:
    s.x = (Reversal if a % 2 else StraightThrough).apply(s.x)  # type: ignore[assignment]


@fair
def nonlinear_backward(s: State, a: int, b: int) -> None:
    s.x = Bounded.apply(s.x)  # type: ignore[assignment]


@fair
def positions(s: State, a: int, b: int) -> None:
    """Of any other dimension, expanded over the batch in several ways."""
    d = s.pick(a)
    if d is None:
        return
    ramp = along(torch.arange(s.x.shape[d], dtype=s.x.dtype), d, s.x.ndim) * 0.1
    s.x = s.x + (
        ramp.expand_as(s.x).contiguous() if b % 3 == 0 else ramp if b % 3 == 1 else torch.ones_like(s.x) * ramp
    )


@fair
def flat_positions(s: State, a: int, b: int) -> None:
    """Positions within an example, where the batch is flattened."""
    if s.axis == 0 and s.x.ndim == 3:
        n, t, d = s.x.shape
        p = s.weight(t, d, slot=b)
        table = p.repeat(n, 1) if a % 2 else p[torch.arange(n * t) % t]
        s.x = (s.x.reshape(n * t, d) + table).view(n, t, d)


# --- values that go by the row number ---------------------------------------------------------------------------------


def rows(s: State, n: Tensor) -> Tensor:
    """A vector ``[B]`` along the examples."""
    return along(n.to(s.x.dtype), s.axis, s.x.ndim)


@by_row
def numbered(s: State, a: int, b: int) -> None:
    n = s.x.shape[s.axis]
    numbers = (
        lambda: torch.arange(n), lambda: torch.linspace(0, 1, n), lambda: torch.ones(n).cumsum(0),
        lambda: torch.arange(n).flip(0), lambda: torch.arange(n) % 2, lambda: torch.arange(n) < n // 2,
        lambda: torch.eye(n)[0], lambda: torch.tril(torch.ones(n, n)).sum(0), lambda: torch.arange(2 * n)[::2],
        lambda: torch.arange(n).roll(1), lambda: torch.arange(n).to(torch.bfloat16), lambda: torch.arange(n) == 0,
    )[b % 12]()  # fmt: skip
    s.x = (
        lambda: s.x + rows(s, numbers), lambda: s.x * rows(s, numbers + 1),
        lambda: s.x + rows(s, numbers).expand_as(s.x), lambda: torch.where(rows(s, numbers) > 0, s.x, s.x * 0.5),
    )[a % 4]()  # fmt: skip


@by_row
def table_of_rows(s: State, a: int, b: int) -> None:
    n, width = s.x.shape[s.axis], s.x.shape[-1]
    if s.axis == s.x.ndim - 1:
        return
    table = torch.arange(1.0, 16 * width + 1, dtype=s.x.dtype).view(16, width).sin()
    of_rows = (table[:n], table[torch.arange(n)], F.embedding(torch.arange(n), table), table[1 : n + 1])[b % 4]
    shape = [1] * s.x.ndim
    shape[s.axis], shape[-1] = n, width
    s.x = s.x + of_rows.view(shape)


@by_row
def triangle_of_rows(s: State, a: int, b: int) -> None:
    y = s.x.movedim(s.axis, 0).reshape(s.x.shape[s.axis], -1)
    y = y.tril(b % 2) if a % 2 else y * torch.ones_like(y).triu()
    s.x = y.view_as(s.x.movedim(s.axis, 0)).movedim(0, s.axis)


@by_row
def another_picked(s: State, a: int, b: int) -> None:
    n = s.x.shape[s.axis]
    own = torch.arange(n)
    index = (
        lambda: own.clamp(max=max(n - 2, 0)), lambda: own % max(n - 1, 1), lambda: own.flip(0), lambda: own // 2,
        lambda: torch.arange(1).expand(n), lambda: own.view(torch.float64).long(), lambda: own.roll(1),
    )[b % 7]()  # fmt: skip
    s.x = s.x.movedim(s.axis, 0)[index].movedim(0, s.axis)


@by_row
def written_by_row(s: State, a: int, b: int) -> None:
    y = s.x * 1.0
    first = y.narrow(s.axis, 0, 1) if a % 2 else y.select(s.axis, -1)
    first.mul_(0.5) if b % 2 else first.fill_(0.1)
    s.x = y


# --- programs ---------------------------------------------------------------------------------------------------------


class WideProgram(Program):
    """Operations of both files."""

    def operation(self, name: str) -> Operation:
        """By name."""
        return FAIR.get(name) or BY_ROW.get(name) or PLAIN_FAIR.get(name) or PLAIN_MIXING[name]


def drawn(seed: int) -> tuple[list[Step], dict[str, Any]]:
    """A program, and the way in which it is run."""
    r = random.Random(seed)
    steps = []
    for _ in range(r.randint(1, 6)):
        table = FAIR if r.random() < 0.6 else PLAIN_FAIR
        steps.append((r.choice(sorted(table)), r.randrange(12), r.randrange(12)))
    if r.random() < 0.25:
        table = BY_ROW if r.random() < 0.7 else PLAIN_MIXING
        steps.insert(r.randint(0, len(steps)), (r.choice(sorted(table)), r.randrange(12), r.randrange(12)))
    steps.insert(r.randint(0, len(steps)), ("linear", r.randrange(12), r.randrange(12)))
    return steps, {
        "sizes": (r.choice([1, 2, 3, 5, 7, 8]), r.choice([2, 3, 4, 5]), r.choice([2, 3, 4, 6])),
        "axis": r.choice([0, 0, 1]),
        "frozen": r.randrange(8),
        "norm": r.choice(["auto", "auto", "ghost", "instantiate", "redo", "direct"]),
        "reduction": r.choice(["mean", "sum"]),
        "dynamic": r.random() < 0.25,
    }


class OfRows:
    """The loss of some of the examples, or of all in another order."""

    def __init__(self, loss: PseudoLoss, order: Tensor) -> None:
        self.loss, self.order = loss, order

    def __call__(self, output: Any, _: slice) -> Tensor:
        return self.loss(output, self.order)  # type: ignore[arg-type]


def outcome_of(
    steps: list[Step], *, sizes: Any, axis: int, frozen: int, norm: str, reduction: str, dynamic: bool
) -> str | None:
    """Raises AssertionError where a program is neither right nor refused; None where there is nothing to train."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    batch, length, width = sizes
    model = WideProgram(steps, axis, frozen)
    x = torch.randn(batch, length, width, dtype=torch.float64).transpose(0, axis).contiguous()
    ids = torch.randint(0, TOKENS, (batch, length))
    applied = model.build(x, ids)
    mixes = bool(applied & (set(PLAIN_MIXING) | set(BY_ROW)))
    if not model(x, ids).requires_grad:
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
        assert str(error).count("what to do: ") == 1, error
        return f"refused, {'mixing' if mixes else 'though nothing mixes'}"
    transformed = engine_of(private).transformed
    assert transformed is not None
    if batch > 1 and "swapped_rows" in applied and transformed.output_labels[0] != Examples(model.out_axis):
        return "the examples moved"  # the sizes made it a transpose: they lie elsewhere than this loss takes them to be
    truth = clip(gradients, bound)
    assert_right(private, truth, 1e-6)
    if batch > 1:
        order = torch.arange(batch).roll(1)
        _rerun(private, (x, ids), axis, loss, order, reduction)
        assert_right(private, clip({n: g[order] for n, g in gradients.items()}, bound), 1e-6)
    if batch > 2 and dynamic:
        order = torch.arange(1, batch)
        _rerun(private, (x, ids), axis, loss, order, reduction)
        assert_right(private, clip({n: g[order] for n, g in gradients.items()}, bound), 1e-6)
    return "right, though an operation mixes" if mixes else "right"


def _rerun(private: Any, inputs: Any, axis: int, loss: PseudoLoss, order: Tensor, reduction: str) -> None:
    """The examples in another order, or without one of them."""
    x, ids = inputs
    private.zero_grad()
    train_step(private, (x.index_select(axis, order), ids[order]), {}, OfRows(loss, order), reduction=reduction)


def run(seed: int, outcomes: Counter[str]) -> None:
    """One program; says which, where it is wrong."""
    steps, options = drawn(seed)
    try:
        outcomes[str(outcome_of(steps, **options))] += 1
    except Exception as error:
        raise AssertionError(f"seed {seed}: {steps} {options}: {type(error).__name__}: {error}") from error


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_random_programs() -> None:
    """A share of what the command runs; refusing everything is no way to pass."""
    outcomes: Counter[str] = Counter()
    for seed in range(SHARE_OF_CI):
        run(seed, outcomes)
    assert outcomes["right"] >= 0.4 * SHARE_OF_CI, dict(outcomes)
    assert outcomes["right, though an operation mixes"] <= 0.2 * outcomes["refused, mixing"] + 4, dict(outcomes)


ALONE = {"sizes": (3, 4, 4), "axis": 0, "frozen": -1, "norm": "auto", "reduction": "sum", "dynamic": False}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", sorted(FAIR))
def test_every_fair_operation_alone_is_right(name: str) -> None:
    """None of them is refused."""
    assert outcome_of([("linear", 2, 0), (name, 1, 1), (name, 2, 4), ("linear", 1, 1)], **ALONE) == "right"


@pytest.mark.parametrize("name", sorted(BY_ROW))
def test_every_operation_by_row_is_refused(name: str) -> None:
    """In all its forms."""
    for b in range(12 if name == "numbered" else 7 if name == "another_picked" else 4):
        steps = [("linear", 2, 0), (name, b, b), ("linear", 1, 1)]
        assert outcome_of(steps, **ALONE) == "refused, mixing", b


def main() -> None:
    """Count the outcomes of many programs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 3000), metavar=("FROM", "TO"))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    outcomes: Counter[str] = Counter()
    wrong, start, seed = [], time.monotonic(), options.seeds[0]
    for seed in range(*options.seeds):
        if time.monotonic() - start > options.seconds:
            break
        try:
            run(seed, outcomes)
        except AssertionError as error:
            wrong.append(seed)
            print("WRONG", error, flush=True)
        if seed % 100 == 99:
            print(seed + 1, dict(outcomes), "wrong:", wrong, flush=True)
    accepted = sum(n for kind, n in outcomes.items() if kind.startswith("right"))
    print(f"seeds {options.seeds[0]} to {seed}: {accepted} accepted and right, {len(wrong)} wrong {wrong}")
    print(dict(outcomes))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
