"""No kernel is used that did not compile or that gives other numbers than it should."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from functorch.compile import aot_function
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dpcompile.kernels import build, by_index, content, filters, gaussian, gram, kept, onednn, squares

KERNELS = [by_index, content, filters, gaussian, gram, kept, onednn, squares]


@pytest.fixture
def fresh() -> Iterator[None]:
    """Found anew, here and behind."""
    for module in KERNELS:
        module._library.cache_clear()
    yield
    for module in KERNELS:
        module._library.cache_clear()


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _under_fake_tensors(function: Callable[[Tensor], Tensor]) -> None:
    with FakeTensorMode():
        function(torch.ones(3))


def _traced(function: Callable[[Tensor], Tensor]) -> None:
    make_fx(torch.func.functionalize(function), tracing_mode="symbolic")(torch.ones(3))


def _mapped(function: Callable[[Tensor], Tensor]) -> None:
    torch.func.vmap(function)(torch.ones(3, 2))


def _decomposed(function: Callable[[Tensor], Tensor]) -> None:
    aot_function(function, fw_compiler=lambda gm, example_inputs: gm)(torch.ones(3, requires_grad=True))


@pytest.mark.parametrize("module", KERNELS, ids=_name)
@pytest.mark.parametrize("trace", [lambda f: f(torch.ones(3)), _under_fake_tensors, _traced, _mapped, _decomposed])
@pytest.mark.usefixtures("fresh")
def test_kernels_are_there(module: ModuleType, trace: Callable[[Callable[[Tensor], Tensor]], None]) -> None:
    """Also when first asked for in the middle of tracing."""
    if module is onednn and onednn._address() is None:
        pytest.skip("torch was built without oneDNN")

    def traced(x: Tensor) -> Tensor:
        assert isinstance(module._library(), ctypes.CDLL)
        return x + 1

    module._library.cache_clear()
    trace(traced)


class _Nothing(SimpleNamespace):
    """A library whose functions do nothing."""

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            return 0

        setattr(self, name, function)
        return function


@pytest.mark.parametrize("module", KERNELS, ids=_name)
@pytest.mark.parametrize("fault", ["wrong", "no compiler"])
@pytest.mark.usefixtures("fresh")
def test_what_is_wrong_is_not_used(module: ModuleType, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_cpp(source: str, *, contract: bool) -> Any:
        if fault == "no compiler":
            raise RuntimeError(fault)
        return _Nothing()

    monkeypatch.setattr(build, "compile_cpp", compile_cpp)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert module._library() is None
        assert module._library() is None
    why = "could not be compiled (RuntimeError)"
    remedy = "Install a C++ compiler, or set CXX to one."
    message = f"the gaussian kernel {why}: the same noise is drawn by torch operations, which is slower. {remedy}"
    if fault == "wrong":
        message = (
            "the compiled gaussian kernel gives wrong numbers, so it is not used: the same noise is drawn by torch "
            "operations, which is slower. Set CXX to another C++ compiler."
        )
    assert [str(w.message) for w in told] == ([message] if module is gaussian else [])
