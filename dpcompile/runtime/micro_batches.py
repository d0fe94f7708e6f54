"""Which rows of a pipeline's micro-batches are examples: every stage takes the mask of the whole batch, in parts."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from dpcompile.batches.draws import DrawnBatch, Given, nothing
from dpcompile.batches.row_keys import row_keys
from dpcompile.errors import PrivacyError, running_line
from dpcompile.runtime.stage_checks import StagedEngine

__all__ = ["MicroBatches"]


class MicroBatches:
    """The batch of one ``schedule.step``, of which this stage sees micro-batch after micro-batch.

    Later stages are given activations, by which no batch is recognised. So each takes the one batch that its own rank's
    loader has handed out, or the mask that was set, and ranks compare what they took.

    Attributes:
        chunks: how many there are.
        number: step and part of the loader's draw; -1 without one.
    """

    def __init__(self, engine: StagedEngine) -> None:
        self._engine = weakref.ref(engine)
        self.chunks = 0
        self._mask: Tensor | None = None
        self._batch: DrawnBatch | None = None
        self.number = -1, -1

    def begin(self, chunks: int) -> None:
        """The first micro-batch of a batch of so many is about to run.

        Raises:
            PrivacyError: it is not known which batch of the loader it is, or no mask was set.
        """
        engine = self._engine()
        assert engine is not None
        self.chunks, self._mask, self._batch, self.number = chunks, None, None, (-1, -1)
        if engine.claims:
            assert engine.draws is not None
            self._batch = engine.draws.claim_next()
            if self._batch.turns > 1:
                raise PrivacyError(
                    f"the loader's batch runs in {self._batch.turns} turns, and micro-batches have one size",
                    remedy="iterate over loader.parts(); its batches have physical_batch_size rows",
                )
            self._mask, self.number = self._batch.mask, (self._batch.step, self._batch.part)
        else:
            self._mask = engine.masks.take_whole()

    def given(self, chunk: int, tensors: Sequence[tuple[Tensor, int]], *, first: bool) -> Given:
        """What is said of a micro-batch.

        Args:
            chunk: its number.
            tensors: of the call, with examples, and their dimension.
            first: the stage is given the batch's own tensors.

        Raises:
            PrivacyError: rows are not those of the batch.
        """
        rows = {t.shape[dim] for t, dim in tensors}
        if self._mask is None:
            return Given(more=chunk > 0)
        masks = self._mask.tensor_split(self.chunks)
        if any(n != len(masks[chunk]) for n in rows):
            raise PrivacyError(
                f"micro-batch {chunk} of {self.chunks} has {sorted(rows)} rows, and of the batch of {len(self._mask)} "
                f"it would have {len(masks[chunk])}",
                where=running_line(),
                remedy="give schedule.step the batch that the loader gave, whole, divided along its first dimension",
            )
        if first and self._batch is not None:
            self._check_rows(self._batch, sum(map(len, masks[:chunk])), tensors)
        begin, end = self._turn(chunk)
        return Given(masks[chunk], more=chunk > 0, begin=begin, end=end)

    def _turn(self, chunk: int) -> tuple[Callable[[], None], Callable[[], None]]:
        engine, batch = self._engine(), self._batch
        if engine is None or engine.draws is None or batch is None:
            return nothing, nothing
        begin = partial(engine.draws.begin, batch) if chunk == 0 else nothing
        return begin, partial(engine.draws.delivered, batch) if chunk == self.chunks - 1 else nothing

    def _check_rows(self, batch: DrawnBatch, start: int, tensors: Sequence[tuple[Tensor, int]]) -> None:
        for tensor, dim in tensors:
            own = row_keys(tensor, dim).tolist()
            for (drawn, along), keys in zip(batch.rows, batch.keys, strict=True):
                if along == 0 and drawn.dtype == tensor.dtype and keys[start : start + len(own)] == own:
                    return
        raise PrivacyError(
            "the pipeline's first stage was given other rows than the loader's batch has in their place: it cannot be "
            "told which rows are padding",
            where=running_line(),
            remedy="give schedule.step the batch's own tensors, in their order; normalise and augment in the dataset, "
            "in collate_fn or in the model",
        )
