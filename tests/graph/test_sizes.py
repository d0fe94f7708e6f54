"""Exact arithmetic on sizes, and the example axis through reshapes, against counting."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv

from dpcompile.graph.labels import Examples, reshape_axis
from dpcompile.graph.sizes import divide, is_one, product, same, same_shape, shape_of, size

b, t, d = sympy.symbols("b t d", positive=True, integer=True)


def test_numbers() -> None:
    for x, y in itertools.product(range(0, 13), range(0, 7)):
        assert divide(x, y) == (x // y if y and x % y == 0 else None)
    assert product([]) == 1 and product([2, 3, b]) == 6 * b
    assert size(sympy.Integer(3)) == 3 and isinstance(size(sympy.Integer(3)), int)
    assert is_one(1) and not is_one(b) and is_one(b / b)


def test_equal_for_every_value() -> None:
    assert same(b * t, t * b) and same(b * (t + 1), b * t + b) and not same(b, t) and not same(b, 2)
    assert same_shape((b, 2 * t), (b, t + t)) and not same_shape((b,), (b, 1))


@pytest.mark.parametrize(
    ("x", "y", "quotient"),
    [
        (b * t, b, t),
        (b * t, b * t, 1),
        (6 * b * t, 2 * t, 3 * b),
        (b * t + b, b, t + 1),
        (b * t + b, t + 1, b),
        (b**2 - 1, b - 1, b + 1),
        (b, 2, None),
        (3 * b, 2, None),
        (b, b * t, None),
        (b + 1, b, None),
        (b * t, t + 1, None),
        (b, t, None),
        (1, b, None),
        (0, b, 0),
        (b, 0, None),
    ],
)
def test_symbols(x: sympy.Expr, y: sympy.Expr, quotient: sympy.Expr | None) -> None:
    found = divide(x, y)
    assert (found is None) == (quotient is None)
    if quotient is not None:
        assert same(found, quotient)  # type: ignore[arg-type]


def test_floor_divisions_stand_for_any_integer() -> None:
    half: Any = FloorDiv(b, 2)
    assert same(divide(half * t, half), t)  # type: ignore[arg-type]
    assert divide(b, half) is None and divide(b * t, half) is None


terms = st.lists(st.tuples(st.integers(-3, 4), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(x=terms, y=terms, values=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=5, max_size=5))
def test_what_divides_divides_for_every_value(x: list, y: list, values: list) -> None:
    """Never a quotient that is wrong for some sizes; a product always divides by its factors."""
    x, y = (sum((c * b**i * t**j for c, i, j in p), start=sympy.Integer(0)) for p in (x, y))  # type: ignore[assignment]
    quotient = divide(x, y)  # type: ignore[arg-type]
    for n, m in values:
        numbers = {b: n, t: m}
        bottom = sympy.sympify(y).subs(numbers)
        if quotient is not None and bottom != 0:
            assert sympy.sympify(quotient).subs(numbers) * bottom == sympy.sympify(x).subs(numbers)
            assert sympy.sympify(quotient).subs(numbers).is_integer
    if y != 0:
        again = divide(sympy.expand(x * y), y)  # type: ignore[operator]
        assert again is not None and same(again, x)  # type: ignore[arg-type]


def test_sizes_of_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        real = torch.zeros(5, 3)
        fake = mode.from_tensor(real)
        assert shape_of(fake) == (5, 3)


# --- reshape ----------------------------------------------------------------------------------------------------------


def owners(shape: tuple[int, ...], axis: Examples, batch: int) -> torch.Tensor:
    """The example that each position of a value belongs to."""
    along = torch.arange(shape[axis.dim]) // int(axis.inner) % batch
    return along.view([-1 if k == axis.dim else 1 for k in range(len(shape))]).expand(shape)


def layouts(shape: tuple[int, ...], batch: int) -> list[Examples]:
    """Every way in which a value of this shape can hold the examples along one dimension."""
    found = []
    for dim, n in enumerate(shape):
        if n % batch == 0:
            rest = n // batch
            found += [Examples(dim, o, rest // o) for o in range(1, rest + 1) if rest % o == 0]
    return found


def factorisations(n: int, length: int) -> list[tuple[int, ...]]:
    if length == 1:
        return [(n,)]
    return [(k, *rest) for k in range(1, n + 1) if n % k == 0 for rest in factorisations(n // k, length - 1)]


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_every_small_reshape(batch: int) -> None:
    """Right where it answers; where it says None there is no answer: all shapes of 24 elements against all others."""
    shapes = [s for n in (1, 2, 3) for s in factorisations(24, n)]
    answered = refused = 0
    for old in shapes:
        for axis in layouts(old, batch):
            whose = owners(old, axis, batch)
            for new in shapes[:: 3 if batch != 2 else 5]:
                wanted = whose.reshape(new)
                found = reshape_axis(axis, old, new, batch)
                if found is not None:
                    answered += 1
                    assert torch.equal(owners(new, found, batch), wanted), (old, axis, new, found)
                    assert found.outer * batch * found.inner == new[found.dim]  # type: ignore[operator]
                else:
                    refused += 1
                    possible = [x for x in layouts(new, batch) if torch.equal(owners(new, x, batch), wanted)]
                    assert not possible, (old, axis, new, possible)
    assert answered > 300 and refused > 100


@pytest.mark.parametrize(
    ("axis", "old", "new", "expected"),
    [
        (Examples(0), (b, t, d), (b * t, d), Examples(0, 1, t)),
        (Examples(0, 1, t), (b * t, d), (b, t, d), Examples(0)),
        (Examples(1), (t, b, d), (t * b, d), Examples(0, t, 1)),
        (Examples(0, t, 1), (t * b, d), (t, b, d), Examples(1)),
        (Examples(0), (b, t, d), (b, t * d), Examples(0)),
        (Examples(0), (b, t, 6), (b, t, 2, 3), Examples(0)),
        (Examples(0), (b, 4 * t), (b * t, 4), Examples(0, 1, t)),
        (Examples(0), (b, t), (t, b), None),
        (Examples(0), (b, t, d), (b * t * d,), Examples(0, 1, t * d)),
        (Examples(1), (2, b, t), (2 * b * t,), Examples(0, 2, t)),
        (Examples(0, 1, t), (b * t, d), (t, b, d), None),
    ],
)
def test_symbolic_reshape(axis: Examples, old: tuple, new: tuple, expected: Examples | None) -> None:
    found = reshape_axis(axis, old, new, b)
    assert (found is None) == (expected is None)
    if expected is None or found is None:
        return
    assert found.dim == expected.dim and found.same_layout(expected)
    for values in ({b: 2, t: 3, d: 4}, {b: 3, t: 3, d: 3}, {b: 4, t: 2, d: 2}):

        def number(x: object, values: dict = values) -> int:
            return int(sympy.Integer(sympy.sympify(x).subs(values)))

        def fixed(x: Examples) -> Examples:
            return Examples(x.dim, number(x.outer), number(x.inner))

        shape, other = tuple(map(number, old)), tuple(map(number, new))
        assert math.prod(shape) == math.prod(other)
        whose = owners(shape, fixed(axis), values[b]).reshape(other)
        assert torch.equal(owners(other, fixed(found), values[b]), whose)
