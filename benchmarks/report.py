"""From results to Markdown: the tables, and the page of the documentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.engines import BASELINE, ENGINES
from benchmarks.experiments import EXPERIMENTS, experiment
from benchmarks.markdown import markdown

__all__ = ["page", "summary"]

Cell = dict[str, Any]


def summary(data: dict[str, Any]) -> str:
    """All tables of the main part."""
    parts = []
    for title, explained, cell in _TABLES:
        table = _by_engine(data, cell)
        if table:
            parts.append(f"### {title}\n\n{explained}\n\n{table}")
    for name in EXPERIMENTS:
        if name in data["experiments"]:
            module = experiment(name)
            parts.append(f"### {module.TITLE}\n\n{module.section(data['experiments'][name])}")
    return "\n".join(parts)


def page(data: dict[str, Any], picture: str | None = None) -> str:
    """``docs/benchmarks.md``, with the plot if there is a file of it."""
    machine = data["machine"]
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    versions = ", ".join(f"{n} {v}" for n, v in machine["versions"].items())
    commands = "\n".join(data["commands"])
    return f"""# Benchmarks

Written by `python -m benchmarks.run --docs`; do not edit. The figures are those of one machine, and of these versions:

- {machine["cpu"]}, {machine["cores"]} cores, {machine["memory_gb"]} GB{gpu}; {machine["threads"]} threads
- {machine["system"]}, Python {machine["python"]}, {versions}

```sh
{commands}
```

{_METHOD}
## Models

{_models(data)}
## Results

{f"![Time ratios]({picture})" if picture else ""}

{summary(data)}"""


_METHOD = """## What is measured

**A step** is the gradient step: gradients set to None, forward, per-example loss, backward, and whatever the engine
still has to do until clipped sums stand in `p.grad` (Opacus: `clip_and_accumulate`). Noise and optimizer are not in it;
the breakdown by sections shows them separately. Everything is float32. Engines that compile (ours, non-private,
`vmap(grad)`) compile model and loss together; the others run both eagerly, as their users do. FastDP draws no noise in
the step; JAX-Privacy runs the same model written for JAX, compiled by XLA with threads of its own.

**Answers come first.** Clipped sums are compared with one backward per example, uncompiled; C is the median norm, so
about half of the examples are clipped. The error is the largest of a parameter's errors over the largest norm of a
parameter's gradient. Above the tolerance the engine gets "wrong answer" in place of a figure. The tolerance is 1e-3,
or, for models with kinks (ReLU, max pooling), where rounding decides on which side a unit is and the gradient jumps,
twice what a change of all weights by 3e-7 does to the sums. The non-private engines are compared with the plain sum.

**Time.** Every engine runs in a process of its own, in turns with the compiled non-private step (A B A B). The ratio is
minimum of the non-private step over minimum of the engine's: 1 is as fast as not being private. The ratio of medians
stands beside it. Ours may be above 1 on CPUs: the products that privacy adds or makes anew, clipped sums among them, go
through the oneDNN inside of torch where it is faster than the library behind `torch.mm`, which makes all products of
the non-private step; an embedding's clipped sum is a pass over its cotangents, where Inductor adds the plain one up by
atomic operations (`python -m benchmarks.products` prints all of these). Of an LSTM the plain step is oneDNN's, one
operation for all its steps; so is ours, with the products of its weights outside; that of `vmap(grad)` is unrolled.

**Memory** is the peak of one step above the level before it (weights, inputs and compiled code are not in it), as
PyTorch's allocator counts it: on CPU from the profiler's record of allocations, the same to the byte in every run; on
CUDA `max_memory_allocated`; of JAX what XLA says. Each engine is measured in its own process after two steps. The
high-water mark of resident memory is noted too: it has what libraries take past the allocator, and what the C allocator
keeps, and differs from run to run.

**Compile time** is the first step in a new process with empty caches, after something small was compiled.

## The papers' models

The four end-to-end models of the Opacus paper over batches of 16 to 2048 (epochs, and twenty of them with the
compilation), and ViT tiny to huge and BiT-ResNet 50x1 to 152x4 (run over physical batches where they fit into
`--limit-gb`, and sized without content on an A100 where not), are experiments of their own;
`benchmarks/paper_models.py` has the layers, with sources. `--models` takes some of them, or single points:

```sh
python -m benchmarks.run --parts none --experiments opacus_models --models opacus_mnist:batch=64,opacus_lstm:batch=16
python -m benchmarks.run --parts none --experiments vision_models,max_batch --models vit_tiny,bit_50x1 --limit-gb 4
```

## On a GPU

None of these figures is of a GPU: there was none. What is to be measured on one is one command, which ends within eight
minutes (`--seconds`), writes `gpu.json` and `gpu.md` after every step, and goes on where a step raises:

```sh
python -m benchmarks.gpu --output gpu_results
```

It needs torch 2.11 or later with CUDA and Triton, a C compiler for Triton's launchers, the sources with `tests/`,
and no network: norm operators against float64 on the tests' cases; noise (moments, tails, bits against the CPU's);
40 models of the test suite and five of these, against one backward per example; then gradient steps of ViT-B/16 and
GPT-2 small (T = 1024) in bfloat16 and TF32 beside the compiled non-private step, and Opacus' ghost clipping where
it is installed; a block of Llama-3-8B at T = 4096; how often a step waits for the device; and the largest batch.
`--parts` takes some of them. `--rehearse` went through all of them on a CPU, uncompiled and with small sizes: it
shows that the program runs, and nothing of a GPU. What plans expect of one is in [plan.md](plan.md).
"""


def _models(data: dict[str, Any]) -> str:
    rows = []
    for name, m in data["models"].items():
        if "title" in m:
            sizes = f"{m['parameters']:,}" + (f" ({m['trainable']:,})" if m["trainable"] != m["parameters"] else "")
            rows.append(
                [f"`{name}`", m["title"], str(m["batch"]), sizes, f"{m['clipped']:.0%}", f"{m['tolerance']:.0e}"]
            )
    return markdown(["model", "", "batch", "parameters (trainable)", "clipped", "tolerance"], rows)


def _by_engine(data: dict[str, Any], cell: Callable[[Cell, Cell], str]) -> str:
    """A row per engine, a column per model; no table if no cell has anything to show."""
    models = [n for n in data["models"] if data["models"][n]["engines"]]
    engines = [e for e in ENGINES if any(e in data["models"][m]["engines"] for m in models)]
    rows, filled = [], False
    for engine in engines:
        row = [ENGINES[engine].title]
        for model in models:
            known = data["models"][model]["engines"]
            mine, base = known.get(engine, {}), known.get(BASELINE, {})
            text = cell(mine, base)
            filled = filled or bool(text)
            row.append(text or ("" if not mine.get("error") else "—"))
        rows.append(row)
    return markdown(["engine", *(f"`{m}`" for m in models)], rows) if filled else ""


def _ratio(mine: Cell, base: Cell) -> str:
    if "error" in mine:
        return mine["error"]
    if "ratio" not in mine:
        return ""
    return f"{mine['ratio']:.2f} ({mine['ratio_median']:.2f})"


def _milliseconds(mine: Cell, base: Cell) -> str:
    return f"{1e3 * mine['times']['minimum']:.1f} ({1e3 * mine['times']['median']:.1f})" if "times" in mine else ""


def _peak(mine: Cell, base: Cell) -> str:
    above = _quotient(mine, base, "memory", "allocated")
    if not above.endswith("×"):
        return above
    whole = [cell["memory"]["allocated"] + cell["memory"]["parameters"] for cell in (mine, base)]
    return f"{above} ({whole[0] / whole[1]:.2f}×)"


def _resident(mine: Cell, base: Cell) -> str:
    return _quotient(mine, base, "memory", "resident")


def _megabytes(mine: Cell, base: Cell) -> str:
    allocated = mine.get("memory", {}).get("allocated")
    return f"{allocated / 1e6:.1f}" if allocated else mine.get("memory", {}).get("error", "")


def _compile(mine: Cell, base: Cell) -> str:
    quotient = _quotient(mine, base, "compile", "seconds")
    return f"{quotient} ({mine['compile']['seconds']:.1f} s)" if quotient and "seconds" in mine["compile"] else quotient


def _error(mine: Cell, base: Cell) -> str:
    return f"{mine['answer_error']:.0e}" if "answer_error" in mine else ""


def _quotient(mine: Cell, base: Cell, part: str, figure: str) -> str:
    if "error" in mine.get(part, {}):
        return mine[part]["error"]
    a, b = mine.get(part, {}).get(figure), base.get(part, {}).get(figure)
    return f"{a / b:.2f}×" if a and b else ""


def _sections(mine: Cell, base: Cell) -> str:
    found = mine.get("sections")
    if not found:
        return ""
    names = ("forward", "backward", "clip", "update")
    return " / ".join(f"{1e3 * found[n]:.1f}" if n in found else "–" for n in names)


_TABLES: list[tuple[str, str, Callable[[Cell, Cell], str]]] = [
    ("Time ratio", "Non-private compiled over engine, minima (medians); higher is better, 1 costs nothing.", _ratio),
    (
        "Peak memory",
        "Engine over non-private compiled, above the level before the step (with the weights); lower is better.",
        _peak,
    ),
    ("Peak memory, MB", "The same in megabytes.", _megabytes),
    ("Resident memory", "The same ratio of the high-water marks of resident memory.", _resident),
    ("Compile time", "Engine over non-private compiled, cold (seconds); lower is better.", _compile),
    ("Milliseconds", "Of a step: minimum (median).", _milliseconds),
    ("Sections", "Milliseconds of forward / backward / clip / noise and optimizer (minima).", _sections),
    ("Answers", "Error against one backward per example.", _error),
]
