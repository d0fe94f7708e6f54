"""The results as they grow: one JSON file that later runs add to."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

__all__ = ["Results"]


class Results:
    """``results.json`` in the output folder.

    Args:
        path: of the file; an earlier one is read and added to.
        machine: what the new figures are measured on; None to read only.

    Raises:
        ValueError: the earlier figures are from another machine, other versions or another number of threads.
    """

    def __init__(self, path: pathlib.Path, machine: dict[str, Any] | None = None) -> None:
        self.path = path
        self.data: dict[str, Any] = {"machine": machine, "commands": [], "models": {}, "experiments": {}}
        if path.exists():
            self.data = json.loads(path.read_text())
            if machine is not None and self.data["machine"] != machine:
                was = {k: v for k, v in self.data["machine"].items() if machine.get(k) != v}
                raise ValueError(
                    f"{path} holds figures measured under other conditions ({was}): use another --output, or delete it"
                )
        elif machine is None:
            raise ValueError(f"there are no results in {path}: run the benchmark first")

    def command(self, words: list[str], revision: str) -> None:
        """Note a command that adds figures, and the revision of the sources it measures."""
        line = " ".join(["python -m benchmarks.run", *words, f" # {revision}"])
        if line not in self.data["commands"]:
            self.data["commands"].append(line)
        self.save()

    def model(self, name: str) -> dict[str, Any]:
        """What is known of a model; made if there is nothing yet."""
        return self.data["models"].setdefault(name, {"engines": {}})

    def engine(self, model: str, engine: str) -> dict[str, Any]:
        """The same of an engine on this model."""
        return self.model(model)["engines"].setdefault(engine, {})

    def save(self) -> None:
        """To the file, in one move."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(draft, self.path)
