"""A user's clipping function: what runs in its place is the graph that it was traced into, which is proved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from dpcompile._torch.autograd import enable_python_dispatcher
from dpcompile._torch.tensors import fake_mode_of, fake_vector, lengths_of
from dpcompile.clipping.groups import Clipping, ClippingFunction
from dpcompile.clipping.weights import apply
from dpcompile.errors import DPCompileError, PrivacyError
from dpcompile.graph.compile import trace_like
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Examples, Shared, Whole
from dpcompile.graph.sizes import size
from dpcompile.proof.prove import prove

__all__ = ["ProvenClipping", "proven"]
_READS = ("__array__", "__dlpack__", "data_ptr", "numpy", "storage", "tolist", "untyped_storage")


def proven(clipping: Clipping, norms: Tensor, bound: float) -> Clipping:
    """What runs in place of a user's clipping function: the graph that it is traced into here, which is proved.

    **Guarantee.** The graph gives every example a weight from its own norm alone. The function itself sees no norms.

    ===================================================  ====================================================
    edge case                                            outcome
    ===================================================  ====================================================
    Python state that the function reads                 stays as it was here
    NumPy, ``.tolist()``, DLPack, branches on values     refused
    a tensor from outside, or made of Python numbers     refused
    ``torch.rand_like``                                  drawn anew in every backward
    ===================================================  ====================================================

    Args:
        clipping: any; a name stays as it is.
        norms: fake, ``[B]``.
        bound: C.

    Raises:
        DPCompileError: it is not traced into such a graph.
    """
    if not callable(clipping):
        return clipping
    return _proved(*_traced(clipping, norms.double(), bound))


class ProvenClipping:
    """:func:`proven` for batches as they come: a function is traced once for all sizes that it treats alike.

    **Guarantee.** What was traced runs only on sizes of the batch that it was proved for; others are traced anew.
    """

    def __init__(self, clipping: Clipping, bound: float) -> None:
        self._clipping, self._bound = clipping, bound
        self._found: dict[torch.device, list[tuple[Callable[[int], bool], Clipping]]] = {}

    def of(self, count: int, device: torch.device) -> Clipping:
        """For a batch of ``count`` examples.

        Raises:
            DPCompileError: see :func:`proven`.
        """
        if not callable(self._clipping):
            return self._clipping
        known = self._found.setdefault(device, [])
        for fits, graph in known:
            if fits(count):
                return graph
        norms = fake_vector(count, device)
        graph = _proved(*_traced(self._clipping, norms, self._bound))
        known.append((lengths_of(norms), graph))
        return graph


def _traced(function: ClippingFunction, norms: Tensor, bound: float) -> tuple[fx.GraphModule, fx.Node]:
    """The graph of a user's clipping function, and its result.

    Raises:
        PrivacyError: it cannot be traced, or does not return one weight per example.
    """

    def applied(norms: Tensor) -> Any:
        with _NoReads():
            return apply(function, norms, bound)

    try:
        with fake_mode_of([norms]), enable_python_dispatcher():
            traced = trace_like(applied, norms)
        if traced.graph.find_nodes(op="get_attr"):
            raise TypeError("it uses a tensor that is not made from the norms")
    except Exception as error:
        raise PrivacyError(
            f"the clipping function could not be traced: {type(error).__name__}: {str(error).splitlines()[0]}",
            remedy="write it with tensor operations on the norms [B], without Python branches on their values",
        ) from error
    result = traced.graph.output_node().args[0]
    value = result.meta.get("val") if isinstance(result, fx.Node) else None
    if not (isinstance(result, fx.Node) and isinstance(value, Tensor) and tuple(value.shape) == tuple(norms.shape)):
        raise PrivacyError(
            "the clipping function must return one weight per example, shape [B]",
            remedy="return a tensor of the shape of the norms",
        )
    return traced, result


def _proved(traced: fx.GraphModule, result: fx.Node) -> ClippingFunction:
    try:
        label = prove(_as_joint(traced, result)).of(result)
        fault = "" if isinstance(label, (Shared, Whole)) or label == Examples(0) else f"its result is {label}"
    except DPCompileError as error:  # what it says besides is of outputs of a model
        fault = error.what.partition(" (it reaches")[0]
    if fault:
        raise PrivacyError(
            f"the clipping function does not give every example its own weight: {fault}",
            remedy="let weight i depend on norm i alone",
        )
    return traced


class _NoReads(TorchFunctionMode):
    """Refuses what would read a tensor's memory past torch: while tracing there is none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS:
            raise TypeError(f"`{name}` reads the norms past torch")
        return func(*args, **(kwargs or {}))


def _as_joint(traced: fx.GraphModule, result: fx.Node) -> JointGraph:
    """A traced clipping function in the form that the proof takes: its result is the one output to be per example."""
    norms = next(n for n in traced.graph.nodes if n.op == "placeholder")
    batch = size(norms.meta["val"].shape[0])
    return JointGraph(traced, {norms: Examples(0)}, {norms: result}, outputs=(result,), mask=norms, batch=batch)
