"""Which drawn batch a call of the model trains on: told by what arrives, checked against what was drawn, used once.

The loader hands batches out; when they are used is the loop's affair: at once, one batch later (a prefetcher), in
another order. So a batch's mask belongs to its tensors. A call of the model is matched with a batch by the memory of
its arguments, by their content (a copy on another device), or, where the loop has computed something new from them, by
there being no other batch that it could be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dpcompile.batches.matching import DrawnBatch, recognised, refuse_moved_rows
from dpcompile.batches.seen_rows import SeenRows
from dpcompile.errors import PrivacyError, running_line

__all__ = ["Claim", "DrawnBatch", "Draws", "Given", "nothing"]

_USED = 2  # batches whose content is kept after their use, to tell a copy of one from something new
_WAITING = 16  # batches that may wait for their use


@dataclass(frozen=True, slots=True)
class Claim:
    """What one call of the model trains on.

    Attributes:
        batch: a drawn batch, or None.
        mask: bool ``[B]``, in the order in which the rows arrived.
        refused: why a backward of this call is refused; None where ``batch`` is given.
    """

    batch: DrawnBatch | None
    mask: Tensor | None = None
    refused: PrivacyError | None = None


def nothing() -> None:
    """Before and after a delivery that belongs to no draw, or is one of several."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a draw says of one forward.

    Attributes:
        mask: bool ``[B]``, or None.
        refused: why it may have no backward, or None.
        reduces: whether sums are added up over replicas after its backward; None: as the replicas have it.
        more: its norms come behind those that were delivered before.
        begin: called before its backward delivers.
        end: called after it.
    """

    mask: Tensor | None = None
    refused: PrivacyError | None = None
    reduces: bool | None = None
    more: bool = False
    begin: Callable[[], None] = nothing
    end: Callable[[], None] = nothing


@dataclass(eq=False, slots=True)
class Draws:
    """Between a loader, a model and an optimizer: the batches on their way, and the logical step under way.

    **Guarantee.** Every batch is used by at most one backward, with its own mask in the order in which its rows arrive;
    the clipped sums of a step come from the batches of one draw, and from all of them.

    =====================================================  =======================================================
    edge case                                              outcome
    =====================================================  =======================================================
    batches taken ahead, reordered, copied to a device     each call gets the mask of its own batch
    rows reordered by the loop, in place or not            the mask follows
    a batch changed by the loop, used before the next      its mask; refused if rows evidently moved
    a batch changed by the loop, others taken meanwhile    refused: it could be any of them
    rows reordered, and other tensors computed anew        refused where padding is not told from examples
    a batch used a second time, or from somewhere else     its backward is refused
    the same, computed anew from it                        refused where three quarters came before
    tensors of two batches in one call                     refused
    a draw that was not stepped on                         the next backward is refused
    a batch given up (``continue``, ``discard()``)         right; its draw is lost
    part of a draw, then another                           refused, or dropped where a new pass begins
    of users: a tensor changed, reordered, computed anew   refused: whose a row is goes by its place
    =====================================================  =======================================================

    Attributes:
        last: the logical step of the batch whose backward came last; None before the first.
        calls: how many calls with gradients asked for a batch.
    """

    last: int | None = None
    calls: int = 0
    _waiting: list[DrawnBatch] = field(default_factory=list)
    _used: deque[DrawnBatch] = field(default_factory=lambda: deque(maxlen=_USED))
    _fresh: DrawnBatch | None = None  # handed out, and no call came since
    _hand: DrawnBatch | None = None  # a call came, and no backward since
    _step: int | None = None  # the logical step under way
    _done: int = 0  # its parts that had their backward
    _seen: SeenRows = field(default_factory=SeenRows)
    _used_pass: object = None  # of which a batch was used last
    _broken: bool = False  # one of them had its backward half

    def hand_out(self, batch: DrawnBatch) -> None:
        """The loader gives this batch to the loop."""
        self._waiting = [*self._waiting, batch][-_WAITING:]
        self._fresh = batch
        self._seen.hand_out(batch)

    def new_pass(self) -> None:
        """The pass before was broken off, and another begins: what is left of it is dropped."""
        self._waiting.clear()
        self._fresh = None

    def unused(self, of_pass: object) -> bool:
        """Whether no batch of this pass has been used or given up."""
        return of_pass is not self._used_pass

    def give_up(self) -> None:
        """The step under way is given up, and the batch at hand if no call came for it."""
        if self._fresh is not None:
            self._waiting.remove(self._fresh)
            self._used_pass, self._fresh = self._fresh.of_pass, None
        self.end_step()

    def claim(self, tensors: Sequence[tuple[Tensor, int]]) -> Claim:
        """The batch that a call with gradients trains on; it is used from now on.

        Args:
            tensors: the call's tensors with examples, and the dimension of the examples.

        Raises:
            PrivacyError: it could be one of several batches, is made of several, or has other rows than were drawn.
        """
        self.calls += 1
        found = recognised(self._waiting, tensors)
        if found is None and not self._could_only_be_fresh():
            return Claim(None, refused=self._why_not(tensors))
        if found is None and recognised(list(self._used), tensors) is not None:
            return Claim(None, refused=_used_already())
        batch, order = (self._waiting[0], None) if found is None else (found.batch, found.order)
        _check_rows(batch, tensors)
        if batch.of_users and (found is None or not found.untouched):
            return Claim(None, refused=_moved_users())
        mask = batch.mask if order is None else batch.mask[order]
        refuse_moved_rows(mask, tensors if found is None else found.rest)
        if found is None:
            try:
                self._seen.take(batch, tensors)
            except PrivacyError as error:
                return Claim(None, refused=error)
        self._waiting.remove(batch)
        self._used.append(batch)
        self._fresh, self._hand, self._used_pass = None, batch, batch.of_pass
        return Claim(batch, mask)

    def claim_next(self) -> DrawnBatch:
        """The one batch on its way, for a call that is given none of its tensors; it is used from now on.

        Raises:
            PrivacyError: there is none, or several were taken ahead.
        """
        self.calls += 1
        if not self._could_only_be_fresh():
            raise self._why_not(())
        batch = self._waiting.pop()
        self._used.append(batch)
        self._fresh, self._hand, self._used_pass = None, batch, batch.of_pass
        return batch

    def begin(self, batch: DrawnBatch) -> None:
        """The backward of a batch begins to deliver.

        Raises:
            PrivacyError: another draw has not been stepped on.
        """
        if self._broken:
            raise _broken_off()
        if self._step is None:
            self._step, self._done = batch.step, 0
        elif self._step != batch.step:
            raise PrivacyError(
                "the optimizer was not stepped after the last draw: an example in both draws would count twice",
                where=running_line(),
                remedy="call optimizer.step() after every batch of the loader (it waits by itself where a draw goes "
                "on), or optimizer.discard() to skip one",
            )
        self._broken, self.last = True, batch.step

    def delivered(self, batch: DrawnBatch) -> None:
        """The backward of a batch has delivered all that it has."""
        self._broken, self._hand = False, None
        self._done += 1

    def check_step(self) -> None:
        """Raise PrivacyError unless an optimizer may step on what was delivered."""
        if self._broken:
            raise _broken_off()

    @property
    def waits(self) -> bool:
        """Whether the clipped sums are those of a part of a draw."""
        return self._step is not None and not self._broken and 0 < self._done < self._parts

    @property
    def accumulating(self) -> bool:
        """Whether a step would wait, once the batch at hand has had its backward."""
        batch = self._hand or (self._waiting[0] if self._fresh is not None else None)
        if batch is None:
            return self.waits
        done = self._done if self._step == batch.step else 0
        return done + 1 < batch.parts

    @property
    def _parts(self) -> int:
        return next((b.parts for b in reversed(self._used) if b.step == self._step), 1)

    def end_step(self) -> None:
        """The optimizer has stepped, or its sums were given up: what is left of the draw may not be used."""
        if self._step is not None:
            self._waiting = [b for b in self._waiting if b.step != self._step]
        self._step, self._done, self._broken, self._hand = None, 0, False, None

    def _could_only_be_fresh(self) -> bool:
        return len(self._waiting) == 1 and self._waiting[0] is self._fresh

    def _why_not(self, tensors: Sequence[tuple[Tensor, int]]) -> PrivacyError:
        if recognised(list(self._used), tensors) is not None:
            return _used_already()
        if not self._waiting:
            return PrivacyError(
                "a backward on what is no batch of the loader, or on one a second time: the accountant counts its "
                "draws, each once",
                where=running_line(),
                remedy="iterate over the loader that make_private returned, and call the model with gradients once per "
                "batch (other calls under torch.no_grad()); for batches of your own use dp_compile and DPOptimizer "
                "without attaching a loader",
            )
        return PrivacyError(
            f"{len(self._waiting)} batches of the loader wait to be used, and this call's tensors are none of them: it "
            "cannot be told which rows are padding",
            where=running_line(),
            remedy="where batches are taken ahead, call the model on the batch's own tensors or copies of them; "
            "compute new ones (normalise, augment) in the dataset, in collate_fn or in the model",
        )


def _used_already() -> PrivacyError:
    return PrivacyError(
        "a second backward on one batch of the loader: its examples would count twice",
        where=running_line(),
        remedy="call the model once per batch with gradients (other calls under torch.no_grad()), and iterate over the "
        "loader anew for every epoch",
    )


def _moved_users() -> PrivacyError:
    return PrivacyError(
        "the loader draws users, and tensors of this call were changed, reordered or computed in the loop: whose a row "
        "is goes by its place, and it cannot be told that rows are still there",
        remedy="call the model on the batch's own tensors, or copies on another device; compute new ones (normalise, "
        "augment, cast) in the dataset, in collate_fn or in the model",
    )


def _broken_off() -> PrivacyError:
    return PrivacyError(
        "a backward was broken off by an error: the clipped sums are those of some of a draw's examples",
        remedy="call optimizer.discard(), then go on with the next batch",
    )


def _check_rows(batch: DrawnBatch, tensors: Iterable[tuple[Tensor, int]]) -> None:
    for tensor, dim in tensors:
        if tensor.shape[dim] != len(batch.mask):
            raise PrivacyError(
                f"the batch of the loader has {len(batch.mask)} rows, and the model was called with "
                f"{tensor.shape[dim]}",
                where=running_line(),
                remedy="call the model on the batch that the loader gave, whole (other calls under torch.no_grad()); "
                "every view of an example is part of the example: give it a dimension of its own",
            )
