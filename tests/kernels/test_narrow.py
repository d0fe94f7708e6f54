"""Products of bfloat16 and float16 matrices into float32, with their norms."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpcompile.kernels import build, narrow, product_op
from dpcompile.kernels.narrow import NARROW, has_narrow, narrow_products
from dpcompile.kernels.product_op import product_with_norms
from dpcompile.kernels.rates import rates_for
from dpcompile.kernels.rounding import gamma, unit_of

here = pytest.mark.skipif(not has_narrow(torch.bfloat16), reason="this processor has no narrow products")


def draw(*shape: int, dtype: torch.dtype, turned: bool = False) -> Tensor:
    """Random numbers; turned: the last two axes lie in memory the other way round."""
    values = torch.randn(shape).to(dtype)
    return values.mT.contiguous().mT if turned else values


def within(found: Tensor, rows: Tensor, cols: Tensor) -> bool:
    """Whether float32 sums of exact products can be these."""
    exact, sizes = rows.double().mT @ cols.double(), rows.double().abs().mT @ cols.double().abs()
    return bool(((found.double() - exact).abs() <= gamma(rows.shape[1] + 1, unit_of(torch.float32)) * sizes).all())


@here
@settings(deadline=None, max_examples=25)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 150), st.integers(1, 300)),
    st.tuples(st.booleans(), st.booleans()),
    st.integers(1, 3),
)
def test_products_are_those_of_the_widened_numbers(sizes: Any, turned: tuple[bool, bool], threads: int) -> None:
    """Of all sizes and orders in memory, on any number of threads; norms are those of the result."""
    batch, terms, p, d = sizes
    torch.manual_seed(0)
    rows = draw(batch, terms, p, dtype=torch.bfloat16, turned=turned[0])
    cols = draw(batch, terms, d, dtype=torch.bfloat16, turned=turned[1])
    out, before = torch.full((batch, p, d), torch.nan), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        norms = narrow_products(rows, cols, out)
    finally:
        torch.set_num_threads(before)
    assert norms is not None and within(out, rows, cols)
    torch.testing.assert_close(norms, out.double().square().sum((1, 2)), rtol=1e-13, atol=0)


@here
def test_parts_of_larger_tensors() -> None:
    """Views with gaps, and one example expanded."""
    whole = draw(3, 20, 90, dtype=torch.bfloat16)
    rows, cols = whole[:, ::2, 5:60:2], whole[:, 3:13, 7:].flip(0)
    for left, right in ((rows, cols), (rows[:1].expand(3, -1, -1), cols)):
        out = torch.empty(3, left.shape[2], right.shape[2])
        assert narrow_products(left, right, out) is not None and within(out, left, right)


@here
def test_values_that_are_not_finite_stay_in_their_example() -> None:
    rows, cols, out = draw(3, 9, 20, dtype=torch.bfloat16), draw(3, 9, 30, dtype=torch.bfloat16), torch.empty(3, 20, 30)
    for bad in (torch.nan, torch.inf):
        rows[1, 4, 7] = bad
        norms = narrow_products(rows, cols, out)
        assert norms is not None and norms.isfinite().tolist() == [True, False, True]
        assert out[1].isfinite().sum() < out[1].numel() and out[[0, 2]].isfinite().all()


def test_what_is_not_for_the_kernel() -> None:
    """Two dtypes, wide ones, other devices, and nothing at all."""
    rows, cols, out = draw(2, 3, 4, dtype=torch.bfloat16), draw(2, 3, 5, dtype=torch.bfloat16), torch.empty(2, 4, 5)
    assert narrow_products(rows, cols.half(), out) is None
    assert narrow_products(rows.float(), cols.float(), out) is None
    assert narrow_products(rows[:, :0], cols[:, :0], out) is None
    assert narrow_products(rows.to("meta"), cols.to("meta"), out) is None


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("there", [True, False])
def test_kept_gradients(there: bool, dtype: torch.dtype, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel and without it; their norms are never below those of what is kept."""
    if not there:
        monkeypatch.setattr(narrow, "_LIBRARIES", {})
    rows, cols = draw(3, blocks, 12, 17, dtype=dtype), draw(3, blocks, 12, 19, dtype=dtype)
    each, squared = product_with_norms(rows, cols, True)
    assert each.dtype == torch.float32 and within(each.flatten(0, 1), rows.flatten(0, 1), cols.flatten(0, 1))
    true = each.double().square().sum((1, 2, 3))
    assert ((squared >= true) & (squared <= true * 1.001)).all()
    torch.library.opcheck(product_with_norms, (rows, cols, False))


@pytest.mark.parametrize("dtype", NARROW)
def test_terms_that_cancel_are_added_again(dtype: torch.dtype) -> None:
    """In float64; the norm is that of what is kept then."""
    rows = torch.ones(2, 1, 3, 4, dtype=dtype)
    cols = torch.tensor([[2.0**14, 1.0, -(2.0**14)], [1.0, 2.0, 3.0]]).to(dtype).reshape(2, 1, 3, 1).expand(2, 1, 3, 5)
    cols = cols * torch.tensor([2.0**-2], dtype=dtype)
    rows[0, 0, 1] = 2.0**-12
    each, squared = product_with_norms(rows, cols, False)
    assert torch.equal(each.double(), (rows.double().mT @ cols.double()))
    assert (squared >= each.double().square().sum((1, 2, 3))).all()


@here
@pytest.mark.parametrize("quicker", [True, False])
def test_narrow_products_are_made_where_they_were_measured_to_be_quicker(
    quicker: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, asked = rates_for(torch.device("cpu")), []
    monkeypatch.setattr(product_op, "rates_for", lambda device: replace(known, widened=1e12 if not quicker else 1.0))
    monkeypatch.setattr(product_op, "narrow_products", lambda *given: asked.append(given) or narrow_products(*given))
    rows, cols = draw(2, 1, 5, 4, dtype=torch.bfloat16), draw(2, 1, 5, 3, dtype=torch.bfloat16)
    each, _ = product_with_norms(rows, cols, False)
    assert bool(asked) is quicker and within(each.squeeze(1), rows.squeeze(1), cols.squeeze(1))


@here
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # of torch, whenever the flags are set
def test_without_its_library_products_are_those_of_float32() -> None:
    """Torch's block product refuses where oneDNN is switched off, in every thread: nothing of that comes out."""
    rows, cols, out = draw(4, 9, 70, dtype=torch.bfloat16), draw(4, 9, 30, dtype=torch.bfloat16), torch.empty(4, 70, 30)
    with torch.backends.mkldnn.flags(enabled=False):
        assert narrow_products(rows, cols, out) is None
        each, _ = product_with_norms(rows.unsqueeze(1), cols.unsqueeze(1), False)
    assert within(each.squeeze(1), rows, cols)


@pytest.fixture
def fresh_kernels() -> Iterator[None]:
    """Found anew, here and behind."""
    for library in narrow._LIBRARIES.values():
        library.cache_clear()  # type: ignore[attr-defined]
    yield
    for library in narrow._LIBRARIES.values():
        library.cache_clear()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("fresh_kernels")
def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that fails, or that this torch does not have."""

    def library(result: int) -> Any:
        def dp_narrow(*arguments: Any) -> int:
            return result

        return SimpleNamespace(dp_narrow=dp_narrow)

    for made in (lambda: library(0), lambda: library(1), lambda: 1 / 0):
        for cached in narrow._LIBRARIES.values():
            cached.cache_clear()  # type: ignore[attr-defined]
        monkeypatch.setattr(build, "compile_cpp", lambda source, made=made, **options: made())
        assert not has_narrow(torch.bfloat16)
    for cached in narrow._LIBRARIES.values():
        cached.cache_clear()  # type: ignore[attr-defined]
    monkeypatch.undo()
    monkeypatch.setattr(narrow, "_blocks", lambda dtype: None)
    assert not has_narrow(torch.bfloat16)


def test_products_on_a_gpu_are_of_narrow_numbers_too() -> None:
    """Shapes alone: what torch is asked for exists there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        rows, cols = (torch.empty(2, 3, n, dtype=torch.bfloat16, device="cuda") for n in (4, 5))
        out = torch.bmm(rows.mT, cols, out_dtype=torch.float32)
        assert out.dtype == torch.float32 and out.shape == (2, 4, 5)
