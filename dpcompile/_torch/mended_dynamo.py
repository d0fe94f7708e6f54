"""What Dynamo gets wrong or breaks the graph at, while it traces for us."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch._decomp.decompositions
import torch._dynamo
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from torch._dynamo.variables import TensorVariable, UserFunctionVariable, builtin
from torch._subclasses.fake_tensor import SymNumberMemoDescriptor

__all__ = [
    "StandIns",
    "gradients_through_views",
    "intermediates_stay_as_they_are",
    "replaced",
    "written_numbers_forgotten",
]


@contextlib.contextmanager
def intermediates_stay_as_they_are() -> Iterator[None]:
    """Let Dynamo pass over ``x.requires_grad = True`` where ``x`` was computed in the model.

    Models do that for reentrant checkpointing (wav2vec 2 and its kin). It changes the gradient of no parameter: it only
    asks autograd to keep a gradient of ``x`` as well. Parameters and tensors from outside are left to Dynamo.
    """
    kind, name = getattr(builtin, "SetAttrBuiltinVariable", None), "_call_setattr"
    if kind is None:  # torch 2.11
        kind, name = builtin.BuiltinVariable, "call_setattr"
    before = getattr(kind, name)

    def setattr_of(self: Any, tx: Any, obj: Any, name_var: Any, val: Any) -> Any:
        computed = isinstance(obj, TensorVariable) and obj.source is None
        asks = name_var.is_python_constant() and name_var.as_python_constant() == "requires_grad"
        if computed and asks and val.is_python_constant() and val.as_python_constant() is True:
            return val
        return before(self, tx, obj, name_var, val)

    setattr(kind, name, setattr_of)
    try:
        yield
    finally:
        setattr(kind, name, before)


@contextlib.contextmanager
def gradients_through_views() -> Iterator[None]:
    """Let Dynamo see that a tensor needs a gradient since something that does was written to it through a view.

    Dynamo (to 2.14 at least) notes ``requires_grad`` when a tensor is made, and anew when it is itself written to. For
    a tensor that it takes not to need a gradient it inlines the forward of an ``autograd.Function`` and drops its
    backward: the gradient is another one than in eager, silently.
    """

    def requires_grad(self: TensorVariable) -> bool | None:
        noted = self.__dict__["requires_grad"]
        value = self.proxy.node.meta.get("example_value") if noted is False else None
        return value.requires_grad if isinstance(value, torch.Tensor) else noted

    def note(self: Any, value: bool | None) -> None:
        self.__dict__["requires_grad"] = value

    kind: Any = TensorVariable
    before = vars(kind).get("requires_grad")
    kind.requires_grad = property(requires_grad, note)
    try:
        yield
    finally:
        if before is None:
            del kind.requires_grad
        else:
            kind.requires_grad = before


@contextlib.contextmanager
def written_numbers_forgotten() -> Iterator[None]:
    """Let Dynamo forget the value of a float64 tensor of one number where the model writes to it.

    Torch before 2.14 keeps it: ``.item()`` after the write gives the number from before, and the write itself is left
    out of the graph, also of plain ``torch.compile``'s.
    """
    memo: Any = SymNumberMemoDescriptor
    before = memo.__get__

    def get(self: Any, tensor: Any, kind: Any = None) -> Any:
        known = getattr(tensor, self._memo(tensor)) is not None and not self._is_nested_int
        if known and not tensor.is_inference() and getattr(tensor, self._memo_vc(tensor)) != tensor._version:
            setattr(tensor, self._memo(tensor), None)
        return before(self, tensor, kind)

    memo.__get__ = get
    try:
        yield
    finally:
        memo.__get__ = before


class StandIns(NamedTuple):
    """What Dynamo traces in the place of torch's own functions.

    Attributes:
        functions: pairs of theirs and ours.
        layer: makes ours of theirs, for the recurrent functions of ``torch._VF`` by name.
    """

    functions: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...]
    layer: Callable[[str, Callable[..., Any]], Callable[..., Any]]

    @property
    def in_place(self) -> AbstractContextManager[None]:
        """The recurrent functions alone: what was compiled with them is called in here."""
        return _in_place(self.layer)


_VF: Any = torch._VF
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@contextlib.contextmanager
def replaced(by: StandIns) -> Iterator[None]:
    """Let Dynamo trace functions of ours in the place of torch's."""
    rules: dict[Any, Any] = get_torch_obj_rule_map()
    before = {function: rules.get(function) for function, _ in by.functions}
    rules.update(dict.fromkeys(before, _kind(by.functions)))
    try:
        with by.in_place:
            yield
    finally:
        for function, rule in before.items():
            if rule is None:
                rules.pop(function, None)
            else:
                rules[function] = rule


class _InPlace:
    """Our recurrent functions in the place of torch's, as long as any thread is in here.

    Guards of what was compiled look for them there: it is to be entered for every call.
    """

    def __init__(self, layer: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
        self._layer, self._inside, self._lock = layer, 0, threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                vars(_VF).update(_layers(self._layer))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for name in _RECURRENT:
                    vars(_VF).pop(name, None)


@lru_cache(maxsize=1)
def _in_place(layer: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> _InPlace:
    return _InPlace(layer)


@lru_cache(maxsize=1)
def _layers(layer: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    return {name: layer(name, getattr(_VF, name)) for name in _RECURRENT}


@lru_cache(maxsize=1)
def _kind(functions: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...]) -> type[UserFunctionVariable]:
    ours = dict(functions)

    class Replaced(UserFunctionVariable):
        """A function of torch's in whose place Dynamo traces one of ours."""

        @classmethod
        def create_with_source(cls, value: Any, source: Any) -> Any:
            install_guard(source.make_guard(GuardBuilder.CLOSURE_MATCH))
            return UserFunctionVariable(ours[value])

    return Replaced
