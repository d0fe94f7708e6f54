"""The module that users hold."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, fx, nn

from dpcompile._torch import pytree
from dpcompile._torch.parallel import share_fsdp_state
from dpcompile.capture.packed import refuse_returned
from dpcompile.capture.surroundings import REBUILD, refuse_tracers
from dpcompile.distributed.shards import is_distributed
from dpcompile.errors import DPCompileError, NotReadyError, PrivacyError, UnsupportedGraphError
from dpcompile.options import Options
from dpcompile.pipeline import Transformed
from dpcompile.planning.plan import Plan
from dpcompile.proof.certificate import Certificate
from dpcompile.regions.compiled import RegionPlans
from dpcompile.regions.engine import RegionEngine
from dpcompile.regions.units import is_sharded
from dpcompile.runtime.base import Engine
from dpcompile.runtime.engine import GraphEngine
from dpcompile.runtime.replicas import inner_module

__all__ = ["Engine", "PrivateModule", "engine_of", "private_class", "private_view", "set_mask"]


class PrivateModule:
    """Mixed into the model's own class: calls go through an :class:`Engine`; everything else is the model's.

    The instance shares its ``__dict__`` with the undecorated module, so parameters, buffers, submodules, hooks and
    state-dict keys are the model's own.
    """

    __slots__ = ("_engine",)
    _engine: Engine
    _options: ClassVar[Options]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled forward; its backward clips."""
        result = engine_of(self)(*args, **kwargs)
        if not isinstance(result, Tensor):
            refuse_returned(pytree.tree_leaves(result))
        return result

    def trace(self, *args: Any, rates: str | None = None, **kwargs: Any) -> Plan | RegionPlans | None:
        """Compile for these arguments without running, so that plan, graph and certificate can be read.

        Args:
            *args: of a call.
            rates: None; or the name of a machine that need not be there
                (:data:`dpcompile.kernels.data_sheets.MACHINES`: "a100", "h100", "h200"). Then nothing is compiled and
                :attr:`plan` stays what it was: the plan for that machine is returned, by rates of its data sheet, with
                the predicted time and peak of memory. Model and arguments may be on any device, the meta device too. A
                model whose forward has an argument ``rates`` itself cannot be traced so.
            **kwargs: of a call.

        Returns:
            The plan; None if nothing is trained.

        Raises:
            DPCompileError: there is no machine of this name, or the model is refused.
        """
        engine = engine_of(self)
        if rates is not None and "rates" not in inspect.signature(engine.module.forward).parameters:
            if not isinstance(engine, GraphEngine):
                raise DPCompileError(
                    "plans for another machine are made of models in one graph, on one rank",
                    remedy="leave regions, fully_shard and parallelize_module out, or plan for a block by itself",
                )
            return engine.plan_for(rates, args, kwargs)
        engine.trace(*args, **kwargs, **({} if rates is None else {"rates": rates}))
        return None if engine.transformed is None else self.plan

    @property
    def grad_norms(self) -> Tensor:
        """Norms of the last backward, before clipping: float32, one for each row that is an
        example and no padding, in the order of the batch. Not private.
        """
        norms = engine_of(self).grad_norms
        if norms is None:
            raise NotReadyError("there are no gradient norms yet", remedy="call loss.backward() first")
        return norms

    @property
    def plan(self) -> Plan | RegionPlans:
        """The rule of every gradient site; print it. Of a model in regions: of each region, equal ones once."""
        transformed, engine = _transformed(self), engine_of(self)
        return RegionPlans(engine.plans, engine.lowering) if isinstance(engine, RegionEngine) else transformed.plan

    @property
    def graph(self) -> fx.GraphModule:
        """The rewritten joint graph; ``.print_readable()``."""
        return _transformed(self).graph

    @property
    def certificate(self) -> Certificate:
        """The proof that examples never mix; print it."""
        return _transformed(self).certificate

    if not TYPE_CHECKING:  # to a type checker every name would be one of ours

        def __getattr__(self, name: str) -> Any:
            """Python asks for what raised an AttributeError again, and ``nn.Module`` has no better answer than ours."""
            own = vars(PrivateModule).get(name)
            return own.__get__(self) if isinstance(own, property) else super().__getattr__(name)

    def report(self, delta: float) -> Any:
        """``report`` of the :class:`dpcompile.DPOptimizer` that steps on the attached loader's draws.

        Raises:
            PrivacyError: none is attached, or what that raises.
        """
        feed = engine_of(self).feed
        optimizer = None if feed is None else feed.optimizer
        if optimizer is None:
            raise PrivacyError(
                "the model does not know who steps on its sums: no loader is attached to it and its optimizer",
                remedy="call optimizer.report(delta) of the DPOptimizer",
            )
        return optimizer.report(delta)

    def __dir__(self) -> list[str]:
        """Without what is not there yet: tools that read every attribute, such as ``torch.jit.trace``, go on."""
        engine, missing = engine_of(self), set()
        if engine.transformed is None:
            missing |= {"plan", "graph", "certificate"}
        if engine.grad_norms is None:
            missing.add("grad_norms")
        return [name for name in super().__dir__() if name not in missing]

    def __prepare_scriptable__(self) -> Any:
        """What ``torch.jit.script`` calls first."""
        raise UnsupportedGraphError("a private model cannot be scripted by torch.jit", remedy=REBUILD)

    def _replicate_for_data_parallel(self) -> Any:
        raise UnsupportedGraphError(
            "nn.DataParallel copies the model to several devices, and the copies' gradients would not be clipped",
            remedy="use DistributedDataParallel(dp_compile(model)), one process per device",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if hasattr(type(self), "_options"):  # an instance of a decorated class
            copied = type(self).__new__(type(self))
            memo[id(self)] = copied
            object.__setattr__(copied, "__dict__", copy.deepcopy(self.__dict__, memo))
            return copied
        engine = engine_of(self)
        return private_view(copy.deepcopy(engine.module, memo), engine.options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if hasattr(type(self), "_options"):
            return _private_instance, (type(self),), dict(self.__dict__)
        engine = engine_of(self)
        return private_view, (engine.module, engine.options)


def private_view(module: nn.Module, options: Options) -> Any:
    """An object of a subclass of the module's class that shares its state and compiles its calls.

    Args:
        module: of the user.
        options: of the user.
    """
    kind = type(module)
    private = type(kind.__name__, (PrivateModule, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
    view = object.__new__(private) if is_sharded(module) else private.__new__(private)
    object.__setattr__(view, "__dict__", module.__dict__)
    object.__setattr__(view, "_engine", _engine(module, options))
    if options.pipeline is not None and is_sharded(module):
        share_fsdp_state(view, module)  # schedules call methods of FSDP on their stage's module
    return view


def _private_instance(kind: Any) -> Any:
    """An instance of a decorated class, without its state."""
    return kind.__new__(kind)


def private_class(kind: type[nn.Module], options: Options) -> type:
    """A subclass whose instances compile their calls; the class itself may be subclassed further."""
    return type(
        kind.__name__,
        (PrivateModule, kind),
        {
            "__module__": kind.__module__,
            "__doc__": kind.__doc__,
            "__qualname__": kind.__qualname__,
            "_options": options,
        },
    )


def _engine(module: nn.Module, options: Options) -> Engine:
    sharded = any(is_sharded(m) for m in module.modules())
    sharded = sharded or any(is_distributed(p) for p in module.parameters())
    regions = sharded or options.regions is not None or options.pipeline is not None
    return RegionEngine(module, options) if regions else GraphEngine(module, options)


def _undecorated(model: Any) -> nn.Module:
    """The same module with the calls and look-ups of an ordinary one, on the same state."""
    kind = type(model)
    own = {"__call__": nn.Module.__call__, "__getattr__": cast(Any, super(PrivateModule, model)).__getattr__.__func__}
    plain = type(kind.__name__, (kind,), own)
    module = plain.__new__(plain)
    object.__setattr__(module, "__dict__", model.__dict__)
    return module


def engine_of(model: Any) -> Engine:
    """The engine of a private module, or of one inside DistributedDataParallel.

    Raises:
        PrivacyError: an ordinary module, whose gradients nobody clips.
    """
    engine: Engine | None = None
    outer, model = model, inner_module(model)
    if isinstance(model, PrivateModule):
        engine = getattr(model, "_engine", None)
        if engine is None:  # an instance of a decorated class, used for the first time
            refuse_tracers()  # they put functions of their own into nn.Module for a while
            engine = _engine(_undecorated(model), model._options)
            object.__setattr__(model, "_engine", engine)
    if engine is None:
        raise PrivacyError(
            f"{type(model).__name__} is not a private model: nothing clips its gradients",
            remedy="wrap it first: model = dp_compile(model, max_grad_norm=1.0)",
        )
    if outer is not model:
        engine.replicas.join(outer)
    return engine


def set_mask(model: Any, mask: Tensor | None) -> None:
    """Say which rows of the next batch are examples, in a loop whose batches no attached loader hands out.

    Args:
        model: a private model, or one inside DistributedDataParallel.
        mask: bool ``[B]``, True for an example and False for padding, which gets weight 0 (a row of a user who has
            others is left out of the user's loss). From then on every forward with gradients needs a mask of its own,
            used once; None ends that.

    Raises:
        PrivacyError: a mask of another kind, or a model whose batches a loader hands out with their masks.
    """
    engine = engine_of(model)
    if engine.draws is not None:
        raise PrivacyError(
            "a loader is attached to the model, and hands its batches out with their masks",
            remedy="iterate over the loader and leave the mask to it, or do not attach one and use loader.batches()",
        )
    engine.set_mask(mask)


def _transformed(model: Any) -> Transformed:
    transformed = engine_of(model).transformed
    if transformed is None:
        raise NotReadyError(
            "nothing is compiled yet", remedy="call the model once, or model.trace(*example_inputs), then look"
        )
    return transformed
