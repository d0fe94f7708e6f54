"""``python -m benchmarks.sharded``: a private FSDP2 step against the compiled non-private one, and Opacus."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks.machine import describe_machine, revision
from benchmarks.markdown import markdown
from benchmarks.processes import on_gloo_ranks

__all__ = ["main", "table"]

TITLES = {"plain": "not private, blocks compiled, FSDP2", "ours": "dpcompile, FSDP2", "opacus": "Opacus, FSDP2"}
KINDS = {"gradient": "gradient step", "step": "with noise and AdamW"}


def main(words: Sequence[str] | None = None) -> None:
    """Parse the command line, run, write ``sharded.json`` and ``sharded.md``, print the table."""
    asked = _parser().parse_args(words)
    output = pathlib.Path(asked.output)
    output.mkdir(parents=True, exist_ok=True)
    job = {k: getattr(asked, k) for k in ("model", "batch", "repeats", "backend", "threads")}
    job["engines"] = asked.engines.split(",")
    data = {"machine": describe_machine(asked.threads), "revision": revision(), "ranks": asked.ranks, "job": job}
    data |= on_gloo_ranks("benchmarks.sharded_worker", job, asked.ranks, threads=job["threads"], timeout=asked.timeout)
    (output / "sharded.json").write_text(json.dumps(data, indent=1) + "\n")
    text = table(data)
    (output / "sharded.md").write_text(text)
    print(text)


def table(data: dict[str, Any]) -> str:
    """Milliseconds and ratios."""
    job, engines = data["job"], data["engines"]
    rows = []
    for name, cell in engines.items():
        row = [TITLES[name], cell.get("error") or f"{cell['answer_error']:.0e}"]
        for kind in KINDS:
            row += _figures(cell, engines.get("plain", {}), kind)
        rows.append(row)
    head = ["", "error"]
    for title in KINDS.values():
        head += [f"{title}, ms: minimum (median)", "not private over it: minima (medians)"]
    lines = [
        f"`{job['model']}`, {data['ranks']} gloo ranks with {job['threads']} thread each, {job['batch']} examples a "
        f"rank, {job['backend']}; {data['machine']['cpu']}; {data['revision']}.\n",
        markdown(head, rows),
    ]
    for other, goal in (("plain", 0.85), ("opacus", 1.7)):
        if all("gradient" in engines.get(n, {}) for n in ("ours", other)):
            ratios = [engines[other][k]["minimum"] / engines["ours"][k]["minimum"] for k in KINDS]
            shown = ", ".join(f"{r:.2f} ({title})" for r, title in zip(ratios, KINDS.values(), strict=True))
            lines.append(f"Time of {TITLES[other]} over dpcompile's: {shown}; the goal is {goal}.\n")
    return "\n".join(lines)


def _figures(cell: dict[str, Any], base: dict[str, Any], kind: str) -> list[str]:
    if kind not in cell:
        return ["", ""]
    mine, plain = cell[kind], base.get(kind)
    shown = f"{1e3 * mine['minimum']:.1f} ({1e3 * mine['median']:.1f})"
    ratio = f"{plain['minimum'] / mine['minimum']:.2f} ({plain['median'] / mine['median']:.2f})" if plain else ""
    return [shown, ratio]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.sharded", description=__doc__)
    add = parser.add_argument
    add("--model", default="gpt", help="of benchmarks.models, with blocks in .blocks")
    add("--engines", default="plain,ours,opacus", help=f"of {', '.join(TITLES)}")
    add("--batch", type=int, default=4, help="examples of one rank")
    add("--ranks", type=int, default=2)
    add("--threads", type=int, default=1, help="of every rank")
    add("--repeats", type=int, default=9, help="turns")
    add("--backend", default="inductor", choices=("inductor", "eager"), help="eager is for tests of this program")
    add("--timeout", type=float, default=900.0, help="seconds")
    add("--output", default="benchmark_results", help="folder")
    return parser


if __name__ == "__main__":
    main()
