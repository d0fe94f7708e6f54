"""What runs between compiled graphs where graph breaks are allowed: Python that computes nothing with examples.

Between two graphs the proof sees nothing. So a tensor operation there on values of examples, or on parameters, is
refused when it runs, and a graph may read only what is known: parameters, arguments, what earlier graphs returned, and
tensors that the modules held when the call began.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from dpcompile._torch import pytree
from dpcompile._torch.aot import source_name
from dpcompile._torch.autograd import TorchDispatchMode, hooks_of, is_entered, on_top
from dpcompile._torch.dynamo import disable, is_compiling, running_place
from dpcompile._torch.parallel import is_fsdp_hook
from dpcompile._torch.tensors import memory_of
from dpcompile.errors import DPCompileError, ExampleMixingError, UnsupportedGraphError
from dpcompile.graph.operations import has_size_of_values, operation_name
from dpcompile.runtime.example_memory import ExampleMemory

__all__ = ["GraphBreakWatch", "Following", "check_hooks_between", "check_inputs_between", "compiled_alone"]

_READS = ("tolist", "numpy", "data_ptr", "__dlpack__")
_MOVE = (
    "move it into a function or module that is compiled (not in the body of a loop that breaks), or remove the break"
)


class GraphBreakWatch(TorchDispatchMode):
    """Watches tensor operations outside of compiled graphs.

    **Guarantee.** An operation that reaches torch's dispatcher while this watches, and has an operand that holds
    examples or needs a gradient, raises; and :meth:`check` raises again, should the model have caught it.

    ===========================================  ==============================================
    edge case                                    outcome
    ===========================================  ==============================================
    an operation on constants alone              passes; a later graph may not read the result
    ``print(x)``, ``str(x)``                     pass (they bypass the dispatcher): text
    ``x.shape``, ``x.dtype``                     pass
    ``x.item()``, ``if x.sum() > 0:``            refused
    ``x.tolist()``, ``x.numpy()``, ``np.sum(x)``   refused
    memory read past torch (storages, C code)    not seen (docs/sharp_edges.md)
    in-place operations, also through ``.data``  refused
    ===========================================  ==============================================

    Args:
        holds_examples: whether a tensor, or what shares its memory, holds examples.
        parameter: the name of a parameter that a tensor is or is a view of, or None.
    """

    def __init__(self, holds_examples: Callable[[Tensor], bool], parameter: Callable[[Tensor], str | None]) -> None:
        super().__init__()
        self._holds_examples, self._parameter = holds_examples, parameter
        self._watching = False
        self._fault: DPCompileError | None = None

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Tell Dynamo to compile nevertheless."""
        return True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Code of the model runs in here, compiled or not."""
        before, self._watching = self._watching, True
        try:
            with self, self._reads_seen():
                yield
        finally:
            self._watching = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A compiled graph runs in here, or is compiled."""
        if not self._watching:
            yield
            return
        top, self._watching = on_top(self), False
        if top:
            self.__exit__(None, None, None)
        try:
            yield
        finally:
            if top:
                self.__enter__()
            self._watching = True

    @contextmanager
    def _reads_seen(self) -> Iterator[None]:
        """Methods that read a tensor's memory without the dispatcher are seen too."""
        own = {name: Tensor.__dict__.get(name) for name in _READS}
        for name in _READS:
            setattr(Tensor, name, self._seen(name, getattr(Tensor, name)))
        try:
            yield
        finally:
            for name, value in own.items():
                if value is None:
                    delattr(Tensor, name)
                else:
                    setattr(Tensor, name, value)

    def _seen(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @disable
        @functools.wraps(method)
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._watching and is_entered(self) and not is_compiling():
                self._fault = self._fault or self._refusal(name, tensor)
                self.check()
            return method(tensor, *args, **kwargs)

        return read

    def check(self) -> None:
        """Raise what was refused, if the model went on nevertheless."""
        if self._fault is not None:
            raise self._fault

    @disable
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See every operation."""
        if self._watching and not is_compiling():
            self._fault = self._fault or self._refusal(operation_name(func), (args, kwargs))
            self.check()
        return func(*args, **(kwargs or {}))

    def _refusal(self, name: str, operands: Any) -> DPCompileError | None:
        for operand in (x for x in pytree.tree_leaves(operands) if isinstance(x, Tensor)):
            parameter = self._parameter(operand)
            if parameter is not None:
                return UnsupportedGraphError(
                    f"parameter '{parameter}' is used by `{name}` outside any compiled graph, behind a graph break: "
                    "nothing would clip that part of its gradient",
                    where=running_place(),
                    remedy=_MOVE,
                )
            if operand.requires_grad or self._holds_examples(operand):
                if name in ("_local_scalar_dense", "is_nonzero", *_READS):
                    return ExampleMixingError(
                        "the model reads Python numbers out of the values of examples, behind a graph break",
                        where=running_place(),
                        remedy="leave them tensors: no .item(), .tolist(), .numpy() or float(); torch.where instead "
                        "of branches on values",
                    )
                return ExampleMixingError(
                    f"`{name}` runs on values of examples outside any compiled graph, behind a graph break: whether "
                    "it mixes them is not proved",
                    where=running_place(),
                    remedy=_MOVE,
                )
        return None


class Following(GraphBreakWatch):
    """Watches the same where nothing is trained, and refuses nothing: it notes what holds examples from then on.

    Args:
        kept: where.
    """

    def __init__(self, kept: ExampleMemory) -> None:
        super().__init__(kept.holds, lambda _: None)
        self._kept = kept

    @disable
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Follow examples through every operation."""
        result = func(*args, **(kwargs or {}))
        if self._watching and not is_compiling() and (self._kept.numbers.spread or self._any_holds((args, kwargs))):
            written = [x for a, x in zip(func._schema.arguments, args, strict=False) if a.is_write]
            written.append((kwargs or {}).get("out"))
            own = {memory_of(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            made = [x for x in pytree.tree_leaves(result) if not (isinstance(x, Tensor) and memory_of(x) in own)]
            if has_size_of_values(func, args):
                self._kept.numbers.note(None, None)
            self._note(made, sized=self._kept.numbers.spread)
            self._note(written)
        return result

    def _seen(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @disable
        @functools.wraps(method)
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = method(tensor, *args, **kwargs)
            if self._watching and not is_compiling() and self._any_holds(tensor):
                self._note(result)
                if name != "data_ptr":
                    self._kept.numbers.note(None, None)
            return result

        return read

    def _any_holds(self, operands: Any) -> bool:
        return any(self._kept.holds(x) for x in pytree.tree_leaves(operands))

    def _note(self, results: Any, *, sized: bool = False) -> None:
        leaves = pytree.tree_leaves(results)
        self._kept.note_arguments(leaves, trained=False, sized=sized)
        for number in leaves:
            if isinstance(number, (int, float, complex)):
                self._kept.numbers.note(number, None)


def check_inputs_between(
    gm: fx.GraphModule, live: Sequence[Any], known: Callable[[Tensor], bool], held: dict[int, Tensor]
) -> None:
    """Raise UnsupportedGraphError if a graph reads a tensor of which nothing is known."""
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), live, strict=True):
        if isinstance(value, Tensor) and not known(value) and id(value) not in held:
            raise UnsupportedGraphError(
                f"the model reads the tensor {source_name(node) or node.name} of shape {list(value.shape)} behind "
                "a graph break, and no compiled graph made it: it may hold anything of the examples",
                remedy="compute it where it is compiled; register constants as buffers",
            )


def check_hooks_between(tensors: Sequence[Tensor]) -> None:
    """Raise UnsupportedGraphError if the model put a hook on the gradient of a value inside it."""
    for tensor in tensors:
        if not all(map(is_fsdp_hook, hooks_of(tensor))):
            raise UnsupportedGraphError(
                f"the model puts a hook on the gradient of a value of shape {list(tensor.shape)}, behind a graph "
                "break: what it does to the examples is not seen",
                remedy="do it in a torch.autograd.Function in forward",
            )


@contextmanager
def compiled_alone(module: nn.Module, without: Sequence[nn.Module]) -> Iterator[None]:
    """Let Dynamo compile layers of ``torch.nn`` also where they are called from code that it left to Python.

    It leaves frames of torch itself alone, and the layer would run uncompiled.

    Args:
        module: whose parts they are.
        without: modules whose parts are left as they are.
    """
    apart = {id(m) for other in without for m in other.modules()}
    found = [
        m
        for m in module.modules()
        if m is not module and id(m) not in apart and "forward" not in m.__dict__ and _is_of_torch(m)
    ]
    for layer in found:
        layer.__dict__["forward"] = _forward_of(layer)
    try:
        yield
    finally:
        for layer in found:
            layer.__dict__.pop("forward", None)


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).forward.__module__.startswith("torch.nn.")


def _forward_of(layer: nn.Module) -> Callable[..., Any]:
    original = type(layer).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(layer, *args, **kwargs)

    return forward
