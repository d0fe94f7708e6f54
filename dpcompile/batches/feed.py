"""Which loader feeds a model, and which optimizer steps on its draws: what ties steps to draws."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from dpcompile.accounting.by_step import RateSchedule, Sampled
from dpcompile.accounting.truncation import Truncation
from dpcompile.batches.draws import Draws
from dpcompile.distributed.ranks import digest
from dpcompile.errors import PrivacyError

__all__ = ["Feed"]


class Feed:
    """A loader that is attached to a model and its optimizer.

    Args:
        loader: has ``seed``, ``secure``, ``sample_rate``, ``from_size``, ``bands``; ``truncation`` if it has a cap,
            ``schedule`` if rate and expected batch size are functions of the step.
        optimizer: that steps on its draws.

    Attributes:
        sample_rate: of the loader; with a ``schedule`` of step 0.
        schedule: rate and expected batch size of every draw; None: they are constants.
        from_size: whether the rate comes from the size of the dataset.
        dataset_size: how many examples the loader draws from; None if it does not say.
        bands: how many parts it draws from by turns.
        truncation: size of the dataset and cap of the draws; None: they are whole.
        draws: its batches on their way.
    """

    def __init__(self, loader: Any, optimizer: Any) -> None:
        self._loader, self._optimizer = weakref.ref(loader), weakref.ref(optimizer)
        self.from_size: bool = loader.from_size
        self.dataset_size: int | None = getattr(loader, "dataset_size", None)
        self.bands: int = loader.bands
        self.truncation: Truncation | None = getattr(loader, "truncation", None)
        self.schedule: RateSchedule | None = getattr(loader, "schedule", None)
        self.sample_rate: float = loader.sample_rate if self.schedule is None else self.schedule.sample_rate(0)
        self.draws = Draws()

    @property
    def optimizer(self) -> Any:
        """The optimizer that steps on the draws; None once it is gone."""
        return self._optimizer()

    @property
    def draw(self) -> int | None:
        """The number, in the loader's stream, of the draw that the last backward was of; None before the first."""
        return self.draws.last

    @property
    def sampled(self) -> Sampled | None:
        """How the draw that the last backward was of was sampled, and what divides its sum; None: by constants.

        By the number of the draw, which may have been taken long before, or after others that were given up. Before the
        first backward nothing is released but noise: that of draw 0.
        """
        return None if self.schedule is None else self.schedule.at(self.draw or 0)

    @property
    def stream(self) -> str | None:
        """What tells the loader's draws from those of others, without the secret; None where it is gone."""
        loader = self._loader()
        return None if loader is None else _stream(loader)

    def is_of(self, loader: Any) -> bool:
        """Whether this loader feeds the model, or one that is gone did and has its draws, or none was used yet."""
        own = self._loader()
        return own is loader or own is None or self.draw is None

    def check_optimizer(self, optimizer: Any) -> None:
        """Raise PrivacyError if another optimizer than the attached one steps while the loader is there."""
        if self._loader() is not None and self._optimizer() not in (None, optimizer):
            raise PrivacyError(
                "the loader that feeds the model is attached to another DPOptimizer: that one is told when a draw is "
                "whole, and counts it",
                remedy="step the optimizer that the loader is attached to; or loader.attach(model, optimizer) with "
                "this one",
            )

    def state(self) -> dict[str, Any] | None:
        """How far the draws are used, without the secret; None where nothing is known."""
        loader = self._loader()
        if loader is None or self.draw is None:
            return None
        return {"stream": _stream(loader), "next": self.draw + 1}

    def check_resumed(self, saved: Mapping[str, Any] | None) -> None:
        """Raise PrivacyError if the draw that is stepped on was used before the state that was loaded.

        Args:
            saved: :meth:`state` of the optimizer's state that was loaded; None if none was.
        """
        loader = self._loader()
        if saved is None or loader is None or self.draw is None or saved["stream"] != _stream(loader):
            return
        if self.draw < saved["next"]:
            raise PrivacyError(
                f"the optimizer's state was saved after draw {saved['next'] - 1} of this loader's seed, and this is "
                f"draw {self.draw}: it was used before, and does not count as independent",
                remedy="load the loader's state too (loader.load_state_dict, or load_checkpoint with the loader), or "
                "give the loader another seed",
            )


def _stream(loader: Any) -> str:
    parts = f", {len(loader.dataset)} examples in {loader.bands} parts" if loader.bands > 1 else ""
    return digest(loader.seed) + (" secure" if loader.secure else "") + parts
