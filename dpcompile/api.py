"""``dp_compile``: as a call on a model, or as a decorator on its class."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import nn

from dpcompile.capture.arguments import InDims
from dpcompile.clipping.groups import Clipping, validate_clipping
from dpcompile.distributed.pipeline import group_of
from dpcompile.errors import DPCompileError, PrivacyError
from dpcompile.module import PrivateModule, private_class, private_view
from dpcompile.options import CompileOptions, Options
from dpcompile.planning.modes import NORM_MODES
from dpcompile.runtime.replicas import refuse_wrapped
from dpcompile.runtime.stage_checks import check_pipeline

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["dp_compile"]

Model = TypeVar("Model", bound="nn.Module | type[nn.Module]")


@overload
def dp_compile(model: Model, **options: Unpack[CompileOptions]) -> Model: ...


@overload
def dp_compile(model: None = None, **options: Unpack[CompileOptions]) -> Callable[[Model], Model]: ...


def dp_compile(  # type: ignore[misc]
    model: Any = None,
    *,
    max_grad_norm: float = 1.0,
    clipping: Clipping = "flat",
    norm: str = "auto",
    in_dims: InDims = 0,
    loss_reduction: str = "mean",
    backend: str = "inductor",
    dynamic: bool | None = None,
    memory_budget: float | int | None = None,
    check: bool = False,
    regions: str | None = None,
    verify: bool = True,
    examples_per_user: int = 1,
    pipeline: Any = None,
    untied: bool = False,
) -> Any:
    """Compile a model so that its backward clips every example's gradient.

    Like ``torch.compile``, as a call on a model, or as a decorator (``@dp_compile`` or ``@dp_compile(...)``) on an
    ``nn.Module`` class. After ``loss.backward()`` each ``p.grad`` is ``sum_i w_i g_i``: ``g_i`` is the gradient of
    example i's own loss, ``w_i`` its clip weight (Abadi et al. 2016, arXiv:1607.00133, algorithm 1). Noise is
    :class:`dpcompile.DPOptimizer`'s part.

    **Guarantee.** One example changes the clipped sum over all parameters by at most ``max_grad_norm``, or the model is
    refused. The loss computed outside the model must be a sum or mean of one loss per example; this cannot be seen from
    here (see docs/sharp_edges.md, and :func:`dpcompile.compile_step`, which proves it).

    Args:
        model: the model, or its class. It is not changed; the result shares its parameters and buffers.
        max_grad_norm: C.
        clipping: "flat", "automatic", "per_layer", "per_block", or a function from norms ``[B]`` to weights ``[B]``;
            see :func:`dpcompile.clipping.weights.clip_weights` and :func:`dpcompile.proof.functions.proven`.
        norm: "auto" chooses the fastest rule per parameter; "ghost", "instantiate" (per-example gradients, kept),
            "redo" (the same, dropped) and "direct" (the same, a tile at a time) force one where it exists; other names
            are those of published algorithms (:data:`dpcompile.planning.modes.MODES`).
        in_dims: the dimension of each input that holds the examples, as in ``torch.func.vmap``; None for an input that
            is the same for all. One entry for all, one per positional argument, or a dict by argument name.
        loss_reduction: "mean" if the loss is a mean over the batch (its 1/B is undone before clipping), or "sum".
        backend: "inductor", or "eager" to run the rewritten graph uncompiled.
        dynamic: as in ``torch.compile``: True for symbolic sizes and numbers, False for fixed ones, None to find out.
        memory_budget: None; a float: this multiple of the plain step's peak memory; an int: bytes for the whole step.
            The batch may then run in parts (:mod:`dpcompile.runtime.parts`), a model in regions in two backward passes
            (:mod:`dpcompile.planning.region_memory`). With None, memory on CPUs stays mapped between
            steps (:mod:`dpcompile.kernels.workspace`).
        check: compare the first step with ``torch.func.vmap(grad)`` and raise on a difference.
        regions: None compiles the model as one graph; "blocks" compiles each element of repeated containers by itself
            (``ModuleList``, ``Sequential``), equal ones once, and clips when the whole backward is over; "breaks"
            allows graph breaks, between which Python runs that computes nothing with examples. A model under FSDP2's
            ``fully_shard`` is always compiled in its units.
        verify: under Inductor, compare what each graph was compiled to with the graph itself, run uncompiled, on its
            first batch, and raise in the backward where they differ by more than rounding can explain
            (:mod:`dpcompile.runtime.verify`). It costs one uncompiled step per graph.
        examples_per_user: k: each k rows of a batch, one after the other, are one user's, and users take the place of
            examples: ``g_i`` is the gradient of the sum of user i's losses, users never mix, rows of one may. Sizes are
            fixed then (``dynamic=False``). :class:`dpcompile.PoissonLoader` with ``groups`` gives such batches.
        pipeline: the model is a stage of a pipeline of ``torch.distributed.pipelining``: the group of its
            ``PipelineStage``, a mesh of one dimension, or True for all ranks. Norms are those over all stages
            (:mod:`dpcompile.runtime.stages`).
        untied: of a stage: its parameters are copies of none in other stages, though some start from the same values
            (both stages were initialised from one seed). Without it a parameter that equals another stage's bit by bit
            is refused, as a head tied to an embedding would be trained as two parameters.

    Returns:
        A module of the model's own class and signature with, in addition, ``grad_norms``, ``plan``, ``graph``,
        ``certificate`` and ``trace``; type checkers know these behind ``assert isinstance(model,
        dpcompile.PrivateModule)``.

    Raises:
        PrivacyError: a clipping bound or rule that makes no sense.
        DPCompileError: other options that do not.
    """
    validate_clipping(clipping, max_grad_norm)
    _one_of("norm", norm, NORM_MODES)
    _one_of("loss_reduction", loss_reduction, ("mean", "sum"))
    _one_of("backend", backend, ("inductor", "eager"))
    if regions is not None:
        _one_of("regions", regions, ("blocks", "breaks"))
    _validate_budget(memory_budget)
    dynamic = _validate_users(examples_per_user, dynamic)
    options = Options(
        max_grad_norm, clipping, norm, in_dims, loss_reduction, backend, dynamic, memory_budget, check, regions, verify,
        examples_per_user, pipeline=None if pipeline is None or pipeline is False else group_of(pipeline),
        untied=untied,
    )  # fmt: skip
    check_pipeline(options)
    if model is None:
        return lambda decorated: _private(decorated, options)
    return _private(model, options)


def _private(model: Any, options: Options) -> Any:
    if isinstance(model, PrivateModule) or (isinstance(model, type) and issubclass(model, PrivateModule)):
        raise PrivacyError(
            "the model is private already: its gradients would be clipped twice",
            remedy="call dp_compile on the undecorated model, once",
        )
    if isinstance(model, type) and issubclass(model, nn.Module):
        return private_class(model, options)
    if isinstance(model, nn.Module):
        refuse_wrapped(model)
        return private_view(model, options)
    raise DPCompileError(
        f"dp_compile takes an nn.Module or a class of one, got {type(model).__name__}",
        remedy="put a function and its parameters into an nn.Module",
    )


def _one_of(option: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise DPCompileError(f"unknown {option} {value!r}", remedy=f"use one of {', '.join(map(repr, allowed))}")


def _validate_users(examples_per_user: int, dynamic: bool | None) -> bool | None:
    if isinstance(examples_per_user, bool) or not isinstance(examples_per_user, int) or examples_per_user < 1:
        raise DPCompileError(
            f"examples_per_user must be an integer, 1 or more, got {examples_per_user!r}",
            remedy="say how many rows of a batch, one after the other, are one user's; 1: every row is an example",
        )
    if examples_per_user > 1 and dynamic:
        raise DPCompileError(
            "dynamic=True with examples_per_user: users are told apart by sizes that are known when the graph is made",
            remedy="leave dynamic out; batches of other sizes are compiled anew",
        )
    return False if examples_per_user > 1 else dynamic


def _validate_budget(budget: float | int | None) -> None:
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not (budget > 0 and math.isfinite(budget)):
        raise DPCompileError(
            f"memory_budget must be None or a positive number, got {budget!r}",
            remedy="give a float, a multiple of the plain step's peak, or an int, bytes; or leave it out",
        )
