"""The engine of a model that is compiled in regions: one for each unit, and for what lies between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dpcompile._torch import pytree
from dpcompile.batches.draws import Given
from dpcompile.capture.tracing import tracing_config
from dpcompile.clipping.groups import clip_groups
from dpcompile.distributed.ranks import refuse_other_place
from dpcompile.distributed.shards import local_part, zeros_for
from dpcompile.distributed.tensor_parallel import NormsOverRanks, find_tensor_parallel
from dpcompile.errors import PrivacyError, UnsupportedGraphError
from dpcompile.graph.labels import Examples, Label, Shared
from dpcompile.options import Lowering, Options
from dpcompile.planning.modes import MODES
from dpcompile.planning.plan import Plan
from dpcompile.proof.functions import ProvenClipping
from dpcompile.regions.backward import Outcome, Pass, WholeSums
from dpcompile.regions.fsdp import ShardedSums, check_sharded, clear_failed
from dpcompile.regions.graph_breaks import check_hooks_between, compiled_alone
from dpcompile.regions.graphs import Frame, RegionGraphs
from dpcompile.regions.owners import Owners
from dpcompile.regions.rank_parts import RankParts
from dpcompile.regions.region import Scope
from dpcompile.regions.replayed import end_forward
from dpcompile.regions.units import Unit, find_units, is_sharded, one_unit, stubs
from dpcompile.runtime.changing_numbers import constants_where_needed
from dpcompile.runtime.engine import Engine, with_own_code
from dpcompile.runtime.example_memory import held_tensors
from dpcompile.runtime.random_state import Snapshot
from dpcompile.runtime.translate import translated

__all__ = ["RegionEngine"]


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module(*args, **kwargs)


def _forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return type(module).forward(module, *args, **kwargs)


class RegionEngine(Engine):
    """Compiles the units of a model one by one; equal ones share what was compiled.

    The model's own graph calls its units and is cut at these calls. Labels of the proof pass from piece to piece with
    the values; norms meet in a :class:`dpcompile.regions.backward.Pass`.

    Attributes:
        graphs: what was compiled.
        lowering: in how many passes the backward runs, and why; empty if nobody asked.
    """

    def __init__(self, module: nn.Module, options: Options) -> None:
        super().__init__(module, options)
        self._sharded = any(is_sharded(m) for m in module.modules())
        if self._sharded and options.check:
            raise UnsupportedGraphError(
                "check=True compares with torch.func.vmap on whole parameters, and FSDP holds them in parts",
                remedy="check the model on one process before fully_shard",
            )
        parallel = find_tensor_parallel(self._parameters, fsdp=self._sharded)
        self._rank_parts = RankParts(parallel)
        two_pass = MODES[options.norm].second_backward
        if parallel is not None and options.check:
            raise UnsupportedGraphError(
                "check=True compares with torch.func.vmap on whole parameters, and tensor parallelism holds parts",
                remedy="check the model on one process before parallelize_module",
            )
        if parallel is not None and two_pass:
            raise UnsupportedGraphError(
                f"norm={options.norm!r} has two backward passes, and under tensor parallelism there is one",
                remedy="use one backward: norm='auto', 'book_keeping', 'bk_mixed_ghost'",
            )
        if parallel is not None and options.regions == "breaks":
            raise UnsupportedGraphError(
                "regions='breaks' under tensor parallelism: what Python does between graphs could differ from rank to "
                "rank, and nothing would tell",
                remedy="remove the graph breaks, and leave regions out or use regions='blocks'",
            )
        self._owners = Owners(module)
        self.graphs = RegionGraphs(
            options,
            self.kept,
            self.note_given,
            self._run_unit,
            self.check_live,
            self.replicas.apart,
            self._rank_parts,
            self._owners,
        )
        self.graphs.two_pass = two_pass
        self.lowering = f"two passes: forced by norm={options.norm!r}" if two_pass else ""
        self._root: Unit | None = None
        self._trained: tuple[str, ...] = ()
        self._lowerings: dict[Any, tuple[Lowering, tuple[str, ...]]] = {}
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._clipping = ProvenClipping(options.clipping, options.max_grad_norm)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Given | None = None) -> Any:
        """One call of the compiled module."""
        self._current, self._given = (args, kwargs), given or Given()
        self.first_step = self._recorder()
        try:
            if self._given.reduces is None:
                self.replicas.notice(tracing=self._tracing)
            with tracing_config(regions=True, dynamic=self.options.dynamic):
                return self._run_model(args, kwargs) if self._decided() else self._decide(args, kwargs)
        except Exception as error:
            refusal = translated(error, self._example_dims)
            if refusal is None:
                raise
            raise refusal.with_traceback(None) from None
        finally:
            if self.graphs.whole is not None:
                self.graphs.shared |= self.graphs.whole.repeated  # the next forward is compiled for it
            self._current, self.first_step, self.graphs.whole = ((), {}), None, None
            self._given = Given()
            self.graphs.frames.clear()
            self.graphs.held = {}
            self._rank_parts.forget()
            self.transformed = self.graphs.transformed

    def trace(self, *args: Any, **kwargs: Any) -> None:
        """Compile for these arguments. Regions have to run forward for that; nothing is kept."""
        mask, masked, unchecked = self._mask, self._masked, self._unchecked
        self._unchecked = False
        self._mask, self._masked = None, False
        try:
            with torch.enable_grad():
                self._call(args, kwargs)
        finally:
            self._mask, self._masked, self._unchecked = mask, masked, unchecked

    @property
    def sharded(self) -> bool:
        """Whether the parameters are FSDP2's."""
        return self._sharded

    @property
    def distributed(self) -> bool:
        """Whether parameters lie on several ranks in parts, or clipped sums are added up over them."""
        return super().distributed or self._rank_parts.parallel is not None

    @property
    def data_ranks(self) -> int:
        """How many ranks, or groups of ranks, have examples of their own."""
        return super().data_ranks if self._rank_parts.parallel is None else self._rank_parts.parallel.data_ranks

    @property
    def compilations(self) -> int:
        """How many graphs were compiled."""
        return self.graphs.compilations

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Of every graph with trainable parameters, equal ones once."""
        return self.graphs.plans

    def _run_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._root is None:
            single = self._rank_parts.parallel is not None and not self.sharded and self.options.regions is None
            breaks = self.graphs.breaks
            self._root = one_unit(self.module) if single else find_units(self.module, blocks=not breaks)
            self.graphs.shared |= self._owners.with_two_names() if breaks else self._owners.tied(self._root)
            if self.sharded:
                check_sharded(self._root, self._parameters)
        if self.sharded:
            clear_failed(self._root)
        trained = tuple(self.trainable())
        if trained != self._trained:
            self._trained, self._lowerings = trained, {}
            self.graphs.groups = clip_groups(trained, self.options.clipping)
        self.graphs.proving = torch.is_grad_enabled() and bool(trained)
        dims = self._example_dims()
        scope = Scope({id(p): n for n, p in self._parameters.items()})
        given: list[Label | None] = []
        for name, tensor, dim in dims:
            given.append(Shared() if dim is None else Examples(dim % tensor.ndim))
            scope.note(tensor, name, given[-1])  # type: ignore[arg-type]
        if self.graphs.proving:
            self._rank_parts.check_copies(self.module)
            self.graphs.whole = self._new_pass(dims)
            if self.graphs.breaks:
                self.graphs.watch_anew(held_tensors(self.module))
        elif self.graphs.breaks:
            self.graphs.follow_anew()
        self.kept.note_arguments((t for _, t, dim in dims if dim is not None), trained=self.graphs.proving)
        self.kept.numbers.begin()
        self.graphs.ran = False
        result, labels = self._run_unit(self._root, args, kwargs, given)
        self.kept.numbers.settle(result, ran=self.graphs.ran)
        if self.graphs.whole is not None:
            self.graphs.whole.seal()
            self.graphs.shared |= self.graphs.whole.repeated
            if self.graphs.two_pass:
                result = end_forward(self.graphs.whole, result)
            self.kept.check_buffers(self.module)
            tensors = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
            self._output_labels = {id(x): label for x, label in zip(tensors, labels, strict=True)}
            if self.first_step is not None:
                self.first_step.label(tensors, labels)
                self.first_step.watch(result)
        return result

    # --- the lowering

    def _decided(self) -> bool:
        """Whether it is known in how many passes the backward runs."""
        unasked = self.options.memory_budget is None or bool(self.lowering)
        return unasked or not (torch.is_grad_enabled() and self.trainable())

    def _decide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first forward under a memory budget: on every rank it runs again if one of them needs two passes."""
        budget = self.options.memory_budget
        assert budget is not None
        mask, masked, before = self._mask, self._masked, Snapshot.of(self.module)
        self.graphs.memory = []
        result = self._run_model(args, kwargs)
        tensors = (*self._parameters.values(), *(t for _, t, _ in self._example_dims()))
        standing = sum(local_part(t.detach()).nbytes for t in tensors)
        self.lowering = self.graphs.choose(budget, standing, sharded=self.sharded)
        if not self.graphs.two_pass:
            return result
        del result
        self._functions.clear()
        self._mask, self._masked = mask, masked
        before.restore()
        return self._run_model(args, kwargs)

    # --- units -------------------------------------------------------------------------------------------------------

    def _run_unit(
        self, unit: Unit, args: Any, kwargs: Any, given: list[Label | None], recompute: bool = False
    ) -> tuple[Any, list[Label]]:
        """Run a unit; the labels are those of the tensors among the arguments, and among the results, in order."""
        if not unit.sharded:
            return self._run_compiled(unit, _call, args, kwargs, given, recompute)
        found: list[list[Label]] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            del unit.module.__dict__["forward"]
            try:
                result, labels = self._run_compiled(unit, _forward, args, kwargs, given, recompute)
            finally:
                unit.module.__dict__["forward"] = forward
            found.append(labels)
            return result

        unit.module.__dict__["forward"] = forward
        try:
            result = unit.module(*args, **kwargs)
        finally:
            unit.module.__dict__.pop("forward", None)
        (labels,) = found
        return result, labels

    def _run_compiled(
        self,
        unit: Unit,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        given: list[Label | None],
        recompute: bool,
    ) -> tuple[Any, list[Label]]:
        scope = Scope(self._names(unit), self.graphs.shared)
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        assert len(tensors) == len(given), "arguments changed on the way to a block"
        for i, (tensor, label) in enumerate(zip(tensors, given, strict=True)):
            scope.note(tensor, f"argument {i} of {unit.path or 'the model'}", label or Shared())
            if self.graphs.breaks and not (label is None or isinstance(label, Shared)):
                self.kept.note_arguments([tensor])
        if not unit.path:
            for name, tensor, dim in self._example_dims():
                if dim is not None and scope.label(tensor) is not None:
                    scope.note(tensor, name, scope.label(tensor))  # type: ignore[arg-type]
        compiled = self._function(unit, function, given)
        self.graphs.frames.append(Frame(unit, scope, recompute))
        try:
            with stubs(unit.children), self._python_between(unit):
                result = compiled(unit.module, args, kwargs)
            if self.graphs.breaks and self.graphs.proving:
                self.graphs.between.check()
                given_ids = {id(x) for x in tensors}
                check_hooks_between([t for i, (t, _, _) in scope.tensors.items() if i not in given_ids])
        finally:
            self.graphs.frames.pop()
        return result, [self._result_label(unit, scope, x) for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]

    @contextmanager
    def _python_between(self, unit: Unit) -> Iterator[None]:
        """Where graph breaks are allowed, watch what runs between the graphs of a unit."""
        if not self.graphs.breaks:
            yield
            return
        if not self.graphs.proving:
            with self.graphs.between.watching():
                yield
            return
        with compiled_alone(unit.module, [c.module for c in unit.children]), self.graphs.between.watching():
            yield

    def _names(self, unit: Unit) -> dict[int, str]:
        """The parameters as the unit holds them now: under FSDP2 those that were gathered for it, and no others."""
        if not unit.sharded:
            return {id(p): n for n, p in self._parameters.items()}
        prefix = f"{unit.path}." if unit.path else ""
        within = tuple(f"{child.path}." for child in unit.children)
        held = ((prefix + n, p) for n, p in nn.Module.named_parameters(unit.module))
        own = ((n, p) for n, p in held if n in self._parameters and not n.startswith(within))
        return {id(p): n for n, p in own if self._rank_parts.gathered(p)}

    def _result_label(self, unit: Unit, scope: Scope, value: Tensor) -> Label:
        label = scope.label(value)
        if label is not None:
            return label
        if id(value) in scope.parameters or not self.graphs.proving or not value.requires_grad:
            return Shared()
        raise UnsupportedGraphError(
            f"{unit.path or 'the model'} returns a tensor that needs a gradient and that no compiled graph made",
            remedy="remove hooks that change what the module returns",
        )

    def _function(self, unit: Unit, function: Callable[..., Any], given: Sequence[Label | None]) -> Callable[..., Any]:
        """The compiled call for units of this kind, arguments that lie like this, and these trainable parameters."""
        own = {n: p for n, p in nn.Module.named_parameters(unit.module, remove_duplicate=False)}
        key = (
            type(unit.module),
            unit.handle if unit.children else None,
            function,
            self.graphs.proving,
            tuple(map(str, given)),
            tuple((n, p.requires_grad) for n, p in own.items()),
            self._lowering(unit),
            tuple(m.training for m in unit.module.modules()),
        )
        if key not in self._functions:
            copied = with_own_code(function, type(unit.module).__name__)
            self.graphs.codes.add(copied.__code__)
            breaks = self.graphs.breaks
            dynamic = False if unit.children or breaks else self.options.dynamic
            self._functions[key] = torch.compile(
                copied, backend=constants_where_needed(self.graphs.backend), fullgraph=not breaks, dynamic=dynamic
            )
        return self._functions[key]

    def _lowering(self, unit: Unit) -> tuple[Lowering, tuple[str, ...]]:
        """Of a unit, and its parameters that several regions use."""
        key = (unit.path, self.graphs.two_pass, len(self.graphs.shared))
        if key not in self._lowerings:
            inside = list(self._owners.inside(unit))
            shared = tuple(n for n in inside if n in self.graphs.shared)
            own = set(inside)
            self._lowerings[key] = self.graphs.lowering_of([n for n in self._trained if n in own]), shared
        return self._lowerings[key]

    # --- the backward ------------------------------------------------------------------------------------------------

    def _new_pass(self, dims: Sequence[tuple[str, Tensor, int | None]]) -> Pass:
        batch = next(((t.shape[d], t.device) for _, t, d in dims if d is not None), None)
        if batch is None:
            raise UnsupportedGraphError(
                "no input of the model has an example axis",
                remedy="pass the batch as a tensor argument of the call; in_dims says which dimension holds the "
                "examples",
            )
        options = replace(self.options, clipping=self._clipping.of(*batch))
        refused = self.refused_backward()
        mask = self.take_mask(*batch)
        recorder, given, within = self.first_step, self._given, self.within_backward()
        reduces = self.replicas.reduces if given.reduces is None else given.reduces

        def deliver(outcome: Outcome) -> None:
            given.begin()
            if self.distributed and not self.replicas.known:
                refuse_other_place(self.place(), outcome.norms.device)
            reached = {name for name, _ in outcome.sums}
            untouched = [n for n in self.trainable() if n not in reached and self._parameters[n].grad is None]
            zeros = [(n, zeros_for(self._parameters[n])) for n in untouched]
            task = outcome.graph_task if within is None else within
            self.replicas.deliver(outcome.sums, zeros, graph_task=task, reduces=reduces)
            self.note_norms(outcome.norms, outcome.mask, more=given.more)
            if recorder is not None:
                recorder.compare(outcome.norms, outcome.mask, outcome.sums)
            given.end()

        sums = ShardedSums(self._root, self._parameters) if self.sharded and self._root is not None else WholeSums()
        ranks = None
        if self._rank_parts.parallel is not None:
            ranks = NormsOverRanks.of(self._rank_parts.parallel, [t for _, t, dim in dims if dim is not None] + [mask])
        return Pass(options, mask, sums, deliver, refused, ranks)

    def check_live(self, names: Sequence[str], parameters: Sequence[Tensor], sharded: bool) -> None:
        """Raise PrivacyError if a parameter is not the object that the optimizer knows, or has hooks."""
        self.check_hooks(zip(names, parameters, strict=True))
        if sharded:
            self.check_hooks((name, self._parameters[name]) for name in names)
        for name, parameter in zip(names, parameters, strict=True):
            if not sharded and parameter is not self._parameters[name]:
                raise PrivacyError(
                    f"parameter '{name}' was replaced after dp_compile: the optimizer and the ledger hold the old one",
                    remedy="call dp_compile again after changing the model, and make the optimizer from the result",
                )
