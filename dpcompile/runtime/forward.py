"""One call of a private module: what it was given, what came of it, and where it is found while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from dpcompile._torch import pytree
from dpcompile.batches.draws import Given
from dpcompile.distributed.borders import Border
from dpcompile.graph.labels import Label
from dpcompile.runtime.first_step import FirstStep
from dpcompile.runtime.parts import PartOfBatch, WholeBatch
from dpcompile.runtime.sums import Sums

__all__ = ["AwaitedBackward", "Forward", "Running"]

F = TypeVar("F")


@dataclass(eq=False, slots=True)
class Forward:
    """One call of a private module, or a part of one. It is made at the call, and nothing holds it afterwards.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        given: what a draw says of it.
        tracing: it is made to be compiled: no backward follows, no mask is used up, and ``check=True`` is not for it.
        compared: under ``check=True``, whether it is compared; None: if it is the first.
        part: of its batch.
        first_step: records it, if it is compared.
        labels: ``id(output)`` -> how the examples lie in it.
        ran: whether a compiled graph ran.
        chunk: number of the micro-batch that it is of a pipeline's batch; None: it is none.
        border: of the positional tensors, along which dimensions of the ranks' mesh they may be another one on each
            rank; empty: they are the same on all.
        hands_on: what it returns goes to another stage.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: Given = field(default_factory=Given)
    tracing: bool = False
    compared: bool | None = None
    part: PartOfBatch = field(default_factory=PartOfBatch)
    first_step: FirstStep | None = None
    labels: dict[int, Label] = field(default_factory=dict)
    ran: bool = False
    chunk: int | None = None
    border: Border = ()
    hands_on: bool = False

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Its arguments."""
        return self.args, self.kwargs

    @property
    def batch(self) -> WholeBatch:
        """The batch that it is, or is a part of."""
        return self.part.whole

    def on_ranks(self) -> list[tuple[str, ...]]:
        """Of each tensor of the call, along which dimensions of the ranks' mesh it may be another one on each rank."""
        count = sum(isinstance(x, Tensor) for x in pytree.tree_leaves(self.call))
        return [self.border[i] if i < len(self.border) else () for i in range(count)]

    def part_of(self, whole: WholeBatch, index: int, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Forward:
        """A part of this call, as a forward of its own."""
        return Forward(*call, self.given, self.tracing, self.compared, PartOfBatch(whole, index))

    def note(self, outputs: Sequence[Any], labels: Sequence[Label]) -> None:
        """It returns these outputs, which lie like this."""
        self.labels = {id(x): label for x, label in zip(outputs, labels, strict=False)}
        if self.first_step is not None:
            self.first_step.label(outputs, labels)


@dataclass(eq=False, slots=True)
class AwaitedBackward:
    """What the backward of a forward needs to know of it. Of the tensors of the call it holds the mask alone.

    Attributes:
        part: of the batch; its mask is known.
        rows: which rows of the batch.
        given: what a draw says of the forward.
        reduces: whether it ran outside ``no_sync()`` of a DistributedDataParallel.
        within: the backward in which it ran, if in one: its sums come in that.
        first_step: compares what is delivered; None if nothing does.
        sums: takes them as they arise.
    """

    part: PartOfBatch
    rows: slice
    given: Given
    reduces: bool
    within: int | None
    first_step: FirstStep | None
    sums: Sums

    @property
    def mask(self) -> Tensor:
        """Of the rows: float32, 0 for padding."""
        assert self.part.whole.mask is not None
        return self.part.whole.mask[self.rows]


class Running(Generic[F]):
    """Where the forward that is being run is found: by the backend that Dynamo calls, and by what it compiled.

    There is one such place for whatever ``torch.compile`` compiles of one module; nothing else of a call is kept
    outside of the call. Calls may be nested: the innermost is found.
    """

    def __init__(self) -> None:
        self._innermost: F | None = None

    def __bool__(self) -> bool:
        return self._innermost is not None

    @property
    def now(self) -> F:
        """The forward that is being run."""
        assert self._innermost is not None, "a graph of a private module outside of its calls"
        return self._innermost

    @contextmanager
    def during(self, forward: F) -> Iterator[None]:
        """Run this forward in here."""
        before, self._innermost = self._innermost, forward
        try:
            yield
        finally:
            self._innermost = before
