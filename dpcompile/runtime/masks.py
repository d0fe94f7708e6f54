"""Which rows of the next batch are examples and which are padding, where the user says so (`set_mask`)."""

from __future__ import annotations

import torch
from torch import Tensor

from dpcompile.errors import PrivacyError
from dpcompile.runtime.forward import Forward

__all__ = ["Masks", "of_users"]


def of_users(mask: Tensor, examples_per_user: int) -> Tensor:
    """A mask of rows that says how many are each user's, for :meth:`Masks.set` to compare."""
    mask.examples_per_user = examples_per_user  # type: ignore[attr-defined]
    return mask


class Masks:
    """The mask that was set for the next batch. Once one was set, every forward with gradients needs its own.

    Args:
        examples_per_user: of the model.

    Attributes:
        said: a mask is said of every batch.
    """

    def __init__(self, examples_per_user: int) -> None:
        self._examples_per_user = examples_per_user
        self._mask: Tensor | None = None
        self.said = False

    def set(self, mask: Tensor | None) -> None:
        """Of the next batch: bool ``[B]``, False for padding; None: of no batch any more."""
        if mask is not None and (mask.ndim != 1 or mask.dtype != torch.bool):
            raise PrivacyError(
                f"the padding mask must be a bool tensor of shape [B], got {mask.dtype} {list(mask.shape)}",
                remedy="True marks an example, False a padding row",
            )
        own = getattr(mask, "examples_per_user", self._examples_per_user)
        if own != self._examples_per_user:
            raise PrivacyError(
                f"the mask is of a loader that gives {own} row(s) of each that it draws, and the model clips the "
                f"gradient of {self._examples_per_user} row(s) at a time: noise would be for something else",
                remedy="give dp_compile and PoissonLoader the same examples_per_user (1 without groups)",
            )
        self._mask, self.said = mask, mask is not None

    def take(self, forward: Forward, rows: int) -> Tensor | None:
        """The mask of a forward on so many rows, the draw's or the one that was set, which is used once; or None."""
        mask = forward.given.mask
        if mask is None and not forward.tracing:
            mask, self._mask = self._mask, None
        if mask is not None and len(mask) != rows:
            raise PrivacyError(
                f"the padding mask has {len(mask)} entries for a batch of {rows}",
                remedy="call the model on the batch that the loader gave, whole",
            )
        return mask

    def take_whole(self) -> Tensor | None:
        """The mask that was set for a batch whose forwards run in micro-batches; it is used up.

        Raises:
            PrivacyError: masks are said of every batch, and this one has none.
        """
        mask, self._mask = self._mask, None
        if mask is None and self.said:
            raise _used_mask()
        return mask

    def refused(self, forward: Forward) -> PrivacyError | None:
        """Why a forward may have no backward; None if it may. Its mask is not taken yet."""
        if forward.given.refused is not None or forward.given.mask is not None:
            return forward.given.refused
        if forward.tracing or not self.said or self._mask is not None:
            return None
        return _used_mask()


def _used_mask() -> PrivacyError:
    return PrivacyError(
        "a second backward on one batch of the loader: its examples would count twice",
        remedy="call the model once per batch with gradients (others under torch.no_grad()); to train without "
        "masks, set_mask(model, None) first",
    )
