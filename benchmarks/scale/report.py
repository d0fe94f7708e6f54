"""From sizes to Markdown: tables, what explains them, the page of the documentation."""

from __future__ import annotations

import inspect
import pathlib
from typing import Any

from benchmarks.markdown import markdown
from benchmarks.scale import throughput
from benchmarks.scale.models import CASES
from benchmarks.scale.steps import WAYS

__all__ = ["draw", "page", "summary"]

Cell = dict[str, Any]
PUBLISHED = {"init": (0.78, 5.93), "step_peak": (3.98, 34.15)}  # sharded and replicated, of a GPT-2 with 1.5e9
NAMES = {"plain": "not private", "ours": "dpcompile", "twice": "two backwards"}


def summary(data: dict[str, Any]) -> str:
    """All tables."""
    parts = []
    for name in dict.fromkeys(c["model"] for c in data["cells"]):
        cells = [c for c in data["cells"] if c["model"] == name]
        parts.append(f"### {CASES[name].title}\n\n{_described(name, cells)}\n\n{_memory(cells)}\n{_traffic(cells)}")
        if name == "gpt2-xl":
            parts.append(_published(cells))
    parts.append(_model(data["model"]))
    return "\n".join(parts)


def page(data: dict[str, Any], picture: str | None) -> str:
    """``docs/scale.md``."""
    image = f"![examples per second over ranks]({picture})\n" if picture else ""
    return f"""# Large models on many ranks

Written by `python -m benchmarks.scale --docs`; do not edit. torch {data["torch"]}, {data["revision"]}.

{_METHOD}
## Sizes

{summary(data)}
{image}
### The model's formulae

{_formulae()}"""


_METHOD = """## What is sized

One process is rank 0 of ranks that do not exist. Models, FSDP2, the compiled regions, the ledger and the optimizer are
the real ones at their full size and depth; only tensors have no content: their memory is reserved and never touched,
each operation asks a fake tensor for the shapes of its results, and collectives are counted and move nothing. So what
the tables show is what the code gathers, reduces, keeps and frees, not formulae.

- **Memory** is the bytes of all live tensors on rank 0, of the second step (the first makes the optimizer's state).
  Blocks of an allocator, fragmentation, the compiler's and NCCL's own buffers are not in it. Graphs run operation by
  operation, partitioned as Inductor partitions them: fused kernels need less within a graph, never more between
  graphs.
- **Bytes** of a collective are those of the whole tensor. On the wire a rank receives (n - 1)/n of that for a gather
  or a reduction. Replicated training all-reduces the gradients, which sends twice as much, and is not in the table.
- FSDP2 cuts parameters into as many runs of rows as there are ranks, and pads what does not divide: an adapter of 16
  rows is sent as one of 256 on 256 ranks. So bytes grow with the ranks where parameters are small.
- AdamW is the one for all parameters at once (`foreach`), the default on GPUs; noise is drawn as on a GPU.
- `norm='two_pass'` is this library's own lowering with two backwards, norms included. It is refused where two regions
  use one parameter, as with the head of GPT-2, which is its embedding of tokens: it is sized with a head of eight
  classes in its place.
- *Two backwards* is Opacus' published scheme on the non-private step: one forward, a backward whose gradients are
  dropped, another one. Norms and hooks are not in it, so it is a lower bound. *Opacus' optimizer* is its own class on
  gradients that are there; its backward is not sized.
- Rules of the plan are those of a typical CPU's rates (`DPCOMPILE_RATES=typical`).
"""


def _described(name: str, cells: list[Cell]) -> str:
    large = CASES[name]
    known = next((c for c in cells if "parameters" in c), None)
    if known is None:
        return "Nothing could be sized."
    return (
        f"{known['parameters']:,} parameters, {known['trainable']:,} of them trained, {known['depth']} blocks; "
        f"{known['batch']} examples of {large.context} tokens on each rank. GB are 10^9 bytes, on rank 0."
    )


def _memory(cells: list[Cell]) -> str:
    head = ["", "ranks", "initialised", "after forward", "peak of backward", "after backward", "peak of step"]
    return markdown(head, [[WAYS[c["way"]].title, str(c["ranks"]), *_figures(c)] for c in cells])


def _figures(cell: Cell) -> list[str]:
    if "error" in cell:
        return [cell["error"], "", "", "", ""]
    model = ["init"] if cell["way"].startswith("opacus") else ["init", "forward", "backward_peak", "backward"]
    shown = {k: _gb(cell[k]) for k in [*model, "step_peak"]}
    return [shown.get(k, "") for k in ("init", "forward", "backward_peak", "backward", "step_peak")]


def _traffic(cells: list[Cell]) -> str:
    names = {"allgather_base": "all-gathers", "reduce_scatter_base": "reduce-scatters"}
    rows = []
    for c in cells:
        if "error" not in c and WAYS[c["way"]].sharded and not c["way"].startswith("opacus"):
            row = [WAYS[c["way"]].title, str(c["ranks"])]
            for name in names:
                row += [str(c["calls"].get(name, 0)), _gb(c["bytes"].get(name, 0))]
            others = {n: b for n, b in c["bytes"].items() if n not in names and b}
            rows.append([*row, ", ".join(others) or "none", _gb(c["step_bytes"]) if c["step_bytes"] else "none"])
    head = ["", "ranks", "all-gathers", "GB", "reduce-scatters", "GB", "others", "in the optimizer step"]
    return "Communication of a step:\n\n" + markdown(head, rows)


def _published(cells: list[Cell]) -> str:
    """The published figures, and what parameters, gradients and states make of them."""
    found = {c["way"]: c for c in cells if "error" not in c}
    wanted = [w for w in ("ours", "ours_whole", "opacus", "opacus_whole") if w in found]
    if not wanted:
        return ""
    rows = []
    for key, title in (("init", "initialised"), ("step_peak", "peak of the optimizer step")):
        for place, sharded in ((0, True), (1, False)):
            mine = [w for w in wanted if WAYS[w].sharded == sharded]
            text = "; ".join(
                f"{WAYS[w].title}: {_gb(found[w][key])} GB = {found[w][key] / 2**30:.2f} GiB" for w in mine
            )
            rows.append([title, "sharded" if sharded else "replicated", f"{PUBLISHED[key][place]:.2f}", text])
    text = "#### Next to the published figures\n\n" + markdown(["", "", "published GB", "here"], rows)
    first = found[wanted[0]]
    whole = 4 * first["parameters"]
    share = whole / first["ranks"]
    lines = [
        f"Parameters in float32 are 4 × {first['parameters']:,} = {whole / 1e9:.3f} GB ({whole / 2**30:.2f} GiB); a "
        f"rank's share is {share / 1e9:.3f} GB ({share / 2**30:.2f} GiB). In these units:"
    ]
    for way in wanted:
        unit = share if WAYS[way].sharded else whole
        lines.append(
            f"- {WAYS[way].title}: {found[way]['init'] / unit:.2f} after initialisation, "
            f"{found[way]['step_peak'] / unit:.2f} at the peak of the optimizer step;"
        )
    for key, (a, b) in PUBLISHED.items():
        lines.append(
            f"- published {key.replace('_', ' ')}: {a * 1e9 / share:.2f} sharded and {b * 1e9 / whole:.2f} replicated "
            f"if GB are 10^9 bytes, {a * 2**30 / share:.2f} and {b * 2**30 / whole:.2f} if they are 2^30."
        )
    lines += [
        "",
        "At initialisation there are the parameters and nothing else. The peak of the step is five units here: "
        "parameters, clipped sums (which become the noised gradients in place), AdamW's two states, and the square "
        "roots that `foreach` AdamW makes of all second moments at once. Opacus' optimizer has a sixth: the sums "
        "(`summed_grad`) and the noised gradients are different tensors. So the published replicated step fits six "
        "units in units of 2^30, less about two percent; the published sharded one lies between five and six. What the "
        "publication counts in full, which AdamW it ran and in which unit it prints is not known here: a remainder of "
        "some percent is left unexplained.",
    ]
    return text + "\n" + "\n".join(lines) + "\n"


def _model(model: dict[str, Any]) -> str:
    parts = ["### Throughput, modelled\n\nNot measured: what the formulae make of counted bytes and these assumptions."]
    cluster = model["cluster"]
    parts.append("- a rank: " + ", ".join(f"{k} {v:g}" for k, v in cluster.items()))
    for name, load in model["loads"].items():
        parts.append(
            f"- {CASES[name].title}: {load['seconds']:.3g} s for an example without privacy, private speed "
            f"{load['ratio']:g} of that, micro-batches of {load['batch']}, {load['logical']} examples a step"
        )
    text = "\n".join(parts) + "\n\n"
    for name, rates in model["rates"].items():
        ranks = [n for n in rates["plain"]]
        head = ["ranks", *(f"{NAMES[w]}, examples/s" for w in rates), "dpcompile of not private"]
        rows = [
            [n, *(f"{rates[w][n]:.4g}" for w in rates), f"{rates['ours'][n] / rates['plain'][n]:.2f}"] for n in ranks
        ]
        fractions = ", ".join(f"{NAMES[w]} {f:.1e}" for w, f in model["amdahl"][name].items())
        text += (
            f"{CASES[name].title}:\n\n{markdown(head, rows)}\nAmdahl fraction at {ranks[-1]} ranks: {fractions}.\n\n"
        )
    return text


def _formulae() -> str:
    return inspect.cleandoc(throughput.__doc__ or "").replace("::\n", ":\n") + "\n"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size >= 5e7 else f"{size / 1e9:.4f}"


def draw(data: dict[str, Any], path: pathlib.Path) -> bool:
    """Examples per second over ranks; False where matplotlib is missing or there is nothing to draw."""
    rates = data["model"]["rates"]
    try:
        import matplotlib
    except ImportError:
        return False
    if not rates:
        return False
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "scale"
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(rates), figsize=(4.2 * len(rates), 3.2), squeeze=False)
    for panel, (name, ways) in zip(panels[0], rates.items(), strict=True):
        for way, found in ways.items():
            panel.loglog([int(n) for n in found], list(found.values()), marker=".", label=NAMES[way])
        panel.set_title(CASES[name].title, fontsize=9)
        panel.set_xlabel("ranks")
        panel.set_ylabel("examples per second, modelled")
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return True
