"""``python -m benchmarks.scale``: size large models on many ranks in one process, and model their throughput."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.machine import revision
from benchmarks.processes import Workshop
from benchmarks.scale.mesh_report import carried, exchanged, section
from benchmarks.scale.meshes import MESHES, WAYS
from benchmarks.scale.models import CASES
from benchmarks.scale.report import draw, page, summary
from benchmarks.scale.throughput import Cluster, amdahl, curve, load_of

__all__ = ["main"]

ROOT = pathlib.Path(__file__).parent.parent.parent
MODELS = ("gpt2-xl", "gpt2-xl-classes", "llama3-8b-lora")
ON_MESHES = ("llama3-70b", "llama3-405b")


def main(words: Sequence[str] | None = None) -> None:
    """Parse the command line, size, and write ``scale.json``, ``scale.md`` and, if asked, the page.

    Without ``--models`` the page keeps what is there, and without ``--meshes`` the section of these.
    """
    words = sys.argv[1:] if words is None else list(words)
    asked = _parser().parse_args(words)
    output = pathlib.Path(asked.output)
    output.mkdir(parents=True, exist_ok=True)
    stored = output / "scale.json"
    os.environ.setdefault("DPCOMPILE_RATES", "typical")  # plans that do not depend on this machine
    if asked.models:
        _sharded(asked, stored)
    if asked.meshes:
        _on_meshes(asked, output / "meshes.json")


def _sharded(asked: argparse.Namespace, stored: pathlib.Path) -> None:
    if asked.report_only:
        data: dict[str, Any] = json.loads(stored.read_text())
    else:
        key = {"torch": torch.__version__, "revision": revision(), "depth": asked.depth}
        data = {**key, "cells": _sizes(asked, stored)}
    data["model"] = _throughput(asked, data["cells"])
    stored.write_text(json.dumps(data, indent=1) + "\n")
    text = summary(data)
    (stored.parent / "scale.md").write_text(text)
    print(text)
    if asked.docs:
        target = pathlib.Path(asked.docs)
        picture = target.with_suffix(".svg")
        text, before = page(data, picture.name if draw(data, picture) else None), _read(target)
        target.write_text(carried(before, text))
        print(f"wrote {target}")


def _on_meshes(asked: argparse.Namespace, stored: pathlib.Path) -> None:
    """Stages of models on meshes of four dimensions; cells of an interrupted run of this revision are kept."""
    key = {"torch": torch.__version__, "revision": revision()}
    known = json.loads(stored.read_text()) if stored.exists() else {}
    same = asked.report_only or all(known.get(k) == v for k, v in key.items())
    done = {(c["model"], *c["mesh"], c["way"]): c for c in known.get("cells", ()) if same and "error" not in c}
    shop = Workshop(stored.parent / "work", 1, asked.timeout, asked.inline)
    jobs = [
        (name, mesh, way)
        for name in asked.meshes.split(",")
        for mesh in MESHES[name]
        for way in (WAYS if mesh is MESHES[name][0] else ("plain", "ours"))
    ]
    cells = []
    for name, mesh, way in tqdm(jobs, unit="cell", disable=asked.inline):
        shape = (mesh.dp, mesh.tp, mesh.pp, mesh.cp)
        cell = done.get((name, *shape, way))
        if cell is None and not asked.report_only:
            found = shop.run("benchmarks.scale.meshes:size_cell", {"model": name, "mesh": shape, "way": way})
            cell = {"model": name, "mesh": shape, "way": way, **found}
        cells += [] if cell is None else [cell]
        stored.write_text(json.dumps({**key, "cells": cells}, indent=1) + "\n")
    made = {k: known[k] for k in key} if asked.report_only else key
    text = section({**made, "cells": cells, "ratio": asked.ratio})
    print(text)
    if asked.docs:
        target = pathlib.Path(asked.docs)
        target.write_text(exchanged(_read(target), text))
        print(f"wrote {target}")


def _read(file: pathlib.Path) -> str:
    return file.read_text() if file.exists() else ""


def _sizes(asked: argparse.Namespace, stored: pathlib.Path) -> list[dict[str, Any]]:
    """Every cell: a model, a way and a number of ranks; those of an interrupted run of this revision are kept."""
    shop = Workshop(stored.parent / "work", 1, asked.timeout, asked.inline)
    jobs = []
    for name in asked.models.split(","):
        for ranks in CASES[name].ranks:
            jobs += [(name, way, ranks) for way in CASES[name].ways if _wanted(way, name, ranks)]
    known = json.loads(stored.read_text()) if stored.exists() else {}
    key = {"torch": torch.__version__, "revision": revision(), "depth": asked.depth}
    cells = known["cells"] if all(known.get(k) == v for k, v in key.items()) else []
    done = {(c["model"], c["way"], c["ranks"]) for c in cells if "error" not in c}
    cells = [c for c in cells if (c["model"], c["way"], c["ranks"]) in done]
    bar = tqdm(jobs, unit="cell", disable=asked.inline)
    for name, way, ranks in bar:
        bar.set_description(f"{name}, {way}, {ranks} ranks")
        if (name, way, ranks) not in done:
            arguments = {"case": name, "way": way, "ranks": ranks, "depth": asked.depth}
            found = shop.run("benchmarks.scale.steps:size", arguments)
            cells.append({"model": name, "way": way, "ranks": ranks, **found})
            stored.write_text(json.dumps({**key, "cells": cells}, indent=1) + "\n")
    return sorted((c for c in cells if (c["model"], c["way"], c["ranks"]) in set(jobs)), key=_place(jobs))


def _place(jobs: list[tuple[str, str, int]]) -> Any:
    return lambda cell: jobs.index((cell["model"], cell["way"], cell["ranks"]))


def _wanted(way: str, name: str, ranks: int) -> bool:
    """The first number of ranks has every way."""
    return ranks == CASES[name].ranks[0] or way in CASES[name].further


def _throughput(asked: argparse.Namespace, cells: list[dict[str, Any]]) -> dict[str, Any]:
    cluster = Cluster(asked.flops, asked.inside, asked.outside, asked.node, asked.latency, asked.traffic, asked.noise)
    found: dict[str, Any] = {"cluster": asdict(cluster), "loads": {}, "rates": {}, "amdahl": {}}
    for cell in cells:
        name = cell["model"]
        if cell["way"] != "plain" or "error" in cell or name in found["loads"] or not CASES[name].modelled:
            continue
        context = CASES[name].context
        load = load_of(cell, context=context, seconds=asked.seconds, ratio=asked.ratio, flops=cluster.flops)
        rates = {way: curve(load, cluster, way) for way in ("plain", "ours", "twice")}
        found["loads"][name] = asdict(load)
        found["rates"][name] = {w: {str(n): v for n, v in r.items()} for w, r in rates.items()}
        found["amdahl"][name] = {w: amdahl(r) for w, r in rates.items()}
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.scale", description=__doc__)
    add, cluster = parser.add_argument, Cluster()
    add("--models", default=",".join(MODELS), help=f"of {', '.join(CASES)}")
    add("--meshes", default=",".join(ON_MESHES), help=f"of {', '.join(MESHES)}, on meshes of four dimensions")
    add("--depth", type=int, help="blocks, instead of the whole model's")
    add("--output", default="benchmark_results", help="folder")
    add("--timeout", type=float, default=900.0, help="seconds for one cell")
    add("--inline", action="store_true", help="all in this process; for tests of this program")
    add("--report-only", action="store_true", help="nothing is sized: tables and page from an earlier run")
    docs = str(ROOT / "docs" / "scale.md")
    add("--docs", nargs="?", const=docs, help="write the page of the documentation (docs/scale.md)")
    add("--seconds", type=float, help="of the non-private step for one example on one rank, measured (from --flops)")
    add("--ratio", type=float, default=0.85, help="non-private seconds over private ones, measured (0.85: the goal)")
    add("--flops", type=float, default=cluster.flops, help="FLOP/s that training reaches on a rank")
    add("--inside", type=float, default=cluster.inside, help="bytes/s of a rank's link within a node")
    add("--outside", type=float, default=cluster.outside, help="bytes/s of a rank's link between nodes")
    add("--node", type=int, default=cluster.node, help="ranks in a node")
    add("--latency", type=float, default=cluster.latency, help="seconds for one hop of a collective")
    add("--traffic", type=float, default=cluster.traffic, help="bytes/s of the optimizer's kernels")
    add("--noise", type=float, default=cluster.noise, help="normal values per second")
    return parser


if __name__ == "__main__":
    main()
