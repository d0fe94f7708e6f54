"""From Dynamo's graph to compiled code, with a transform of the joint graph in between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

import torch
import torch._decomp.decompositions
import torch._dynamo
import torch._functorch.config as functorch_config
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.experimental.proxy_tensor import make_fx

from dpcompile._torch import mended_inductor
from dpcompile._torch.compilers import explained
from dpcompile._torch.inductor_random import drawing_as_inductor
from dpcompile._torch.later import Later
from dpcompile._torch.tensors import detect_fake_mode
from dpcompile.progress import working

__all__ = [
    "BackwardCompiler",
    "Boxed",
    "GraphCompiler",
    "GraphPass",
    "Watcher",
    "compile_joint",
    "compile_whole",
    "make_boxed",
    "trace_like",
]

_compile_fx, _decomposition = Later("torch._inductor.compile_fx"), Later("torch._inductor.decomposition")

Decompositions = Mapping[Any, Callable[..., Any]]
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


@contextlib.contextmanager
def _decompositions(further: Decompositions) -> Iterator[dict[Any, Callable[..., Any]]]:
    """Inductor's table with ``further`` in it, and the masked accumulation of embeddings as masking and accumulation.

    They are put into Inductor's own table for a while: a table of our own would be pickled into its cache key, which
    cannot be done, and the cache would be off.
    """
    masked = torch.ops.aten._unsafe_masked_index_put_accumulate.default
    import_module("torch._inductor.lowering")  # which that of max pooling takes for granted, in 2.11 to 2.14
    table = _decomposition.select_decomp_table()
    ours = {**further, masked: torch._decomp.global_decomposition_table["post_autograd"][masked]}
    before = {op: table[op] for op in ours if op in table}
    table.update(ours)
    try:
        yield table
    finally:
        for op in ours:
            del table[op]
        table.update(before)


def trace_like(function: Callable[..., Any], *values: Any, decompositions: Decompositions) -> fx.GraphModule:
    """Trace ``function`` on fake values into the same decomposed operations as the rest of the graph.

    In-place operations, which ``torch.vmap`` uses for accumulations, become functional ones: the joint graph has none.

    Args:
        function: of tensors.
        values: fake.
        decompositions: beyond Inductor's.
    """
    functional = torch.func.functionalize(function, remove="mutations")
    with torch.no_grad(), _decompositions(decompositions) as table:
        traced = make_fx(functional, decomposition_table=dict(table), tracing_mode="real")(*values)
    traced.graph.eliminate_dead_code()
    mutable = [n for n in traced.graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", False)]
    assert not mutable, f"in-place operations in a traced function: {mutable}"
    return traced


@working("compiling a private graph")
def compile_joint(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    backend: str,
    transform: GraphPass,
    key: str,
    decompositions: Decompositions,
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
        decompositions: beyond Inductor's.
        backward: compiles the backward graph instead of the backend. It gets the graph and the backend's compiler, may
            call that on several graphs, and returns a function from a list of inputs to the backward's outputs. Saved
            values then stay alive while it runs: none is written over.
        watcher: under Inductor, of a graph with a backward.
    """
    settings: dict[str, Any] = {"enable_autograd_cache": False}
    if backward is not None:
        settings["donated_buffer"] = False
    with (
        functorch_config.patch(settings),
        mended_inductor.lstm_step_by_step(),
        _decompositions(decompositions) as table,
    ):
        if backend == "inductor":
            patches = {"joint_custom_pre_pass": _Pass(_watched(transform, watcher), key)}
            plain = backward is None and watcher is None
            inner = _compile_graph if plain else _inner_compile(backward, watcher)
            with explained():
                return _compile_fx.compile_fx(gm, list(inputs), config_patches=patches, inner_compile=inner)
        return _compile_eager(gm, inputs, transform, dict(table), backward)


@working("compiling a private step")
def compile_whole(graph: fx.GraphModule, *, key: str) -> Callable[..., Sequence[Any]]:
    """Inductor's code for a graph of ATen operations that no autograd runs through.

    It is called where Dynamo compiles: what the code assumes of sizes that are symbols becomes a guard of Dynamo's.

    Args:
        graph: with flat inputs, each of which is used, and flat outputs; fake values in its metadata.
        key: names everything that it was made from, as for :func:`compile_joint`.

    Returns:
        A function of the inputs; it does nothing but run that code.
    """
    inputs = [n.meta["val"] for n in graph.graph.find_nodes(op="placeholder")]
    context = TracingContext(detect_fake_mode(inputs))
    settings = functorch_config.patch(enable_autograd_cache=False)
    patches = {"joint_custom_pre_pass": _Pass(lambda _: None, key)}
    with tracing(context), torch.no_grad(), settings, explained():
        return _compile_fx.compile_fx(graph, inputs, config_patches=patches, inner_compile=_compile_graph)


def _compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    """Inductor's compiler of one graph, mended; a backward may come long after its forward."""
    with explained(), mended_inductor.mended():
        return _compile_fx.compile_fx_inner(gm, inputs, **options)


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
        _compile_fx.record_original_output_strides(gm)
        return _compile_graph(gm, list(inputs), **{**options, "static_input_idxs": ()})

    return make_boxed(backward(gm, part))


def make_boxed(function: Boxed) -> Boxed:
    """Tell AOTAutograd that a function takes its arguments as one list, which it may clear."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


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
        return f"{self._key} {mended_inductor.FORGETS_WRITES}"
