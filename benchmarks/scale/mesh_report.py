"""From sizes of stages on meshes of four dimensions to a section of the page."""

from __future__ import annotations

import inspect
import re
from typing import Any

from benchmarks.markdown import markdown
from benchmarks.scale import mesh_model
from benchmarks.scale.mesh_model import predict
from benchmarks.scale.meshes import MODELS, Mesh
from benchmarks.scale.throughput import Cluster

__all__ = ["CLUSTER", "carried", "exchanged", "section"]

BEGIN, END = "<!-- meshes of four dimensions -->", "<!-- /meshes -->"
_SECTION = re.compile(f"{BEGIN}.*{END}\n", re.DOTALL)
CLUSTER = Cluster(flops=4e14, inside=4.5e11, outside=5e10)
NAMES = {
    "plain": "not private", "plain_again": "not private, checkpointed blocks", "ours": "private",
    "ours_again": "private, checkpointed blocks",
}  # fmt: skip
_METHOD = f"""## Meshes of four dimensions

FSDP2 × tensor × pipeline × context parallelism, of models of 70 and 405 billion parameters, all of them trained, on
`data × tensor × stages × context` ranks.

One rank's share of the first stage runs without content, as above, under FSDP2 with parameters, sums and optimizer in
float32 and products in bfloat16, on one example of 8,192 tokens as the micro-batch. Heads and inner features are cut
over the ranks of tensor parallelism and tokens over those of context parallelism; values between layers are whole on
every rank of tensor parallelism. Memory and FSDP2's bytes are counted; what the other dimensions send follows from
shapes; seconds are a model. A micro-batch of one example has its own gradient for its sum, so what is kept until the
clip weights are known are gradients of a stage in place of activations. *At most*: as the pipeline does it, clipped
while the schedule runs; *clip at the step*: were all micro-batches held until the step.

Assumptions: {CLUSTER.flops:g} FLOP/s on a rank without privacy (an H100 on up to 16,384 ranks: 380 to 430 TFLOP/s,
Llama Team 2024, "The Llama 3 Herd of Models"), private speed 0.85 of that (the goal), {CLUSTER.inside:g}
bytes/s in each direction within nodes of {CLUSTER.node} (NVLink of H100 SXM: 900 GB/s in both, NVIDIA's data sheet),
{CLUSTER.outside:g} bytes/s between them (400 Gbit/s a rank, the same), {CLUSTER.latency:g} s a hop,
{CLUSTER.traffic:g} bytes/s for the optimizer and {CLUSTER.noise:g} normal values a second. Links reach less than their
data sheet says, so seconds are a lower bound. Steps have eight micro-batches for each stage.
"""


def section(data: dict[str, Any]) -> str:
    """All of it, between the marks by which it is found again."""
    written = (
        f"torch {data['torch']}, {data['revision']}; `python -m benchmarks.scale --models '' --docs` writes it alone."
    )
    parts = [BEGIN, "", _METHOD, f"This section: {written}\n"]
    for name in dict.fromkeys(c["model"] for c in data["cells"]):
        parts.append(_model(name, [c for c in data["cells"] if c["model"] == name], data["ratio"]))
    formulae = inspect.cleandoc(mesh_model.__doc__ or "").replace("::\n", ":\n")
    return "\n".join([*parts, f"### The formulae of the mesh\n\n{formulae}\n", END, ""])


def exchanged(page: str, new: str) -> str:
    """The page with this section in the place of its own, or at its end."""
    found = _SECTION.search(page)
    return page[: found.start()] + new + page[found.end() :] if found else f"{page.rstrip()}\n\n{new}"


def carried(before: str, page: str) -> str:
    """A new page with the section that the one before had, if it had one."""
    found = _SECTION.search(before)
    return exchanged(page, found.group()) if found else page


def _model(name: str, cells: list[dict[str, Any]], ratio: float) -> str:
    sizes = MODELS[name]
    memory, sent, speed = [], [], []
    for cell in cells:
        mesh = Mesh(*cell["mesh"])
        label = str(mesh)
        if "error" in cell:
            memory.append([label, str(mesh.ranks), NAMES[cell["way"]], cell["error"], "", "", "", ""])
            continue
        private = cell["way"].startswith("ours")
        found = predict(sizes, mesh, cell, CLUSTER, ratio, private=private)
        figures = [cell["fixed"], cell["forward"], cell["held"] or None, found["memory"]]
        figures.append(found["at_the_step"] if private else None)
        memory.append([label, str(mesh.ranks), NAMES[cell["way"]], *map(_gb, figures)])
        if cell["way"] in ("plain", "ours"):
            sent.append([label, NAMES[cell["way"]], *(_gb(found["sent"][k]) for k in ("tp", "cp", "pp", "dp"))])
            speed.append((label, mesh, private, found))
    head = ["mesh", "ranks", "", "between steps", "a micro-batch", "until its clip", "at most", "clip at the step"]
    text = f"### {sizes.title}\n\nMemory of a rank of the first stage, GB:\n\n{markdown(head, memory)}\n"
    head = ["mesh", "", "tensor", "context", "pipeline", "data"]
    text += f"Sent by a rank for one micro-batch, GB:\n\n{markdown(head, sent)}\n"
    return text + f"A step, modelled:\n\n{_speeds(speed)}"


def _speeds(rows: list[tuple[str, Mesh, bool, dict[str, Any]]]) -> str:
    lines = []
    plain = {label: found for label, _, private, found in rows if not private}
    for label, mesh, private, found in rows:
        if private and label in plain:
            before = plain[label]["tokens"]
            lines.append([
                label, str(mesh.ranks), str(found["examples"]), f"{found['bubble']:.2f}", f"{before:,.0f}",
                f"{found['tokens']:,.0f}", f"{found['tokens'] / before:.2f}", found["bound"],
            ])  # fmt: skip
    head = ["mesh", "ranks", "examples", "bubble", "not private, tokens/s", "private, tokens/s", "of not private"]
    return markdown([*head, "private, bound by"], lines)


def _gb(size: float | None) -> str:
    if not size:
        return ""
    return f"{size / 1e9:.2f}" if size >= 5e7 else f"{size / 1e9:.4f}" if size >= 5e4 else f"{size / 1e9:.1e}"
