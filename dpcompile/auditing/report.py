"""What an audit found."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["AuditReport"]


@dataclass(frozen=True, slots=True)
class AuditReport:
    """A lower bound on epsilon from guesses, beside the proved upper bound.

    Attributes:
        kind: of the canaries: "dirac", "spread" or "data".
        steps: logical steps of the run.
        canaries: how many there were; half of them chose the attack, and the other half judged it.
        guesses: on how many of the other half there was a guess, in the bound that holds for any mechanism.
        right: how many of these were right.
        delta: at which epsilon is given.
        confidence: of all lower bounds together.
        any_mechanism: lower bound from the guesses, whatever the mechanism is (Steinke et al. 2023).
        independent: lower bound if canaries are told apart independently of each other: none, or the same run with the
            noise that the errors leave room for; None for data, and of draws with a cap.
        noise: at most so many times the noise that was counted, likewise; infinity where nothing is known, or None.
        proved: the accountant's epsilon; None without an accountant.
        observed: what the attack saw of every step: "weights", or "gradients", the private ones.
        attack: the scores that the guesses, and the independent decisions, went by.
    """

    kind: str
    steps: int
    canaries: int
    guesses: int
    right: int
    delta: float
    confidence: float
    any_mechanism: float
    independent: float | None
    noise: float | None
    proved: float | None
    observed: str
    attack: tuple[str, ...]

    @property
    def epsilon(self) -> float:
        """The larger of the lower bounds."""
        return max(self.any_mechanism, self.independent or 0.0)

    @property
    def contradicted(self) -> bool:
        """Whether the lower bound is above what was proved: then the run was not what was counted.

        Of a run that is what was counted that happens with a probability of at most ``1 - confidence``.
        """
        return self.proved is not None and self.epsilon > self.proved

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no infinity: the text "inf" stands for it."""
        values = {**asdict(self), "attack": list(self.attack)}
        values |= {"epsilon": self.epsilon, "contradicted": self.contradicted}
        return {k: "inf" if isinstance(v, float) and math.isinf(v) else v for k, v in values.items()}

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def _room(self) -> str:
        if self.noise is None or math.isinf(self.noise):
            return ""
        return f": noise at most {self.noise:.2f} times that counted"

    def __str__(self) -> str:
        judged = self.canaries - self.canaries // 2
        lines = [
            f"audit of {self.steps} steps by {self.canaries} canaries ({self.kind}), from the {self.observed}",
            f"epsilon at delta {self.delta:g}, confidence {self.confidence:g}:",
            f"  at least {self.any_mechanism:8.3f}  of any mechanism: {self.right} of {self.guesses} guesses right, "
            f"{judged - self.guesses} canaries without",
        ]
        if self.independent is not None:
            lines.append(f"  at least {self.independent:8.3f}  if canaries are independent{self._room()}")
        proved = "       ?" if self.proved is None else f"{self.proved:8.3f}"
        lines.append(
            f"  at most  {proved}  proved" + (" and counted" if self.proved is not None else ": no accountant")
        )
        verdict = "CONTRADICTED: the run was not what was counted" if self.contradicted else "not contradicted"
        return "\n".join([*lines, verdict])
