"""The main table, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from benchmarks.cases import find_case
from benchmarks.engines import BASELINE, ENGINES
from benchmarks.processes import Workshop
from benchmarks.results import Results

__all__ = ["PARTS", "Bench", "Settings"]

PARTS = ("time", "memory", "compile")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run was asked for.

    Attributes:
        models: by name.
        engines: by name.
        experiments: by name.
        parts: which of :data:`PARTS`.
        repeats: turns of every pair, at least.
        batch: in place of every model's own.
        device: "cpu" or "cuda".
        backend: "inductor", or "eager" in tests of the harness.
        fastdp: the folder with FastDP's source.
        limit_gb: of the experiment that looks for the largest batch.
        quick: experiments do less.
    """

    models: tuple[str, ...]
    engines: tuple[str, ...]
    experiments: tuple[str, ...] = ()
    parts: tuple[str, ...] = PARTS
    repeats: int = 9
    batch: int | None = None
    device: str = "cpu"
    backend: str = "inductor"
    fastdp: str | None = None
    limit_gb: float = 2.0
    quick: bool = False

    def options(self, model: str) -> dict[str, Any]:
        """What jobs on this model are told."""
        common = {"model": model, "batch": self.batch, "device": self.device, "backend": self.backend}
        return common | {"path": self.fastdp}


@dataclass(frozen=True, slots=True)
class Bench:
    """A run: settings, processes and results."""

    settings: Settings
    shop: Workshop
    results: Results
    known: dict[str, Any] = field(default_factory=dict)  # of models whose right answer is stored

    def table(self) -> None:
        """Measure every model with every engine; each figure is saved when it is there."""
        engines = {m: self._engines(m) for m in self.settings.models}
        total = sum(1 + len(e) for e in engines.values())
        with tqdm(total=total, unit="cell", disable=self.shop.inline) as bar:
            for model in self.settings.models:
                self._model(model, engines[model], bar)

    def _engines(self, model: str) -> list[str]:
        """What to measure; the baseline too, unless an earlier run has it."""
        engines = list(self.settings.engines)
        known = self.results.model(model)["engines"].get(BASELINE, {})
        names = {"time": "times"}
        if BASELINE not in engines and not all(names.get(part, part) in known for part in self.settings.parts):
            engines.insert(0, BASELINE)
        return engines

    def _model(self, model: str, engines: list[str], bar: tqdm[Any]) -> None:
        bar.set_description(f"{model}: one backward per example")
        truth, known = self._truth(model)
        self.results.model(model).update(known)
        if "error" in known:
            self.results.save()
            bar.update(1 + len(engines))
            return
        bar.update()
        for engine in engines:
            cell = self.results.engine(model, engine)
            if "time" in self.settings.parts:
                bar.set_description(f"{model}, {engine}: time")
                kept = {part: cell[part] for part in ("memory", "compile") if part in cell}
                cell.clear()
                cell.update(self._pair(model, engine, truth) | kept)
            if "memory" in self.settings.parts and not _hopeless(cell):
                bar.set_description(f"{model}, {engine}: memory")
                cell["memory"] = self._memory(model, engine, truth)
            if "compile" in self.settings.parts and not _hopeless(cell) and ENGINES[engine].compiles:
                bar.set_description(f"{model}, {engine}: compile")
                cell["compile"] = self.compile(engine, self.settings.options(model))
            self.results.save()
            bar.update()

    def _truth(self, model: str) -> tuple[str, dict[str, Any]]:
        """The file with the right answer, made once per run, and what is known of the model."""
        self.shop.folder.mkdir(parents=True, exist_ok=True)
        truth = str((self.shop.folder / f"truth_{model.replace(':', '_')}.pt").absolute())
        if model not in self.known:
            options = {k: v for k, v in self.settings.options(model).items() if k in ("model", "batch", "device")}
            self.known[model] = self.shop.run("benchmarks.jobs:oracle", {**options, "truth": truth})
        return truth, self.known[model]

    def _pair(self, model: str, engine: str, truth: str, update: bool = False) -> dict[str, Any]:
        arguments = {"engine": engine, "repeats": self.settings.repeats, "truth": truth, "update": update}
        return self.shop.run("benchmarks.jobs:pair", arguments | self.settings.options(model))

    def _memory(self, model: str, engine: str, truth: str) -> dict[str, Any]:
        return self.shop.run(
            "benchmarks.jobs:memory", {"engine": engine, "truth": truth} | self.settings.options(model)
        )

    def cell(self, model: str, engine: str, parts: Sequence[str], *, update: bool = False) -> dict[str, Any]:
        """One engine on one model, as in the table, for experiments; ``update``: times of whole training steps.

        Returns:
            What :func:`benchmarks.jobs.pair` gives, with ``batch``, ``memory`` and ``compile``, or ``error``.
        """
        found: dict[str, Any] = {"batch": self.settings.batch or find_case(model).batch}
        if set(parts) - {"compile"}:
            truth, known = self._truth(model)
            if "error" in known:
                return {"error": known["error"]}
            if "time" in parts:
                found |= self._pair(model, engine, truth, update)
            if "memory" in parts and not _hopeless(found):
                found["memory"] = self._memory(model, engine, truth)
        if "compile" in parts:
            found["compile"] = self.compile(engine, self.settings.options(model))
        return found

    def compile(self, engine: str, options: dict[str, Any]) -> dict[str, Any]:
        """Seconds of a cold compilation."""
        return self.shop.run("benchmarks.jobs:compile_time", {"engine": engine} | options, cold=True)


def _hopeless(cell: dict[str, Any]) -> bool:
    """There is no point in measuring more of an engine that cannot run the model or gets it wrong."""
    return "error" in cell
