"""``python -m benchmarks.run``: measure, and report."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from benchmarks.bench import PARTS, Bench, Settings
from benchmarks.cases import find_case
from benchmarks.engines import ENGINES
from benchmarks.experiments import EXPERIMENTS, experiment
from benchmarks.machine import describe_machine, revision
from benchmarks.models import CASES
from benchmarks.more_models import MORE_CASES
from benchmarks.plot import draw, has_ratios
from benchmarks.processes import Workshop
from benchmarks.report import page, summary
from benchmarks.results import Results

__all__ = ["main"]

ROOT = pathlib.Path(__file__).parent.parent
QUICK_MODELS, QUICK_ENGINES = ("mlp", "gpt:width=128,context=128"), ("compiled", "ours", "opacus_hooks")
QUICK_PARTS = ("time", "memory")


def main(words: Sequence[str] | None = None) -> None:
    """Parse the command line, run, and write ``results.json``, ``table.md`` and ``ratios.png``."""
    words = sys.argv[1:] if words is None else list(words)
    parser = _parser()
    asked = parser.parse_args(words)
    output = pathlib.Path(asked.output)
    try:
        results = measure(asked, words, output) if not asked.report_only else Results(output / "results.json")
    except ValueError as error:
        parser.error(str(error))
    text = summary(results.data)
    (output / "table.md").write_text(text)
    draw(results.data, output / "ratios.png")
    print(text)
    if asked.docs:
        target = pathlib.Path(asked.docs)
        picture = target.with_suffix(".svg")
        draw(results.data, picture)
        target.write_text(page(results.data, picture.name if has_ratios(results.data) else None))
        print(f"wrote {target}")


def measure(asked: argparse.Namespace, words: list[str], output: pathlib.Path) -> Results:
    """Run what the command line asks for."""
    settings = _settings(asked)
    for name in settings.models:
        find_case(name)
    threads = asked.threads or torch.get_num_threads()
    results = Results(output / "results.json", describe_machine(threads))
    shop = Workshop(output / "work", threads, asked.timeout, asked.inline)
    bench = Bench(settings, shop, results)
    machine = results.data["machine"]
    tqdm.write(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {threads} threads")
    tqdm.write(", ".join(f"{n} {v}" for n, v in machine["versions"].items()))
    results.command(_public(words), revision())
    if settings.parts:
        bench.table()
    for name in settings.experiments:
        tqdm.write(f"experiment: {name}")
        results.data["experiments"][name] = experiment(name).run(bench)
        results.save()
    return results


def _public(words: list[str]) -> list[str]:
    """The command line without the folders of this machine, and without what does not change the figures."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--fastdp":
            kept += [word, "PATH"]
            next(rest, None)
        elif word == "--output":
            next(rest, None)
        elif word != "--docs" and not word.endswith(".md"):
            kept.append(word)
    return kept


def _settings(asked: argparse.Namespace) -> Settings:
    models = _listed(asked.models, QUICK_MODELS if asked.quick else (*CASES, *(n for n in MORE_CASES if n != "tiny")))
    engines = _listed(asked.engines, QUICK_ENGINES if asked.quick else tuple(ENGINES))
    parts = _listed(asked.parts, QUICK_PARTS if asked.quick else PARTS)
    if asked.parts == "none":
        parts = ()
    experiments = tuple(EXPERIMENTS) if asked.experiments == "all" else _listed(asked.experiments, ())
    _all_known("engine", engines, tuple(ENGINES))
    _all_known("part", parts, PARTS)
    _all_known("experiment", experiments, tuple(EXPERIMENTS))
    return Settings(
        models,
        engines,
        experiments,
        parts,
        asked.repeats or (5 if asked.quick else 9),
        asked.batch,
        asked.device,
        asked.backend,
        asked.fastdp and str(pathlib.Path(asked.fastdp).absolute()),
        asked.limit_gb,
        asked.quick,
    )


def _listed(text: str | None, default: Sequence[str]) -> tuple[str, ...]:
    """Names between semicolons or commas; a comma after ``key=value`` goes on with the sizes of a family."""
    if not text:
        return tuple(default)
    names: list[str] = []
    for part in text.replace(";", ",").split(","):
        if "=" in part and ":" not in part and names:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return tuple(names)


def _all_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"there is no {what} {name!r}; there are {', '.join(known)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.run", description=__doc__)
    add = parser.add_argument
    add("--models", help=f"of {', '.join([*CASES, *MORE_CASES])}, or gpt:width=128,context=128 and the like")
    add("--engines", help=f"of {', '.join(ENGINES)}")
    add("--parts", help=f"of the main table: {', '.join(PARTS)}, or none (experiments alone)")
    add("--experiments", help=f"also run: {', '.join(EXPERIMENTS)}, or all")
    add("--repeats", type=int, help="turns of every pair, at least (9)")
    add("--quick", action="store_true", help="two small models and a few engines, in about a minute")
    add("--batch", type=int, help="examples per step, instead of each model's own")
    add("--output", default="benchmark_results", help="folder; later runs add to the results in it")
    add("--fastdp", help="folder with a checkout of FastDP")
    add("--limit-gb", type=float, default=2.0, help="memory for the experiment max_batch on CPU")
    add("--threads", type=int, help="of PyTorch, in every process")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", default="inductor", choices=("inductor", "eager"), help="eager is for tests of this program")
    add("--timeout", type=float, default=900.0, help="seconds for one process")
    add("--inline", action="store_true", help="all in this process; for tests of this program")
    docs = str(ROOT / "docs" / "benchmarks.md")
    add("--docs", nargs="?", const=docs, help="write the page of the documentation (docs/benchmarks.md)")
    add("--report-only", action="store_true", help="no measurements: table, plot and page from an earlier run")
    return parser


if __name__ == "__main__":
    main()
