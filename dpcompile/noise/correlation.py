"""What mechanisms have in common whose noise of several steps belongs together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dpcompile.accounting.events import sampled_gaussian
from dpcompile.errors import PrivacyError

if TYPE_CHECKING:
    from dp_accounting import DpEvent

__all__ = ["CorrelatedMechanism"]


class CorrelatedMechanism(ABC):
    """A :class:`dpcompile.noise.mechanism.Mechanism` whose numbers stay what they were at its first row.

    Args:
        noise_multiplier: sigma; 0: no noise.
        max_grad_norm: the model's, which clips to it.
        expected_batch_size: the constant that divides the sums.
        seed: of the noise, a secret.
        secure: whether the noise is cryptographic.
    """

    def __init__(
        self, noise_multiplier: float, max_grad_norm: float, expected_batch_size: float, seed: int, secure: bool
    ) -> None:
        self.noise_multiplier, self.max_grad_norm = noise_multiplier, max_grad_norm
        self.expected_batch_size = expected_batch_size
        self.seed, self.secure = seed, secure
        self._began: dict[str, Any] | None = None  # the numbers of the first row

    @property
    @abstractmethod
    def bands(self) -> int:
        """Over how many steps noise is correlated."""

    @property
    @abstractmethod
    def matrix(self) -> Any:
        """What says how rows belong together; compared with that of the first row."""

    def event(self, sample_rate: float) -> DpEvent:
        """What ``bands`` consecutive releases cost, or fewer, on samples of this rate of the part whose turn it is."""
        return sampled_gaussian(self.noise_multiplier, sample_rate)

    def check_numbers(self) -> None:
        """Raise PrivacyError if sigma, C, the matrix or the seed is another than in the rows before."""
        now = self._numbers()
        changed = [name for name, value in (self._began or now).items() if now[name] != value]
        if changed:
            raise PrivacyError(
                f"{' and '.join(changed)} of the {type(self).__name__} changed in a run: rows of its noise belong "
                "together, and no bound is known for such a mixture",
                remedy="leave them as they were at the first step",
            )

    def begin(self) -> None:
        """A row is about to be released."""
        self.check_numbers()
        self._began = self._began or self._numbers()

    def go_on(self, state: Mapping[str, Any]) -> None:
        """The run of this state goes on: if it had a row, its numbers are those of now."""
        self._began = self._numbers() if state.get("logical_step", 1) else None

    def numbers(self) -> dict[str, Any]:
        """What every such state holds."""
        return {
            "seed": self.seed,
            "noise_multiplier": self.noise_multiplier,
            "expected_batch_size": self.expected_batch_size,
            "secure": self.secure,
            "bands": self.bands,
            "max_grad_norm": self.max_grad_norm,
        }

    def _numbers(self) -> dict[str, Any]:
        return {
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.max_grad_norm,
            "the matrix": self.matrix,
            "the seed": (self.seed, self.secure),
        }
