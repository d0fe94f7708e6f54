"""``plan_privacy``: what a run would cost, for several batch sizes and lengths, before any training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from dpcompile.accounting.arguments import Method, Relation, check_delta, check_size, number, refuse_large_delta
from dpcompile.accounting.calibration import calibrate_noise
from dpcompile.accounting.caps import smallest_cap
from dpcompile.accounting.solving import solve
from dpcompile.accounting.truncation import check_truncated
from dpcompile.errors import PrivacyError

__all__ = ["PlannedRun", "PrivacyPlan", "plan_privacy"]


class PlannedRun(NamedTuple):
    """One way to train, and what it costs."""

    expected_batch_size: float
    """Of a logical step."""
    steps: int
    """Logical steps."""
    epochs: float
    """Passes over the dataset: steps times the sample rate."""
    sample_rate: float
    """Expected batch size over the size of the dataset."""
    noise_multiplier: float
    """Sigma; where a target was given, the smallest that meets it."""
    epsilon: float
    """What the run costs at the plan's delta."""
    noise_per_example: float
    """Standard deviation of the noise in each element of the mean gradient: sigma * C / expected batch size."""
    examples: float
    """Examples processed in all: the compute. With a cap rows, padding among them: steps times the cap."""
    max_batch_size: int | None = None
    """The cap on draws; None: they are whole."""


class PrivacyPlan(NamedTuple):
    """The table: ``str()`` and :meth:`markdown` print it, :meth:`json` saves it."""

    rows: list[PlannedRun]
    """A row for each batch size and length."""
    delta: float
    """At which epsilon is meant."""
    dataset_size: int
    """Number of examples."""
    max_grad_norm: float
    """C."""
    method: Method
    """Of the accountant."""
    relation: Relation
    """Which datasets are neighbours."""

    def cells(self) -> list[list[str]]:
        """Headings and rows as text: epsilon and sigma are rounded up, so that what is read is true."""
        head = ["batch", "steps", "epochs", "sample rate", "sigma", "epsilon", "sigma C / batch", "examples"]
        rows = [
            [f"{r.expected_batch_size:g}", str(r.steps), f"{r.epochs:.4g}", f"{r.sample_rate:.4g}",
             _up(r.noise_multiplier), _up(r.epsilon), f"{r.noise_per_example:.3e}", f"{r.examples:.4g}"]
            for r in self.rows
        ]  # fmt: skip
        if any(r.max_batch_size is not None for r in self.rows):
            caps = ["" if r.max_batch_size is None else str(r.max_batch_size) for r in self.rows]
            head, rows = [*head, "cap"], [[*row, cap] for row, cap in zip(rows, caps, strict=True)]
        return [head, *rows]

    def markdown(self) -> str:
        """The table for a page."""
        head, *rows = self.cells()
        lines = [head, ["---:"] * len(head), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def json(self) -> str:
        """All of it as JSON; an infinite epsilon is null."""
        finite = [{k: v if v is not None and v < math.inf else None for k, v in r._asdict().items()} for r in self.rows]
        return json.dumps({**self._asdict(), "rows": finite}, allow_nan=False)

    def __str__(self) -> str:
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        title = f"{self.dataset_size} examples, delta {self.delta:g}, C {self.max_grad_norm:g}, "
        title += f"{self.method}, {self.relation}"
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        return "\n".join([title, *lines])


def plan_privacy(
    *,
    dataset_size: int,
    expected_batch_sizes: Sequence[float],
    target_delta: float,
    steps: Sequence[int] | None = None,
    epochs: Sequence[float] | None = None,
    noise_multiplier: float | None = None,
    target_epsilon: float | None = None,
    max_grad_norm: float = 1.0,
    method: Method = "pld",
    relation: Relation = "zero_out",
    max_batch_size: int | Literal["auto"] | None = None,
) -> PrivacyPlan:
    """Every batch size with every length: epsilon, or the noise that a target needs; noise per example; compute.

    At one epsilon a larger batch has less noise per example for more compute: that ratio, and not sigma, is what
    accuracy follows (McKenna et al. 2025, "Scaling laws for differentially private language models").

    Args:
        dataset_size: number of examples.
        expected_batch_sizes: above 0, at most ``dataset_size``.
        target_delta: in (0, 1); well below 1 / ``dataset_size``.
        steps: logical steps; either these or ``epochs``.
        epochs: passes over the data, of as many steps as a PoissonLoader takes for them, rounded up.
        noise_multiplier: sigma; either this or ``target_epsilon``.
        target_epsilon: that every row is to meet.
        max_grad_norm: C.
        method: "pld", a second or some for each row, or "rdp", instant and a few per cent more.
        relation: which datasets are neighbours.
        max_batch_size: a cap on draws (:class:`dpcompile.PoissonLoader`). "auto": for every row the smallest multiple
            of 8 that costs next to nothing (:func:`dpcompile.accounting.caps.smallest_cap`), in some seconds more.

    Raises:
        PrivacyError: an argument out of its range, not exactly one of each pair, or a target that no noise meets.

    **Guarantee.** Each row is what ``PrivacyAccountant`` with the same method and relation says of that run.
    """
    check_size(dataset_size)
    check_delta(target_delta)
    refuse_large_delta(target_delta, dataset_size)
    if (noise_multiplier is None) == (target_epsilon is None):
        raise PrivacyError(
            f"{'neither' if noise_multiplier is None else 'both'} of noise_multiplier and target_epsilon given",
            remedy="give one of them: the other is what the plan tells",
        )
    if (steps is None) == (epochs is None):
        raise PrivacyError(
            f"{'neither' if steps is None else 'both'} of steps and epochs given", remedy="give one of them, a list"
        )
    if not 0 < number(max_grad_norm) < math.inf:
        raise PrivacyError(f"max_grad_norm is {max_grad_norm!r}", remedy="give a finite number above 0")
    trial = 1 if max_batch_size == "auto" else max_batch_size
    check_truncated(None if trial is None else (dataset_size, trial), method, relation)
    rows = []
    for batch in _numbers("expected_batch_sizes", expected_batch_sizes, dataset_size):
        rate = batch / dataset_size
        for length in _numbers("steps" if epochs is None else "epochs", steps if epochs is None else epochs, math.inf):
            n = length if epochs is None else math.ceil(length * math.ceil(dataset_size / batch))
            known: dict[str, Any] = {"target_delta": target_delta, "sample_rate": rate, "steps": n}
            known |= {"method": method, "relation": relation}
            find = partial(_noise, noise_multiplier, target_epsilon)
            cap = max_batch_size
            if cap == "auto":
                whole = {k: v for k, v in known.items() if k != "method"}
                cap = smallest_cap(noise_multiplier=find(known), dataset_size=dataset_size, multiple=8, **whole)
            if cap is not None:
                known["truncation"] = (dataset_size, cap)
            sigma = find(known)
            spent = solve(noise_multiplier=sigma, **known)
            noise = sigma * max_grad_norm / batch
            rows.append(PlannedRun(batch, n, n * rate, rate, sigma, spent, noise, n * (cap or batch), cap))
    return PrivacyPlan(rows, target_delta, dataset_size, max_grad_norm, method, relation)


def _noise(given: float | None, target_epsilon: float | None, known: Mapping[str, Any]) -> float:
    if given is not None:
        return given
    assert target_epsilon is not None
    return calibrate_noise(target_epsilon=target_epsilon, **known)


def _numbers(name: str, values: Any, most: float) -> Sequence[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise PrivacyError(f"{name} is {values!r}", remedy="give a list of numbers")
    for value in values:
        if not 0 < number(value) <= most or number(value) == math.inf or isinstance(value, bool):
            raise PrivacyError(
                f"{name} holds {value!r}", remedy="give numbers above 0; a batch is no larger than the dataset"
            )
    return values


def _up(x: float) -> str:
    """Four digits, not below x."""
    if x in (0, math.inf):
        return f"{x:g}"
    scale = 10.0 ** (3 - math.floor(math.log10(x)))
    text = f"{math.ceil(x * scale - 1e-9) / scale:.4g}"
    return text if float(text) >= x else f"{x * (1 + 1e-3):.4g}"
