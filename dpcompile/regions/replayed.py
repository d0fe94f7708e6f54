"""A compiled region as one node of autograd's graph: its forward may run again, and its backward twice.

That is activation checkpointing by regions, and the two-pass lowering.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpcompile._torch import pytree
from dpcompile.errors import PrivacyError, UnsupportedGraphError
from dpcompile.regions.backward import RegionBackward, RegionRun
from dpcompile.regions.region import CompiledRegion
from dpcompile.runtime.random_state import RandomState

__all__ = ["enclose", "end_forward"]


@dataclass(eq=False, slots=True)
class _Tape:
    """A forward that autograd has recorded: what its gradient may be asked for, and its outputs."""

    leaves: list[Tensor]
    norms: Tensor | None
    outputs: list[Tensor]


@dataclass(eq=False, slots=True)
class ReplayedRegion:
    """One region of one forward.

    **Guarantee.** Every time the region runs, it computes the same: on inputs that nothing has changed since, with the
    same random numbers, forward and backward, and with what it writes to as it was before. So the clipped sums of a
    second pass are of the gradients whose norms the first pass took.

    ==========================================  ==========================================================
    edge case                                   outcome
    ==========================================  ==========================================================
    random numbers (dropout)                    drawn again from the same state
    a buffer that the region writes to          written once; runs again on a copy of what was there before
    an input or parameter changed in between    refused (its version differs)
    parameters that FSDP gathered again         the same objects; their versions say nothing
    an example of weight 0                      erased at every site, not multiplied by 0
    ==========================================  ==========================================================

    Attributes:
        region: what it was compiled to.
        inputs: what it runs on.
        whole: the forward that it is a part of.
        run: where its norms and sums go; None without trainable parameters.
        recompute: activations are not kept for the backward.
        sharded: its parameters come and go.
        needs: which outputs need a gradient.
    """

    region: CompiledRegion
    inputs: list[Any]
    whole: RegionBackward
    run: RegionRun | None
    recompute: bool
    sharded: bool
    written: Mapping[int, Tensor] = field(default_factory=dict)
    versions: Mapping[int, int] = field(default_factory=dict)
    forward_state: RandomState | None = None
    backward_state: RandomState | None = None
    needs: list[bool] = field(default_factory=list)
    tape: _Tape | None = None

    def forward(self) -> list[Any]:
        """Run; what comes out belongs to no graph of autograd yet."""
        self.forward_state = RandomState.now(self.inputs)
        written = [p for p in self.region.written if isinstance(self.inputs[p], Tensor)] if self.recompute else []
        self.written = {p: self.inputs[p].detach().clone() for p in written}
        outputs, tape = self._record(self.inputs)
        passing = {p for p in self.region.trained} if self.sharded else set()
        self.versions = {
            p: x._version
            for p, x in enumerate(self.inputs)
            if isinstance(x, Tensor) and p not in passing and p not in self.region.written
        }
        self.needs = [isinstance(x, Tensor) and x.requires_grad for x in outputs]
        if not self.recompute:
            self.tape = tape
        return [x.detach() if need else x for x, need in zip(outputs, self.needs, strict=True)]

    def backward(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the inputs that need one; norms, or clipped sums, go to the forward's backward."""
        weights, run = self.whole.weights, self.run
        if weights is None:
            self.whole.check(run)
        tape = self._replayed() if self.recompute else self.tape
        assert tape is not None
        if weights is None or self.backward_state is None:
            self.backward_state, drawing = RandomState.now(self.inputs), nullcontext()
        else:
            drawing = self.backward_state.replayed()
        last = weights is not None or self.whole.repeat is None
        found = nullcontext()
        if weights is not None and run is not None:
            found = run.lowered.second_pass(run.given, self.whole.weights_of(run))
        asked = [*tape.leaves, *(() if tape.norms is None else (tape.norms,))]
        reached = [(x, c) for x, c in zip(tape.outputs, cotangents, strict=True) if c is not None]
        with drawing, found:
            gradients: list[Tensor | None] = list(
                torch.autograd.grad(
                    [x for x, _ in reached], asked, [c for _, c in reached], allow_unused=True, retain_graph=not last
                )
            )
        if last:
            self.tape = None
        if run is not None:
            squared = gradients.pop()
            (self.whole.receive if weights is None else self.whole.receive_sums)(run, squared)
        return gradients

    def _replayed(self) -> _Tape:
        for position, version in self.versions.items():
            if self.inputs[position]._version != version:
                assert self.region.roles is not None
                name = self.region.roles.names.get(position, f"input {position}")
                raise PrivacyError(
                    f"'{name}' was changed in place between a forward and its backward, which runs the forward again",
                    remedy="change parameters and inputs only after loss.backward()",
                )
        inputs = [self.written[p].clone() if p in self.written else x for p, x in enumerate(self.inputs)]
        assert self.forward_state is not None
        with self.forward_state.replayed():
            return self._record(inputs)[1]

    def _record(self, inputs: Sequence[Any]) -> tuple[Sequence[Any], _Tape]:
        trained = set(self.region.trained)
        arguments, leaves = list(inputs), []
        for position, value in enumerate(self.inputs):
            if isinstance(value, Tensor) and value.requires_grad:
                arguments[position] = own = inputs[position].detach().requires_grad_()
                if position not in trained:
                    leaves.append(own)
        norms = None
        with torch.enable_grad():
            if self.run is not None:
                given = self.run.given
                norms = torch.zeros_like(given).requires_grad_()
                arguments += [self.whole.mask, norms, given]
            outputs = self.region.compiled(*arguments)
        return outputs, _Tape(leaves, norms, [x for x in outputs if isinstance(x, Tensor) and x.requires_grad])


def enclose(
    region: CompiledRegion,
    inputs: Sequence[Any],
    whole: RegionBackward,
    run: RegionRun | None,
    *,
    recompute: bool,
    sharded: bool,
) -> tuple[list[Any], Tensor]:
    """Run a region.

    Args:
        region: what it was compiled to.
        inputs: live.
        whole: the forward that it is a part of.
        run: of its trainable parameters, or None.
        recompute: keep its inputs alone, and run its forward again in the backward.
        sharded: it is FSDP that holds its parameters.

    Returns:
        Its outputs, and a leaf of autograd's graph that the way from the outputs through the region leads to.
    """
    replayed = ReplayedRegion(region, list(inputs), whole, run, recompute, sharded)
    trained = set(region.trained)
    before = [x for p, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad and p not in trained]
    probe = torch.empty(0, requires_grad=True)
    box: list[Any] = []
    differentiable = iter(_Enclosed.apply(replayed, box, probe, *before))  # type: ignore[misc]
    (outputs,) = box
    return [next(differentiable) if need else x for x, need in zip(outputs, replayed.needs, strict=True)], probe


class _Enclosed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, region: ReplayedRegion, box: list[Any], probe: Tensor, *before: Tensor) -> Any:  # noqa: D102
        ctx.region = region
        ctx.set_materialize_grads(False)
        outputs = region.forward()
        box.append(outputs)
        return tuple(x for x, need in zip(outputs, region.needs, strict=True) if need)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:  # noqa: D102
        if all(c is None for c in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        return (None, None, None, *ctx.region.backward(cotangents))


def end_forward(whole: RegionBackward, result: Any) -> Any:
    """What the model returns, so that its backward can be run a second time from the same cotangents.

    Raises:
        UnsupportedGraphError: tensors may be hidden in what the model returns.
    """
    leaves, structure = pytree.tree_flatten(result)
    hidden = [x for x in leaves if not isinstance(x, (Tensor, type(None), bool, int, float, str))]
    if hidden:
        raise UnsupportedGraphError(
            f"the model returns a {type(hidden[0]).__name__}: a backward in two passes starts twice from the tensors "
            "that the model returns, and those inside it would not be found",
            remedy="return tensors, in tuples, lists and dicts, or compile without memory_budget and with one backward",
        )
    needed = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    if not needed:
        return result
    outside = iter(_End.apply(whole, needed, *needed))  # type: ignore[misc]
    replaced = [next(outside) if isinstance(x, Tensor) and x.requires_grad else x for x in leaves]
    return pytree.tree_unflatten(replaced, structure)


class _End(torch.autograd.Function):
    """Notes the cotangents that a backward starts from, and how to start it again.

    Before the backward nothing that the forward holds leads to the graph, which leads to the forward: one without a
    backward is freed.
    """

    @staticmethod
    def forward(ctx: Any, whole: RegionBackward, needed: list[Tensor], *tensors: Tensor) -> Any:  # noqa: D102
        ctx.whole, ctx.needed = whole, needed
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for x in tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:  # noqa: D102
        whole: RegionBackward = ctx.whole
        whole.check(None)
        reached = [(x, c) for x, c in zip(ctx.needed, cotangents, strict=True) if c is not None]

        def repeat() -> None:
            probes = [run.probe for run in whole.received if run.probe is not None]
            torch.autograd.grad([x for x, _ in reached], probes, [c for _, c in reached], allow_unused=True)

        whole.repeat = repeat
        return (None, None, *cotangents)
