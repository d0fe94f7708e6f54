"""Dynamo: how a call is traced, what a graph was made for, what it says of its errors."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Container, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch._decomp.decompositions
import torch._dynamo
from torch import fx
from torch._dynamo import eval_frame
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException, Unsupported
from torch._dynamo.exc import TensorifyScalarRestartAnalysis as NumbersAreConstants
from torch._dynamo.source import (
    AttrSource,
    ChainedSource,  # type: ignore[reportPrivateImportUsage]
    ClosureSource,
    ConstDictKeySource,
    DictGetItemSource,
    DictSubclassGetItemSource,
    GenericAttrSource,
    GetItemSource,
    GlobalSource,
    LocalSource,
)
from torch._dynamo.symbolic_convert import InstructionTranslator, TensorifyState
from torch._guards import CompileContext, TracingContext

from dpcompile._torch.autograd import in_functorch
from dpcompile._torch.mended_dynamo import (
    StandIns,
    gradients_through_views,
    intermediates_stay_as_they_are,
    replaced,
    written_numbers_forgotten,
)

__all__ = [
    "BackendCompilerFailed",
    "NumbersAreConstants",
    "TorchDynamoException",
    "Unsupported",
    "Key",
    "compiled_with",
    "disable",
    "fix_numbers",
    "guarded_places",
    "is_compiling",
    "is_number",
    "is_whole_call",
    "opaque",
    "recompile_reason",
    "running_place",
    "seen_in_functorch",
    "tracing_config",
    "user_place",
]


def disable(function: Callable[..., Any], *, reason: str | None = None) -> Callable[..., Any]:
    """Keep Dynamo from tracing into ``function``; where that is an error (``torch.export``), it quotes ``reason``."""
    return torch._dynamo.disable(function, reason=reason)


_COMPILING = threading.RLock()


def compiled_with(
    config: Callable[[], contextlib.AbstractContextManager[None]],
    function: Callable[..., Any],
    *,
    stand_ins: StandIns,
    backend: Callable[..., Any],
    dynamic: bool | None,
) -> Callable[..., Any]:
    """``torch.compile`` of a function as one graph, under settings that are entered when Dynamo compiles.

    Entered at every call they would take longer than a small model does, and hold for whatever else is compiled
    meanwhile in other threads. Under ``torch.compiler.set_stance`` others compile in Dynamo's place: then they are
    entered at every call.

    **Guarantee.** No graph of the function is made outside of the settings.

    Args:
        config: makes the settings; global ones, so that one compilation at a time is under them.
        function: to be compiled.
        stand_ins: those of the settings; guards look for some of them at every call.
        backend: of its graphs.
        dynamic: as for ``torch.compile``.
    """
    context: Any = torch._dynamo.optimize(backend, nopython=True, dynamic=dynamic)
    if callable(getattr(context, "callback", None)):  # else Dynamo is switched off
        context.callback = _Under(config, context.callback)
    quick, in_place = context(function), stand_ins.in_place

    def call(*args: Any) -> Any:
        stance: Any = eval_frame._stance
        if stance.stance == "default" and getattr(stance, "backend", None) is None:
            with in_place:
                return quick(*args)
        with _COMPILING, config():
            return quick(*args)

    return call


class _Under:
    """What Dynamo calls with a frame that no compiled graph fits, under settings."""

    def __init__(self, config: Callable[[], contextlib.AbstractContextManager[None]], convert: Any) -> None:
        self.__dict__.update(vars(convert))  # Dynamo looks for the backend there
        self._config, self._convert = config, convert

    def __call__(self, *frame: Any) -> Any:
        with _COMPILING, self._config():
            return self._convert(*frame)


@torch._dynamo.assume_constant_result
def seen_in_functorch() -> bool:
    """Whether a transform of ``torch.func`` is under way, also where Dynamo traces, which guards them itself."""
    return in_functorch()


@contextlib.contextmanager
def tracing_config(*, stand_ins: StandIns, regions: bool = False, dynamic: bool | None = None) -> Iterator[None]:
    """Settings of a private compilation.

    Recurrent layers are traced step by step. Python numbers that were seen to change, also those that a module holds,
    become inputs of the graph (not integers of modules where everything is ``dynamic``). Hooks of modules are guarded.
    Where ``torch.compile`` would break the graph to warn or to write to a log, it does neither; and
    ``requires_grad = True`` on an intermediate value is passed over. ``stand_ins`` are traced in the place of torch's
    functions. DistributedDataParallel does not cut the graph into its buckets. With ``regions``, one function is
    compiled for many modules: as often as they differ, and with every guard that tells them apart, also under FSDP.
    """
    config = torch._dynamo.config
    settings = config.patch(
        allow_rnn=True,
        skip_nnmodule_hook_guards=False,
        specialize_float=False,
        allow_unspec_int_on_nn_module=dynamic is not True,  # else every size that a module holds is a symbol at once
        optimize_ddp=False,
        ignore_logging_functions={*config.ignore_logging_functions, *_loggers(), warnings.warn},
        **_MANY_MODULES if regions else {},
    )
    values = intermediates_stay_as_they_are(), written_numbers_forgotten(), gradients_through_views()
    with settings, values[0], values[1], values[2], replaced(stand_ins):
        yield


@lru_cache(maxsize=1)
def _loggers() -> tuple[Callable[..., Any], ...]:
    return tuple(v for k, v in vars(logging.Logger).items() if k.startswith(_LOGS) and callable(v))


def is_compiling() -> bool:
    """Whether Dynamo is compiling a frame."""
    return CompileContext.try_get() is not None


class Key(NamedTuple):
    """One step from an object to what it holds: an attribute, an entry, or the entry of a dict's n-th key."""

    kind: str
    key: Any


def guarded_places() -> Iterator[tuple[str, Any, tuple[Key, ...], bool]]:
    """What the graph that is being compiled was made for, as Dynamo reads it.

    Yields:
        The name of the local variable that it is reached from (empty: of none), that object now, the way from there,
        and whether the graph was made for this value; else only for its type, its length or the like.
    """
    context = TracingContext.try_get()
    output = InstructionTranslator.current_tx().output if context is not None else None
    for guard in context.guards_context.dynamo_guards if context is not None else ():
        source, steps = guard.originating_source, []
        while isinstance(source, ChainedSource):
            if isinstance(source, (AttrSource, GenericAttrSource)):
                steps.append(Key(".", source.member))
            elif isinstance(source, ClosureSource):
                steps.append(Key(".", "__closure__"))
            elif isinstance(source, (DictGetItemSource, DictSubclassGetItemSource, GetItemSource)):
                nth = isinstance(source.index, ConstDictKeySource)
                steps.append(Key("nth" if nth else "[]", source.index.index if nth else source.index))
            source = source.base
        name, root = "", None
        if isinstance(source, LocalSource):
            name, root = source.local_name, cast(Any, output).local_scope.get(source.local_name)
        elif isinstance(source, GlobalSource):
            root = cast(Any, output).global_scope.get(source.global_name)
        yield name, root, tuple(steps[::-1]), guard.create_fn_name() in ("CONSTANT_MATCH", "EQUALS_MATCH")


def is_whole_call(codes: Container[types.CodeType]) -> bool:
    """Whether the graph that is being compiled is all that runs of one of these functions."""
    output: Any = InstructionTranslator.current_tx().output
    return output.root_tx.f_code in codes and not output.compile_subgraph_reason.graph_break


def running_place() -> str | None:
    """``file:line, in function: source`` of the user's innermost frame that is running, or None."""
    frames = (f for f in traceback.walk_stack(sys._getframe()) if not f[0].f_code.co_filename.startswith(_NOT_USERS))
    found = next(iter(traceback.StackSummary.extract(frames, limit=1)), None)
    return None if found is None else f"{found.filename}:{found.lineno}, in {found.name}: {(found.line or '').strip()}"


def is_number(placeholder: fx.Node) -> bool:
    """Whether an input of Dynamo's graph is a Python number that Dynamo passes as a tensor without dimensions."""
    value = placeholder.meta.get("example_value")  # arrays of NumPy are passed as tensors too
    passed = bool(getattr(placeholder.meta.get("grapharg"), "pass_arg_as_tensor", False))
    return passed and isinstance(value, torch.Tensor) and value.ndim == 0


def fix_numbers(gm: fx.GraphModule) -> bool:
    """Ask Dynamo to make constants of the Python floats that are inputs of a graph, if it has any.

    It does once ``NumbersAreConstants`` is raised out of the backend: it then traces anew.
    """
    values = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder") if is_number(n)]
    names = {str(v.item_memo.node._expr) for v in values if getattr(v, "item_memo", None) is not None}
    fresh = {name for name in names if not TensorifyState.should_specialize(name)}
    for name in fresh:
        TensorifyState.specialize(name)
    return bool(fresh)


def recompile_reason(error: BaseException) -> str | None:
    """The guard that failed last where Dynamo gave up recompiling, such as ``args[1] == 0.5``; None if unknown."""
    traced = error.__traceback__
    while traced is not None:
        reason = traced.tb_frame.f_locals.get("recompile_reason")
        if isinstance(reason, str):
            return reason.split(":", 1)[-1].split("#", 1)[0].strip()
        traced = traced.tb_next
    return None


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a function whole in Dynamo's graphs; it is called on fake tensors while they are made."""
    return cast(Any, torch._dynamo.allow_in_graph)(function)


_MANY_MODULES: dict[str, Any] = {
    "skip_fsdp_guards": False,
    "recompile_limit": 256,
    "accumulated_recompile_limit": 4096,
}
_LOGS = ("isEnabledFor", "debug", "info", "warn", "error", "exception", "critical", "fatal", "log")


def user_place(error: BaseException) -> str | None:
    """``file:line, in function: source`` of the user's innermost frame that Dynamo was tracing, or None."""
    stack = getattr(error, "real_stack", None)
    if not stack:
        return None
    own = [f for f in stack if not f.filename.startswith(_NOT_USERS)]
    frame = (own or list(stack))[-1]
    return f"{frame.filename}:{frame.lineno}, in {frame.name}: {(frame.line or '').strip()}"


class _OfOthers(logging.Filter):
    """Drops what torch logs of an operation that fails on fake tensors within our own calls: we raise what it says."""

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: D102
        if not str(record.msg).startswith("failed while attempting to run meta for"):
            return True
        frame: types.FrameType | None = sys._getframe()
        while frame is not None and not frame.f_globals.get("__name__", "").startswith("dpcompile.runtime."):
            frame = frame.f_back
        return frame is None


logging.getLogger("torch._subclasses.fake_tensor").addFilter(_OfOthers())

_NOT_USERS = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
