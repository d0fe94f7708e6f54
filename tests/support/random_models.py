"""Operations that random models and programs are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = 5
# An operation takes the state and two numbers that it may use for its choices. It leaves the state alone where it does
# not apply. The example axis is dimension ``state.axis`` of ``state.x``; no operation may use its size as a number.
Operation = Callable[["State", int, int], None]
FAIR: dict[str, Operation] = {}
MIXING: dict[str, Operation] = {}


@dataclass
class State:
    """The value on its way through the module."""

    x: Tensor
    axis: int
    ids: Tensor  # [B, T]
    weight: Callable[..., Tensor]  # shape, slot -> parameter
    seen: list[Tensor] = field(default_factory=list)

    def others(self) -> list[int]:
        """Dimensions without the examples."""
        return [d for d in range(self.x.ndim) if d != self.axis]

    def pick(self, number: int) -> int | None:
        others = self.others()
        return others[number % len(others)] if others else None


def fair(operation: Operation) -> Operation:
    FAIR[operation.__name__] = operation
    return operation


def mixing(operation: Operation) -> Operation:
    MIXING[operation.__name__] = operation
    return operation


# --- operations on single examples ------------------------------------------------------------------------------------


@fair
def linear(s: State, a: int, b: int) -> None:
    """Along the last dimension; few widths, so that weights are met again."""
    if s.axis != s.x.ndim - 1:
        width = (2, 3, 4)[a % 3] if s.x.shape[-1] < 12 else 3
        s.x = F.linear(s.x, s.weight(width, s.x.shape[-1], slot=b), s.weight(width, slot=b) if b % 2 else None)


@fair
def square_layer(s: State, a: int, b: int) -> None:
    """A layer from a width to itself, sometimes transposed, sometimes added to its input."""
    if s.axis != s.x.ndim - 1:
        w = s.weight(s.x.shape[-1], s.x.shape[-1], slot=b)
        y = F.linear(s.x, w.t() if a % 2 else w)
        s.x = s.x + y.tanh() if a % 3 == 0 else y


@fair
def matmul_on_the_left(s: State, a: int, b: int) -> None:
    """Along the last dimension but one, wherever the examples are."""
    if s.x.ndim >= 2 and s.axis != s.x.ndim - 2:
        s.x = s.weight(3, s.x.shape[-2], slot=a) @ s.x


@fair
def einsum_with_two_dimensions(s: State, a: int, b: int) -> None:
    if s.axis == 0 and s.x.ndim == 3:
        w = s.weight(s.x.shape[1], s.x.shape[2], 2, slot=b)
        s.x = torch.einsum("btd,tdk->btk" if a % 2 else "btd,tdk->bk", s.x, w)


@fair
def einsum_per_position(s: State, a: int, b: int) -> None:
    if s.axis == 0 and s.x.ndim == 3:
        s.x = torch.einsum("btd,tdk->btk", s.x, s.weight(s.x.shape[1], s.x.shape[2], 3, slot=b))


@fair
def bilinear(s: State, a: int, b: int) -> None:
    if s.axis == 0 and s.x.ndim == 3:
        s.x = torch.einsum("btd,de,bse->bts", s.x, s.weight(s.x.shape[2], s.x.shape[2], slot=b), s.x)


@fair
def scale(s: State, a: int, b: int) -> None:
    """By a vector along some dimension, or by a scalar."""
    d = s.pick(a)
    if d is None or b % 4 == 0:
        s.x = s.x * s.weight(slot=b)
    else:
        w = s.weight(s.x.shape[d], slot=b)
        w = w.sigmoid() if b % 4 == 1 else w.softmax(0) if b % 4 == 2 else w
        s.x = s.x * w.view([-1 if k == d else 1 for k in range(s.x.ndim)])


@fair
def add(s: State, a: int, b: int) -> None:
    """Positions: a table over one dimension and all later ones."""
    d = s.pick(a)
    if d is not None and d > s.axis:
        s.x = s.x + s.weight(*s.x.shape[d:], slot=b)


@fair
def layer_norm(s: State, a: int, b: int) -> None:
    if s.axis != s.x.ndim - 1 and s.x.shape[-1] > 2:
        n = s.x.shape[-1]
        s.x = F.layer_norm(s.x, (n,), s.weight(n, slot=a), s.weight(n, slot=b))


@fair
def convolution(s: State, a: int, b: int) -> None:
    if s.axis == 0 and s.x.ndim == 3:
        groups = 2 if s.x.shape[1] % 2 == 0 and a % 2 else 1
        w = s.weight(4, s.x.shape[1] // groups, 2, slot=b)
        s.x = F.conv1d(s.x, w, padding=1, stride=1 + b % 2, groups=groups)


@fair
def embedding(s: State, a: int, b: int) -> None:
    """Add the tokens' mean embedding; the table may be the weight of a linear layer too."""
    if s.axis == s.x.ndim - 1:
        return
    rows = F.embedding(s.ids, s.weight(TOKENS, s.x.shape[-1], slot=a)).mean(1)  # [B, d]
    shape = [1] * s.x.ndim
    shape[s.axis], shape[-1] = rows.shape
    s.x = s.x + rows.view(shape)


@fair
def tied_head(s: State, a: int, b: int) -> None:
    if s.axis != s.x.ndim - 1:
        s.x = F.linear(s.x, s.weight(TOKENS, s.x.shape[-1], slot=a))


@fair
def attention(s: State, a: int, b: int) -> None:
    if s.axis == 0 and s.x.ndim == 3:
        q = F.linear(s.x, s.weight(s.x.shape[-1], s.x.shape[-1], slot=a)) if b % 2 else s.x
        if b % 3 == 0:
            s.x = F.scaled_dot_product_attention(q[:, None], s.x[:, None], s.x[:, None])[:, 0]
        else:
            s.x = (q @ s.x.mT).softmax(-1) @ s.x


@fair
def nonlinear(s: State, a: int, b: int) -> None:
    s.x = (torch.tanh, torch.relu, torch.sigmoid, F.gelu, torch.sin, lambda x: x * x * 0.3, F.silu)[a % 7](s.x)


@fair
def permute(s: State, a: int, b: int) -> None:
    """Two dimensions change places; the examples may be one of them."""
    i, j = a % s.x.ndim, b % s.x.ndim
    s.axis = {i: j, j: i}.get(s.axis, s.axis)
    s.x = s.x.transpose(i, j)


@fair
def flatten(s: State, a: int, b: int) -> None:
    d = a % s.x.ndim
    if d + 1 < s.x.ndim and s.axis not in (d, d + 1) and s.x.ndim > 2:
        s.x = s.x.flatten(d, d + 1)
        s.axis -= s.axis > d


@fair
def unflatten(s: State, a: int, b: int) -> None:
    d = s.pick(a)
    if d is not None and s.x.shape[d] % 2 == 0 and s.x.ndim < 4:
        s.x = s.x.unflatten(d, (2, -1))
        s.axis += s.axis > d


@fair
def folded_into_the_batch(s: State, a: int, b: int) -> None:
    """A neighbouring dimension joins the examples for one layer, from either side."""
    d = s.axis
    if s.x.ndim != 3 or d == 2:
        return
    x = s.x if a % 2 else s.x.transpose(0, 1)
    n = x.shape[:2]
    y = F.linear(x.reshape(-1, x.shape[2]), s.weight(3, x.shape[2], slot=b))
    y = y.tanh().view(*n, 3)
    s.x = y if a % 2 else y.transpose(0, 1)


@fair
def reduce(s: State, a: int, b: int) -> None:
    d = s.pick(a)
    if d is not None and s.x.ndim > 2:
        s.x = (torch.sum, torch.mean, torch.amax, torch.logsumexp, torch.var)[b % 5 if s.x.shape[d] > 1 else 0](s.x, d)
        s.axis -= s.axis > d


@fair
def along(s: State, a: int, b: int) -> None:
    d = s.pick(a)
    if d is None:
        return
    x = s.x
    s.x = (
        lambda: x.softmax(d), lambda: x.cumsum(d), lambda: x.flip(d), lambda: x.roll(1, d), lambda: x.sort(d).values,
        lambda: x - x.mean(d, keepdim=True), lambda: x / (1 + x.abs().amax(d, keepdim=True)), lambda: x.log_softmax(d),
    )[b % 8]()  # fmt: skip


@fair
def window(s: State, a: int, b: int) -> None:
    d = s.pick(a)
    if d is not None and s.x.shape[d] > 1:
        n = s.x.shape[d]
        s.x = s.x.narrow(d, b % 2, n - 1) if b % 3 else torch.cat([s.x, s.x.narrow(d, 0, 1) * 0.5], d)


@fair
def outer_product(s: State, a: int, b: int) -> None:
    if s.axis != s.x.ndim - 1 and s.x.shape[-1] <= 4:
        s.x = (s.x[..., :, None] * s.x[..., None, :]).sum(-1 if a % 2 else -2)


@fair
def own_branch(s: State, a: int, b: int) -> None:
    """Something of before comes back: a skip connection, a detached one, a gate."""
    for old in s.seen:
        if old.shape == s.x.shape:
            s.x = (s.x + old, s.x + old.detach(), s.x * old.sigmoid())[a % 3]
            return


@fair
def stacked_twice(s: State, a: int, b: int) -> None:
    """Two batches in one, and apart again."""
    y = torch.cat([s.x, s.x * 0.5], s.axis).unflatten(s.axis, (2, -1))
    s.x = y.sum(s.axis) if a % 2 else y.select(s.axis, 1) * 2


@fair
def rows_by_own_order(s: State, a: int, b: int) -> None:
    d = s.pick(a)
    if d is not None:
        s.x = s.x.gather(d, s.x.argsort(d)) if b % 2 else torch.where(s.x > 0, s.x, s.x * 0.1)


@fair
def constant(s: State, a: int, b: int) -> None:
    d = s.pick(a)
    if d is not None:
        n = s.x.shape[d]
        ramp = torch.arange(n, dtype=s.x.dtype).view([-1 if k == d else 1 for k in range(s.x.ndim)])
        s.x = s.x + ramp * 0.1 if b % 2 else s.x.index_select(d, torch.arange(n).flip(0))


# --- operations that mix examples -------------------------------------------------------------------------------------


@mixing
def centred(s: State, a: int, b: int) -> None:
    s.x = s.x - s.x.mean(s.axis, keepdim=True) if a % 2 else s.x - s.x.detach().mean(s.axis, keepdim=True)


@mixing
def along_the_examples(s: State, a: int, b: int) -> None:
    x, d = s.x, s.axis
    s.x = (
        lambda: x.softmax(d), lambda: x.cumsum(d), lambda: x + x.flip(d), lambda: x + x.roll(1, d),
        lambda: x.sort(d).values, lambda: x / (1 + x.abs().amax(d, keepdim=True)), lambda: x / (1 + x.abs().sum()),
        lambda: x - x.logsumexp(d, keepdim=True),
    )[a % 8]()  # fmt: skip


@mixing
def one_for_everyone(s: State, a: int, b: int) -> None:
    first = s.x.narrow(s.axis, 0, 1) if a % 2 else s.x.select(s.axis, -1).unsqueeze(s.axis)
    s.x = s.x + first if b % 2 else s.x * first.sigmoid()


@mixing
def swapped_rows(s: State, a: int, b: int) -> None:
    """A reshape takes other dimensions for the examples."""
    d = s.pick(a)
    if d is not None:
        s.x = s.x.movedim(s.axis, d).reshape(s.x.shape)


@mixing
def permuted(s: State, a: int, b: int) -> None:
    order = torch.arange(s.x.shape[s.axis] - 1, -1, -1)
    s.x = s.x + (s.x.index_select(s.axis, order) if a % 2 else s.x.movedim(s.axis, 0)[order].movedim(0, s.axis))


@mixing
def similarity(s: State, a: int, b: int) -> None:
    flat = s.x.movedim(s.axis, 0).reshape(s.x.shape[s.axis], -1)
    weights = (flat @ flat.T).softmax(-1)
    s.x = (weights @ flat).view_as(s.x.movedim(s.axis, 0)).movedim(0, s.axis)


@mixing
def counted(s: State, a: int, b: int) -> None:
    s.x = s.x / (1 + (s.x > 0).sum())


# --- the module -------------------------------------------------------------------------------------------------------

Step = tuple[str, int, int]


class Program(nn.Module):
    """Runs a list of operations on ``x`` ``[B, T, d]`` (or ``[T, B, d]``) and ``ids`` ``[B, T]``."""

    def __init__(self, steps: list[Step], axis: int, frozen: int) -> None:
        super().__init__()
        self.steps, self.axis, self.frozen = steps, axis, frozen
        self.weights = nn.ParameterDict()
        self.used: list[str] = []  # the parameter of every look-up, in order
        self.out_axis = 0

    def operation(self, name: str) -> Operation:
        """By name."""
        return FAIR.get(name) or MIXING[name]

    def new_weight(self, *shape: int, slot: int) -> Tensor:
        """Two slots for every shape, so that a second use is likely."""
        name = "w" + "x".join(map(str, shape)) + "_" + "ab"[slot % 2]
        if name not in self.weights:
            value = torch.randn(shape, dtype=torch.float64) / (shape[-1] if shape else 1) ** 0.5
            frozen = self.frozen >= 0 and self.frozen % 4 == len(self.weights) % 4
            self.weights[name] = nn.Parameter(value, requires_grad=not frozen)
        self.used.append(name)
        return self.weights[name]

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        remaining = list(self.used)
        state = State(x, self.axis, ids, lambda *shape, slot: self.weights[remaining.pop(0)])
        for name, a, b in self.steps:
            state.seen.append(state.x)
            self.operation(name)(state, a, b)
        self.out_axis = state.axis
        return state.x

    def build(self, x: Tensor, ids: Tensor) -> set[str]:
        """Make the parameters; returns the operations that did something."""
        applied = set()
        state = State(x, self.axis, ids, self.new_weight)
        with torch.no_grad():
            for name, a, b in self.steps:
                before = state.x
                state.seen.append(before)
                self.operation(name)(state, a, b)
                if state.x is not before:
                    applied.add(name)
        return applied
