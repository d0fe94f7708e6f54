"""Every private torch symbol that dpcompile uses, with what it is used for. Known for torch 2.11 to 2.14."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import pathlib
import platform
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch._decomp.decompositions
import torch._dynamo
import torch._functorch.config as functorch_config
from torch import fx
from torch._dispatch.python import enable_python_dispatcher, no_python_dispatcher
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed, InternalTorchDynamoError, TorchDynamoException, Unsupported
from torch._dynamo.exc import TensorifyScalarRestartAnalysis as NumbersAreConstants
from torch._dynamo.guards import GuardBuilder, install_guard
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
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from torch._dynamo.variables import TensorVariable, UserFunctionVariable, builtin
from torch._functorch._aot_autograd.descriptors import (
    ForwardTokenAOTOutput,
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import CompileContext, TracingContext, detect_fake_mode
from torch._inductor import inductor_prims
from torch._inductor.codecache import CppCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner, record_original_output_strides
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.replace_random import replace_random_passes
from torch._inductor.loop_body import LoopBody
from torch._inductor.scheduler import SchedulerNode
from torch._inductor.virtualized import V
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, SymNumberMemoDescriptor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    free_unbacked_symbols,
)
from torch.fx.graph import CodeGen
from torch.multiprocessing.reductions import StorageWeakRef as WeakMemory
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.weak import WeakTensorKeyDictionary

from dpcompile.capture import packed
from dpcompile.graph.decompositions import DECOMPOSITIONS, take_apart

__all__ = [
    "BackendCompilerFailed",
    "ForwardTokenAOTOutput",
    "GradAOTOutput",
    "InputMutationAOTOutput",
    "InternalTorchDynamoError",
    "NumbersAreConstants",
    "OpOverload",
    "OpOverloadPacket",
    "PlainAOTInput",
    "PlainAOTOutput",
    "TangentAOTInput",
    "TorchDispatchMode",
    "TorchDynamoException",
    "WeakMemory",
    "WeakTensorKeyDictionary",
    "Unsupported",
    "add_inputs",
    "adam_state",
    "add_one_",
    "active_replica",
    "clear_interrupted",
    "compile_cpp",
    "after_backward",
    "checkpoint_call",
    "compile_joint",
    "copy_graph",
    "current_backward",
    "detect_fake_mode",
    "disable",
    "drawing_as_inductor",
    "drawn_by_inductor",
    "BackwardCompiler",
    "Boxed",
    "GraphCompiler",
    "Watcher",
    "flat_graph",
    "free_unbacked_symbols",
    "inner_tensor",
    "Key",
    "guarded_places",
    "is_whole_call",
    "has_gradient_hooks",
    "in_functorch",
    "is_compiling",
    "is_entered",
    "is_fake",
    "is_fsdp_hook",
    "is_selective",
    "is_stepped_as_made",
    "mark_stepped",
    "onednn_matmul",
    "partition",
    "plain_graph",
    "is_gradient_of_input",
    "lengths_of",
    "is_number",
    "make_boxed",
    "enable_python_dispatcher",
    "fake_vector",
    "fake_mode_of",
    "fix_numbers",
    "memory_of",
    "mixed_precision",
    "on_top",
    "opaque",
    "pytree",
    "real_tensors",
    "recompile_reason",
    "running_place",
    "scale_tensor",
    "taking_real_tensors",
    "tensor_address",
    "trace_like",
    "tracing_config",
    "user_place",
    "uses_of_memory",
    "weak_memory",
    "written_numbers_forgotten",
]

GraphPass = Callable[[fx.GraphModule], None]
Boxed = Callable[[list[Any]], Sequence[Any]]
GraphCompiler = Callable[[fx.GraphModule, Sequence[Any]], Boxed]
BackwardCompiler = Callable[[fx.GraphModule, GraphCompiler], Boxed]


class Watcher(Protocol):
    """Sees what a joint graph is compiled to run."""

    def take(self, joint: fx.GraphModule) -> None:
        """The graph, rewritten, before the compiler changes anything; what it draws is Inductor's to draw."""
        ...

    def forward(self, gm: fx.GraphModule) -> Callable[[Boxed], Boxed]:
        """A forward graph is about to be compiled; what is compiled is replaced."""
        ...

    def backward(self, gm: fx.GraphModule) -> Callable[[Boxed], Boxed]:
        """The same for a backward graph."""
        ...


def current_backward() -> int:
    """Identify the running ``backward()`` call."""
    return torch._C._current_graph_task_id()


def scale_tensor(scaler: torch.amp.GradScaler) -> torch.Tensor:
    """A copy of the scale of a gradient scaler that was used; does not wait for its device."""
    return cast(Any, scaler)._scale.detach().clone()


def after_backward(function: Callable[[], None]) -> None:
    """Run ``function`` when the running ``backward()`` is over; what it raises, that ``backward()`` raises."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def active_replica() -> Any:
    """The DistributedDataParallel whose forward is running; None outside."""
    return torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()


def disable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep Dynamo from tracing into ``function``."""
    return torch._dynamo.disable(function)


@contextlib.contextmanager
def tracing_config(*, regions: bool = False, dynamic: bool | None = None) -> Iterator[None]:
    """Settings of a private compilation.

    Recurrent layers are traced step by step. Python numbers that were seen to change, also those that a module holds,
    become inputs of the graph (not integers of modules where everything is ``dynamic``). Hooks of modules are guarded.
    Where ``torch.compile`` would break the graph to warn or to write to a log, it does neither; and
    ``requires_grad = True`` on an intermediate value is passed over. Packed sequences stay padded
    (:mod:`dpcompile.capture.packed`). DistributedDataParallel does not cut the graph into its buckets. With
    ``regions``, one function is compiled for many modules: as often as they differ, and with every guard that tells
    them apart, also under FSDP.
    """
    config = torch._dynamo.config
    loggers = {v for k, v in vars(logging.Logger).items() if k.startswith(_LOGS) and callable(v)}
    settings = config.patch(
        allow_rnn=True,
        skip_nnmodule_hook_guards=False,
        specialize_float=False,
        allow_unspec_int_on_nn_module=dynamic is not True,  # else every size that a module holds is a symbol at once
        optimize_ddp=False,
        ignore_logging_functions={*config.ignore_logging_functions, *loggers, warnings.warn},
        **_MANY_MODULES if regions else {},
    )
    packed_as_padded = _packed_sequences_stay_padded()
    values = _intermediates_stay_as_they_are(), written_numbers_forgotten(), _gradients_through_views()
    with settings, values[0], values[1], values[2], packed_as_padded:
        yield


def in_functorch() -> bool:
    """Whether a transform of ``torch.func`` is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]


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


def is_entered(mode: TorchDispatchMode) -> bool:
    """Whether operations reach this mode: printing a tensor switches all modes off for a while."""
    return any(entered is mode for entered in _get_current_dispatch_mode_stack())


def on_top(mode: TorchDispatchMode) -> bool:
    """Whether no other mode was entered since this one."""
    stack = _get_current_dispatch_mode_stack()
    return bool(stack) and stack[-1] is mode


def running_place() -> str | None:
    """``file:line, in function: source`` of the user's innermost frame that is running, or None."""
    frames = (f for f in traceback.walk_stack(sys._getframe()) if not f[0].f_code.co_filename.startswith(_NOT_USERS))
    found = next(iter(traceback.StackSummary.extract(frames, limit=1)), None)
    return None if found is None else f"{found.filename}:{found.lineno}, in {found.name}: {(found.line or '').strip()}"


def is_gradient_of_input(descriptor: Any) -> int | None:
    """Which input of the captured graph an output of the joint graph is the gradient of; None if of none."""
    if isinstance(descriptor, GradAOTOutput) and isinstance(descriptor.grad_of, PlainAOTInput):
        return descriptor.grad_of.idx
    return None


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


def fake_mode_of(values: Sequence[Any]) -> Any:
    """The mode of the fake tensors among values, or of the running trace if there are no tensors; None outside."""
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    fake = next((v for v in tensors if isinstance(v, FakeTensor)), None)
    if fake is not None:
        return fake.fake_mode
    return None if tensors else detect_fake_mode()


@contextlib.contextmanager
def taking_real_tensors(mode: Any) -> Iterator[None]:
    """Within a fake mode, operations take real tensors too."""
    before, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        with mode:
            yield
    finally:
        mode.allow_non_fake_inputs = before


def fake_vector(length: int, device: torch.device) -> torch.Tensor:
    """A float64 vector without values: what is traced with it holds for :func:`lengths_of` it, this one among them."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    real = torch.empty(length, dtype=torch.float64, device=device)
    return mode.from_tensor(real, symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC]))


def lengths_of(vector: torch.Tensor) -> Callable[[int], bool]:
    """Whether all that was traced with a :func:`fake_vector` holds for a length."""
    env = cast(Any, vector).fake_mode.shape_env
    code = env.produce_guards_expression([vector], ignore_static=False)
    return lambda length: bool(env.evaluate_guards_expression(code, [torch.empty(length, device="meta")]))


def inner_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What of a ``DTensor`` lies on this rank, as it is kept: no new tensor, no gradient."""
    return cast(Any, tensor)._local_tensor


def mixed_precision(module: torch.nn.Module) -> Any:
    """The policy of a unit of FSDP2."""
    return cast(Any, module)._get_fsdp_state()._mp_policy


def onednn_matmul() -> int | None:
    """The address of ``at::native::mkldnn_matmul``, ``result = beta result + alpha a b``, if this torch has it."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        library = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library._ZN2at6native13mkldnn_matmulERKNS_6TensorES3_S3_ff, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def tensor_address(tensor: torch.Tensor) -> int:
    """The pointer that an ``at::Tensor`` holds."""
    return tensor._cdata


def is_fsdp_hook(hook: Any) -> bool:
    """Whether a hook on a module or a tensor is that of ``fully_shard`` or ``replicate``."""
    return type(getattr(hook, "__self__", None)).__name__ in ("FSDPState", "_ReplicateState")


def clear_interrupted(module: torch.nn.Module) -> None:
    """Bring a unit of FSDP2 to rest after a forward or backward that ended in an error.

    Otherwise FSDP takes the next forward for a part of that one, never frees the root's parameters again, and goes on
    computing with the weights of before the next update.
    """
    state = cast(Any, module)._get_fsdp_state()
    context = state._state_ctx
    interrupted = context.iter_forward_root is not None or context.post_backward_final_callback_queued
    if interrupted and current_backward() == -1:
        state._root_post_backward_final_callback()


def memory_of(tensor: torch.Tensor) -> int:
    """Identify the memory behind a tensor, also a fake one: equal for views of one another."""
    return tensor.untyped_storage()._cdata


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether the tensor has a shape and no values."""
    return isinstance(tensor, FakeTensor)


def partition(joint: fx.GraphModule, forward_outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Forward and backward graphs as Inductor would cut them; ``joint`` is used up. Names of values stay."""
    return min_cut_rematerialization_partition(joint, None, compiler="inductor", num_fwd_outputs=forward_outputs)


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Run operations for real, also in the middle of tracing.

    Without torch's dispatcher in Python, which holds the interpreter's lock where collectives count on it to be free: a
    thread of gloo that waits for it while it holds the queue's would never go on.
    """
    with _disable_current_modes(), no_python_dispatcher(), torch.no_grad():
        yield


def uses_of_memory(tensor: torch.Tensor) -> int:
    """How many tensors share the memory of this one, itself included."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 1


def weak_memory(tensor: torch.Tensor) -> WeakMemory:
    """A reference to the memory of a tensor that does not keep it alive; ``.expired()`` once it is freed."""
    return WeakMemory(tensor.untyped_storage())


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """Whether the user registered a hook on the parameter's gradient."""
    accumulated = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return bool(parameter._backward_hooks) or bool(accumulated)


def compile_cpp(source: str, *, contract: bool = False) -> ctypes.CDLL:
    """Compile C++ with Inductor's compiler, flags and cache on disk.

    Inductor turns loop vectorisation off, as it vectorises itself, and contraction too, which random numbers need to
    be the same everywhere. Flags that not every compiler knows are tried first and then left out.

    Args:
        source: the program.
        contract: whether a product and a sum may be rounded once.

    Raises:
        Exception: there is no compiler, or it failed.
    """
    plain = ("-fno-math-errno", *(("-ffp-contract=fast",) if contract else ()))
    gcc = (*plain, "-ftree-loop-vectorize", "-Wno-uninitialized")
    native = (*gcc, "-mprefer-vector-width=512") if platform.machine() in ("x86_64", "AMD64") else gcc
    for flags in (native, plain):
        try:
            return cast(Any, CppCodeCache).load(source, extra_flags=flags)
        except Exception:
            if flags is plain:
                raise
    raise AssertionError


def is_stepped_as_made(optimizer: torch.optim.Optimizer, *, hooks: int, everywhere: Collection[Any]) -> bool:
    """Whether ``step()`` does what its class says, and nothing else, ``hooks`` pre-hooks of its own apart.

    Args:
        optimizer: what is to be stepped.
        hooks: how many pre-hooks of its own change nothing.
        everywhere: pre-hooks of all optimizers that change nothing.
    """
    replaced = optimizer.__dict__.get("step")  # learning-rate schedulers put a wrapper there that counts calls
    return (
        (replaced is None or getattr(replaced, "_wrapped_by_lr_sched", False))
        and len(optimizer._optimizer_step_pre_hooks) == hooks
        and not optimizer._optimizer_step_post_hooks
        and all(hook in everywhere for hook in _global_optimizer_pre_hooks.values())
        and not _global_optimizer_post_hooks
        and not hasattr(optimizer, "grad_scale")
        and not hasattr(optimizer, "found_inf")
    )


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Learning-rate schedulers look at this to see that a step came before theirs."""
    cast(Any, optimizer)._opt_called = True


def adam_state(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[list[torch.Tensor], ...]:
    """Parameters, gradients, means, means of squares and steps of a group of Adam, made where they are missing."""
    params, grads, means, squares, largest, steps = [], [], [], [], [], []
    cast(Any, optimizer)._init_group(group, params, grads, means, squares, largest, steps)
    return params, grads, means, squares, steps


def add_one_(tensors: list[torch.Tensor]) -> None:
    """Add 1 to each tensor in place, in one call."""
    torch._foreach_add_(tensors, 1)  # type: ignore[reportPrivateImportUsage]


_MANY_MODULES: dict[str, Any] = {
    "skip_fsdp_guards": False,
    "recompile_limit": 256,
    "accumulated_recompile_limit": 4096,
}
_LOGS = ("isEnabledFor", "debug", "info", "warn", "error", "exception", "critical", "fatal", "log")


@contextlib.contextmanager
def _intermediates_stay_as_they_are() -> Iterator[None]:
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
def _gradients_through_views() -> Iterator[None]:
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


class _Replaced(UserFunctionVariable):
    """A function of torch's in whose place Dynamo traces one of ours."""

    @classmethod
    def create_with_source(cls, value: Any, source: Any) -> Any:
        install_guard(source.make_guard(GuardBuilder.CLOSURE_MATCH))
        return UserFunctionVariable(packed.REPLACED[value])


_VF: Any = torch._VF
_RECURRENT = {name: packed.recurrent(name, getattr(_VF, name)) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}


@contextlib.contextmanager
def _packed_sequences_stay_padded() -> Iterator[None]:
    """Let Dynamo trace :mod:`dpcompile.capture.packed` for torch's packed sequences and the layers that run on them."""
    rules: dict[Any, Any] = get_torch_obj_rule_map()
    before = {function: rules.get(function) for function in packed.REPLACED}
    layers = {name: vars(_VF).get(name) for name in _RECURRENT}
    rules.update(dict.fromkeys(before, _Replaced))
    vars(_VF).update(_RECURRENT)
    try:
        yield
    finally:
        _put_back(rules, before)
        _put_back(vars(_VF), layers)


def _put_back(table: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Entries as they were; None for what was not there."""
    for key, value in before.items():
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value


def add_inputs(gm: fx.GraphModule, values: dict[str, torch.Tensor]) -> fx.GraphModule:
    """Copy a Dynamo graph and append placeholders, one for each fake tensor in ``values``.

    AOTAutograd asks every placeholder of a Dynamo graph for the source it was read from; the new ones get names that no
    Python local can have.
    """
    extended = fx.GraphModule(gm, copy_graph(gm.graph))
    extended.meta.update(gm.meta)
    for attribute in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, attribute):
            setattr(extended, attribute, getattr(gm, attribute))
    old = [n for n in gm.graph.nodes if n.op == "placeholder"]
    new = [n for n in extended.graph.nodes if n.op == "placeholder"]
    for before, after in zip(old, new, strict=True):
        source = getattr(before, "_dynamo_source", None)
        if source is not None:
            after._dynamo_source = source
    last = new[-1] if new else extended.graph._root  # a graph of constants has no inputs
    for name, value in values.items():
        with extended.graph.inserting_after(last):
            last = extended.graph.placeholder(name)
        last.meta["example_value"] = value
        last._dynamo_source = LocalSource(f"<{name}>")  # type: ignore[attr-defined]
    extended.recompile()
    return extended


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph with copies of all nodes, their metadata shared; inputs and outputs are packed as before."""
    copied = fx.Graph()
    result = copied.graph_copy(graph, (nodes := {}), return_output_node=True)
    assert isinstance(result, tuple)
    value, old_output = result
    assert isinstance(old_output, fx.Node)
    output = copied.output(value, type_expr=getattr(old_output, "type", None))
    output.meta = dict(old_output.meta)
    copied._codegen = graph._codegen
    assert nodes
    return copied


def checkpoint_call(node: fx.Node) -> bool:
    """Whether a node of Dynamo's graph is a call of ``torch.utils.checkpoint.checkpoint``; its body is an attribute."""
    return node.op == "call_function" and node.target is torch.ops.higher_order.tag_activation_checkpoint


def is_selective(body: fx.GraphModule) -> bool:
    """Whether the body of a checkpoint has a policy of what is kept."""
    return "_checkpoint_context_fn" in body.meta


def plain_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph with flat inputs and outputs, under the names that they have."""
    graph = copy_graph(module.graph)
    graph._codegen = CodeGen()
    return fx.GraphModule(module, graph)


def drawing_as_inductor(module: fx.GraphModule) -> fx.GraphModule:
    """A copy that draws its random numbers as Inductor makes it do, behind its own passes."""
    copied = plain_graph(module)
    values = [n.meta.get("val") for n in copied.graph.nodes]
    with V.set_fake_mode(fake_mode_of([v for v in values if isinstance(v, torch.Tensor)])):
        replace_random_passes(copied)
    return copied


def drawn_by_inductor(target: Any) -> Callable[..., torch.Tensor] | None:
    """What gives the random numbers that compiled code has for one of Inductor's own operations; None for others.

    Inductor draws seeds from torch's generator and the numbers from a generator of its own, a function of seed and
    position. Run uncompiled, its operations would draw from torch's generator instead.
    """
    return _DRAWN.get(target)


def _seeds(count: int, device: Any) -> torch.Tensor:
    limits = torch.iinfo(torch.int64)
    return torch.randint(limits.min, limits.max, [count], device=device)


def _numbers(size: Sequence[int], seed: torch.Tensor, mode: str, **options: Any) -> torch.Tensor:
    return _by_position(inductor_prims.random, size, seed, mode, **options)


def _integers(low: int, high: int, size: Sequence[int], seed: torch.Tensor) -> torch.Tensor:
    return _by_position(inductor_prims.randint, size, seed, low, high)


def _by_position(prim: Any, size: Sequence[int], seed: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
    """A number depends on its seed and on its position alone: those of a longer row begin with those of a shorter."""
    count = 1
    for n in size:
        count *= int(n)
    length = max(2 ** (count - 1).bit_length(), 1024) if count else 0
    found = _row_of_numbers(prim, length, seed.device, rest, tuple(sorted(options.items())))([seed])[0]
    return found[:count].reshape(tuple(size)).clone()


@lru_cache(maxsize=256)
def _row_of_numbers(
    prim: Any, length: int, device: torch.device, rest: tuple[Any, ...], options: tuple[tuple[str, Any], ...]
) -> Boxed:
    graph = fx.Graph()
    seed = graph.placeholder("seed")
    bounds = rest if prim is inductor_prims.randint else ()
    given = (*bounds, [length], seed, *(() if bounds else rest))
    graph.output((graph.call_function(prim, given, dict(options)),))
    example = torch.zeros((), dtype=torch.int64, device=device)
    with ThreadPoolExecutor(1) as own:  # of whatever mode the running backward is in, tracing must know nothing
        compiled = own.submit(cast(Any, compile_fx), fx.GraphModule({}, graph), [example]).result()
    return lambda arguments: compiled(*arguments)


_DRAWN: dict[Any, Callable[..., torch.Tensor]] = {
    inductor_prims.seeds: _seeds,
    inductor_prims.random: _numbers,
    inductor_prims.randint: _integers,
}


def flat_graph(module: fx.GraphModule) -> tuple[fx.GraphModule, list[int | None]]:
    """A joint graph as a plain function of flat inputs.

    Returns:
        The module; for every input its position before joint tracing (None for a cotangent).
    """
    graph = copy_graph(module.graph)
    graph._codegen = CodeGen()
    sources: list[int | None] = []
    for node in graph.find_nodes(op="placeholder"):
        descriptor = node.meta.get("desc")
        sources.append(descriptor.idx if isinstance(descriptor, PlainAOTInput) else None)
    return fx.GraphModule(module, graph), sources


@lru_cache(maxsize=1)
def _own_decompositions() -> dict[Any, Callable[..., Any]]:
    """Our own, and the masked accumulation of embeddings into plain masking and accumulation."""
    masked = torch.ops.aten._unsafe_masked_index_put_accumulate.default
    return {**DECOMPOSITIONS, masked: torch._decomp.global_decomposition_table["post_autograd"][masked]}


@contextlib.contextmanager
def _decompositions() -> Iterator[dict[Any, Callable[..., Any]]]:
    """Inductor's table with ours in it.

    Ours are put into Inductor's own table for a while: a table of our own would be pickled into its cache key, which
    cannot be done, and the cache would be off.
    """
    table, ours = select_decomp_table(), _own_decompositions()
    before = {op: table[op] for op in ours if op in table}
    table.update(ours)
    try:
        yield table
    finally:
        for op in ours:
            del table[op]
        table.update(before)


def trace_like(function: Callable[..., Any], *values: Any) -> fx.GraphModule:
    """Trace ``function`` on fake values into the same decomposed operations as the rest of the graph.

    In-place operations, which ``torch.vmap`` uses for accumulations, become functional ones: the joint graph has none.
    """
    functional = torch.func.functionalize(function, remove="mutations")
    with torch.no_grad(), _decompositions() as table:
        traced = make_fx(functional, decomposition_table=dict(table), tracing_mode="real")(*values)
    traced.graph.eliminate_dead_code()
    mutable = [n for n in traced.graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", False)]
    assert not mutable, f"in-place operations in a traced function: {mutable}"
    return traced


def compile_joint(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    backend: str,
    transform: GraphPass,
    key: str,
    backward: BackwardCompiler | None = None,
    watcher: Watcher | None = None,
) -> Callable[..., Any]:
    """Trace the joint graph of ``gm``, apply ``transform`` to it, and compile forward and backward.

    Where nothing needs a gradient there is no joint graph: ``transform`` gets the forward.

    Args:
        gm: Dynamo's graph.
        inputs: its example inputs.
        backend: "inductor" or "eager".
        transform: rewrites the joint graph in place.
        key: names everything that ``transform`` depends on: it becomes a part of Inductor's cache key. The cache of
            AOTAutograd, which would skip the transform, is off.
        backward: compiles the backward graph instead of the backend. It gets the graph and the backend's compiler, may
            call that on several graphs, and returns a function from a list of inputs to the backward's outputs. Saved
            values then stay alive while it runs: none is written over.
        watcher: under Inductor, of a graph with a backward.
    """
    take_apart(gm.graph)
    gm.recompile()
    settings: dict[str, Any] = {"enable_autograd_cache": False}
    if backward is not None:
        settings["donated_buffer"] = False
    with functorch_config.patch(settings), _lstm_step_by_step(), _decompositions() as table:
        if backend == "inductor":
            patches = {"joint_custom_pre_pass": _Pass(_watched(transform, watcher), key)}
            plain = backward is None and watcher is None
            inner = _compile_graph if plain else _inner_compile(backward, watcher)
            return cast(Any, compile_fx)(gm, list(inputs), config_patches=patches, inner_compile=inner)
        return _compile_eager(gm, inputs, transform, dict(table), backward)


_FORGETS_WRITES = torch.__version__ < "2.14"


def _recompute_with_names(before: Callable[..., None]) -> Callable[..., None]:
    """Remember which values were written in place when the loops of an operation are laid out anew.

    Up to torch 2.13 Inductor forgets it, where it does that to fuse the operation with another on a CPU, and may run a
    reader before the write: behind the scatter-add of a max pool's backward all gradients were zero, or a buffer was
    used after it was freed (pytorch #185509, mended in 2.14). Any write in place can meet it.
    """

    def recompute(self: SchedulerNode, *args: Any, **options: Any) -> None:
        before(self, *args, **options)
        self.set_read_writes(self.read_writes.rename(self.mutation_renames))

    return recompute if _FORGETS_WRITES else before


def _read_or_nothing(before: Callable[..., Any]) -> Callable[..., Any]:
    """What a loop reads of a value: None, not a KeyError, where it reads the value under the name before a write.

    Inductor (to 2.15 at least) asks that to see whether the value may stay in a thread's own memory: then it may not
    (pytorch #196570).
    """

    def read(self: LoopBody, name: str) -> Any:
        try:
            return before(self, name)
        except KeyError:
            return None

    return read


@contextlib.contextmanager
def _mended_inductor() -> Iterator[None]:
    """Inductor without faults that meet ordinary models, while it compiles for us; other compilations keep theirs."""
    recompute, read = SchedulerNode.recompute_size_and_body, LoopBody.get_read_expr
    SchedulerNode.recompute_size_and_body = _recompute_with_names(recompute)
    LoopBody.get_read_expr = _read_or_nothing(read)
    try:
        yield
    finally:
        SchedulerNode.recompute_size_and_body, LoopBody.get_read_expr = recompute, read


def _compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    """Inductor's compiler of one graph, mended; a backward may come long after its forward."""
    with _mended_inductor():
        return cast(Any, compile_fx_inner)(gm, inputs, **options)


def _watched(transform: GraphPass, watcher: Watcher | None) -> GraphPass:
    if watcher is None:
        return transform

    def both(joint: fx.GraphModule) -> None:
        transform(joint)
        watcher.take(drawing_as_inductor(joint))

    return both


def _inner_compile(backward: BackwardCompiler | None, watcher: Watcher | None) -> Callable[..., Any]:
    """Inductor's compiler of one graph, with another way for backward graphs, or watched."""

    def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        is_backward = options.get("is_backward")
        watched = None
        if watcher is not None and not options.get("is_inference"):
            watched = watcher.backward(gm) if is_backward else watcher.forward(gm)
        compiled: Any
        if backward is not None and is_backward:
            compiled = _compile_backward(backward, gm, inputs, options)
        else:
            compiled = _compile_graph(gm, inputs, **options)
        return compiled if watched is None else make_boxed(watched(compiled))

    return compile_graph


def _compile_backward(
    backward: BackwardCompiler, gm: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]
) -> Boxed:
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if isinstance(value, torch.Tensor):  # laid out as the compiled forward saves it, channels last for one
            node.meta["val"] = value

    def part(gm: fx.GraphModule, inputs: Sequence[Any]) -> Boxed:
        output = gm.graph.output_node()
        values = cast(Sequence[Any], output.args[0])
        output.meta["user_visible_output_idxs"] = [i for i, v in enumerate(values) if isinstance(v, fx.Node)]
        record_original_output_strides(gm)
        return _compile_graph(gm, list(inputs), **{**options, "static_input_idxs": ()})

    return make_boxed(backward(gm, part))


def make_boxed(function: Boxed) -> Boxed:
    """Tell AOTAutograd that a function takes its arguments as one list, which it may clear."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


@contextlib.contextmanager
def _lstm_step_by_step() -> Iterator[None]:
    """Decompose an LSTM whose input needs no gradient too; on a CPU torch would make it one opaque operation.

    The last states get the shape of the first: torch 2.11 returns them with a dimension too many.
    """
    module = torch._decomp.decompositions
    chosen = module.select_one_layer_lstm_function

    def step_by_step(inputs: Any, hidden: Any, *rest: Any, **options: Any) -> Any:
        out, last = module.one_layer_lstm(inputs, hidden, *rest, **options)
        return out, tuple(x.reshape(h.shape) for x, h in zip(last, hidden, strict=True))

    module.select_one_layer_lstm_function = lambda *_: step_by_step
    try:
        yield
    finally:
        module.select_one_layer_lstm_function = chosen


def _compile_eager(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    transform: GraphPass,
    table: dict[Any, Callable[..., Any]],
    backward: BackwardCompiler | None,
) -> Callable[..., Any]:
    def run_as_is(graph_module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        return make_boxed_func(graph_module.forward)

    def run_backward(graph_module: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        if backward is None:
            return run_as_is(graph_module, example_inputs)
        return make_boxed(backward(graph_module, lambda part, _: make_boxed_func(part.forward)))

    def run_forward_alone(graph_module: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        transform(graph_module)
        return run_as_is(graph_module, example_inputs)

    def partition(joint: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        transform(joint)
        return min_cut_rematerialization_partition(joint, joint_inputs, **options)

    return aot_autograd(
        fw_compiler=run_as_is,
        bw_compiler=run_backward,
        inference_compiler=run_forward_alone,
        partition_fn=partition,
        decompositions=table,
        keep_inference_input_mutations=True,
    )(gm, list(inputs))


class _Pass(CustomGraphPass):
    """Inductor's hook on the joint graph, before its own passes."""

    def __init__(self, transform: GraphPass, key: str) -> None:
        self._transform, self._key = transform, key

    def __call__(self, graph: fx.Graph) -> None:
        assert graph.owning_module is not None
        self._transform(graph.owning_module)

    def uuid(self) -> str:
        return f"{self._key} {_FORGETS_WRITES}"


def user_place(error: BaseException) -> str | None:
    """``file:line, in function: source`` of the user's innermost frame that Dynamo was tracing, or None."""
    stack = getattr(error, "real_stack", None)
    if not stack:
        return None
    own = [f for f in stack if not f.filename.startswith(_NOT_USERS)]
    frame = (own or list(stack))[-1]
    return f"{frame.filename}:{frame.lineno}, in {frame.name}: {(frame.line or '').strip()}"


_NOT_USERS = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
