"""A drawn batch larger than the physical one: several forwards behind one call, each run again in the backward.

The call returns what the forwards return, put together; nothing else of them is kept. When the cotangents arrive, each
part runs forward again, with the same random numbers and under the same autocast, and then backward. So the memory of
activations is that of one physical batch, whatever was drawn, for the price of one forward more (activation
checkpointing, Chen et al. 2016, arXiv:1604.06174, with the physical batch as the segment).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpcompile._torch import pytree
from dpcompile.errors import UnsupportedGraphError
from dpcompile.graph.labels import Examples, Label, Shared, Summed, Whole
from dpcompile.runtime.autocast import Autocast
from dpcompile.runtime.loss_scale import scaled_like_this
from dpcompile.runtime.parts import OfSeveralForwards, split_call
from dpcompile.runtime.random_state import RandomState
from dpcompile.runtime.watched_loss import watch_loss

__all__ = ["Ran", "in_turns"]

_LARGER = (
    "give make_private a physical_batch_size as large as the largest draw, or take the physical batches one by one: "
    "`for batch in loader.parts()`"
)


@dataclass(frozen=True, slots=True)
class Ran:
    """What one forward returned.

    Attributes:
        result: of the model.
        labels: ``id(tensor)`` -> how the examples lie in it.
    """

    result: Any
    labels: Mapping[int, Label]


def in_turns(
    forward: Callable[[int, tuple[Any, ...], dict[str, Any], bool], Ran],
    module: nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    dims: Sequence[tuple[str, Tensor, int | None]],
    turns: int,
    *,
    mean: bool,
    begin: Callable[[], None],
    end: Callable[[], None],
) -> Any:
    """Run a call in parts of one size, each by itself.

    Args:
        forward: runs the model, with gradients, on the part of this index, for the first time or again; its backward
            delivers that part's sums.
        module: for the buffers that a forward may not write to here.
        call: positional and keyword arguments, of ``turns`` times the physical batch.
        dims: ``(name, tensor, example dimension)`` of the call's tensors.
        turns: how many parts.
        mean: losses are means over the batch: the cotangents of a part are made those of the part's own mean.
        begin: called before the first part's backward.
        end: called when every part had its backward.

    Returns:
        What the model returns for the whole batch: tensors with examples are put together, sums over the examples
        added up (of means: their mean).

    Raises:
        UnsupportedGraphError: a forward that writes to a buffer, that returns what cannot be put together, or, in the
            backward, that returns something else the second time.
    """
    needing = [t for _, t, _ in dims if t.requires_grad]
    run = _Turns(forward, module, list(split_call(*call, dims, turns)), mean, begin, end)
    anchor = torch.zeros((), requires_grad=True)
    differentiable = iter(_InTurns.apply(run, anchor, *needing))  # type: ignore[misc]
    if needing:
        run.inputs = [dim for _, t, dim in dims if t.requires_grad]
    leaves = [next(differentiable) if need else x for x, need in zip(run.leaves, run.needs, strict=True)]
    watch_loss(leaves, {id(x): label for x, label in zip(leaves, run.labels, strict=True) if label is not None})
    return pytree.tree_unflatten(leaves, run.structure)


@dataclass(eq=False, slots=True)
class _Turns:
    forward: Callable[[int, tuple[Any, ...], dict[str, Any], bool], Ran]
    module: nn.Module
    pieces: list[tuple[tuple[Any, ...], dict[str, Any]]]
    mean: bool
    begin: Callable[[], None]
    end: Callable[[], None]
    states: list[RandomState] = field(default_factory=list)
    autocast: Autocast | None = None
    structure: Any = None
    leaves: list[Any] = field(default_factory=list)
    labels: list[Label | None] = field(default_factory=list)
    needs: list[bool] = field(default_factory=list)
    sizes: list[list[int]] = field(default_factory=list)
    inputs: list[int | None] = field(default_factory=list)

    def run(self) -> list[Tensor]:
        """Every part's forward; returns the differentiable leaves of the result."""
        columns: list[list[Any]] = []
        self.autocast = Autocast.now(self._tensors(0))
        for index, (args, kwargs) in enumerate(self.pieces):
            self.states.append(RandomState.now(self._tensors(index)))
            before = {name: b._version for name, b in self.module.named_buffers()}
            with torch.enable_grad():
                ran = self.forward(index, args, kwargs, False)
            self._refuse_writes(before)
            leaves, structure = pytree.tree_flatten(ran.result)
            if index and structure != self.structure:
                raise UnsupportedGraphError(
                    "a draw larger than the physical batch runs in several forwards, and they return values in other "
                    f"containers: {self.structure}, then {structure}",
                    remedy=_LARGER,
                )
            self.structure = structure
            self.labels = [_of_one(x, ran.labels.get(id(x))) if isinstance(x, Tensor) else None for x in leaves]
            self.needs = [isinstance(x, Tensor) and x.requires_grad for x in leaves]
            columns.append([x.detach() if isinstance(x, Tensor) else x for x in leaves])
            del ran, leaves
        self.leaves = [self._together(i, list(values)) for i, values in enumerate(zip(*columns, strict=True))]
        return [x for x, need in zip(self.leaves, self.needs, strict=True) if need]

    def run_again(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Every part's forward and backward; returns the gradients of inputs that need one."""
        given = iter(cotangents)
        whole = [next(given) if need else None for need in self.needs]
        found: list[list[Tensor]] = []
        self.begin()
        for index, (args, kwargs) in enumerate(self.pieces):
            args, kwargs, inputs = _leaves_of_their_own(args, kwargs)
            with self.states[index].replayed(), torch.enable_grad():
                with nullcontext() if self.autocast is None else self.autocast.again():
                    ran = self.forward(index, args, kwargs, True)
                leaves = pytree.tree_leaves(ran.result)
                self._refuse_other_result(index, leaves)
                pairs = [
                    (x, self._part_of(c, place, index))
                    for place, (x, c) in enumerate(zip(leaves, whole, strict=True))
                    if c is not None
                ]
                del ran, leaves
                scaled_like_this([x for x, _ in pairs])
                torch.autograd.backward([x for x, _ in pairs], [c for _, c in pairs])
                del pairs
            found.append([torch.zeros_like(x) if x.grad is None else x.grad for x in inputs])
        self.end()
        columns = zip(*found, strict=True)
        return [sum(c) if d is None else torch.cat(c, d) for c, d in zip(columns, self.inputs, strict=True)]  # type: ignore[misc]

    def _tensors(self, index: int) -> list[Any]:
        return [*self.module.parameters(), *pytree.tree_leaves(self.pieces[index])]

    def _together(self, place: int, values: list[Any]) -> Any:
        label, first = self.labels[place], values[0]
        if isinstance(label, Examples) and label.outer == 1:
            self.sizes.append([v.shape[label.dim] for v in values])
            return torch.cat(values, dim=label.dim)
        self.sizes.append([])
        if isinstance(label, Summed):
            total = torch.stack(values).sum(0)
            return total / len(values) if self.mean else total
        same = isinstance(first, (type(None), bool, int, float, str)) and all(_equal(v, first) for v in values)
        if isinstance(first, Tensor) and isinstance(label, Shared):
            same = all(isinstance(v, Tensor) and torch.equal(v, first) for v in values)
        if same:
            return first
        if not isinstance(first, (Tensor, type(None), bool, int, float, str)):
            return OfSeveralForwards(type(first), len(values))
        raise UnsupportedGraphError(
            f"a draw larger than the physical batch runs in {len(values)} forwards, and what they return cannot be put "
            f"together: {f'a tensor that is {label}' if isinstance(first, Tensor) else type(first).__name__}",
            remedy=f"return tensors with an example axis, or {_LARGER}",
        )

    def _part_of(self, cotangent: Tensor, place: int, index: int) -> Tensor:
        """The cotangent of one part's output, as if the loss were that of the part alone."""
        label, count = self.labels[place], len(self.pieces)
        if not isinstance(label, Examples):
            return cotangent  # of a mean: 1 / count for the mean of the parts, times count for the part's own
        sizes = self.sizes[place]
        part = cotangent.narrow(label.dim, sum(sizes[:index]), sizes[index])
        return part * count if self.mean else part

    def _refuse_writes(self, before: Mapping[str, int]) -> None:
        for name, buffer in self.module.named_buffers():
            if before.get(name) != buffer._version:
                raise UnsupportedGraphError(
                    f"the model writes to its buffer '{name}', and a draw larger than the physical batch runs forward "
                    "several times: it would be written more than once a step",
                    remedy=_LARGER,
                )

    def _refuse_other_result(self, index: int, leaves: Sequence[Any]) -> None:
        for place, (now, whole) in enumerate(zip(leaves, self.leaves, strict=True)):
            label = self.labels[place]
            if not isinstance(label, Examples) or whole._version != 0:
                continue
            sizes = self.sizes[place]
            before = whole.narrow(label.dim, sum(sizes[:index]), sizes[index])
            alike = now.dtype == before.dtype and now.shape == before.shape
            if not alike or not torch.allclose(now.detach(), before, rtol=1e-3, atol=1e-5, equal_nan=True):
                raise UnsupportedGraphError(
                    "a draw larger than the physical batch runs forward twice, and the second time the model returned "
                    "something else: it depends on what changes from call to call (a counter, a generator of its own)",
                    remedy=f"pass what changes as an argument, or {_LARGER}",
                )


def _equal(a: Any, b: Any) -> bool:
    """Of numbers, strings and None; not a number is equal to itself."""
    return type(a) is type(b) and (a == b or (a != a and b != b))


def _of_one(value: Tensor, label: Label | None) -> Label | None:
    """The label of what a part of one example returned, where everything belongs to that example."""
    if not isinstance(label, Whole):
        return label
    return Summed() if value.ndim == 0 else Examples(0) if len(value) == 1 else label


def _leaves_of_their_own(args: Any, kwargs: Any) -> tuple[Any, Any, list[Tensor]]:
    """The call with tensors that need gradients detached, and these."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    own = {id(x): x.detach().requires_grad_() for x in leaves if isinstance(x, Tensor) and x.requires_grad}
    args, kwargs = pytree.tree_unflatten([own.get(id(x), x) for x in leaves], structure)
    return args, kwargs, list(own.values())


class _InTurns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Turns, anchor: Tensor, *inputs: Tensor) -> Any:  # noqa: D102
        ctx.run, ctx.count = run, len(inputs)
        ctx.set_materialize_grads(False)
        return tuple(run.run())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:  # noqa: D102
        if all(c is None for c in cotangents):
            return (None,) * (2 + ctx.count)
        return (None, None, *ctx.run.run_again(cotangents))
