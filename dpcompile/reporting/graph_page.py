"""The rewritten graph as one page of HTML that needs nothing else: by module, by line, by what each node is for."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, fx

from dpcompile.graph.insert import JOB
from dpcompile.graph.locate import module_of, where
from dpcompile.pipeline import Transformed
from dpcompile.reporting.explorer import SCRIPT, STYLE

__all__ = ["Row", "graph_page", "rows_of"]

_JOBS = {"": "the model's", "norm": "norm", "clip": "clip", "sum": "clipped sum"}
_HEAD = ("node", "operation", "operands", "shape", "examples", "for", "module", "line")


class Row(NamedTuple):
    """A node, as the page shows it."""

    name: str
    """Of the node."""
    operation: str
    """Its target, or what kind of input it is."""
    operands: tuple[str, ...]
    """Names of the nodes that it reads."""
    shape: str
    """Of its value, with the dtype."""
    label: str
    """How examples lie in it, by the proof; "" of what was written in behind the proof."""
    job: str
    """"norm", "clip" or "sum"; "" of the model's own nodes."""
    side: str
    """"forward" or "backward"."""
    module: str
    """Path of the innermost module that it belongs to; of a clipped sum the parameter's; "" of norms and clips."""
    line: str
    """``file:line``, function and source."""
    gives: tuple[str, ...]
    """What the graph returns by it: the clipped sum of a parameter, or the norms."""


def rows_of(transformed: Transformed) -> list[Row]:
    """The nodes of the rewritten graph, in its order. What was written in has the line of what it was written for."""
    graph, labels = transformed.graph.graph, transformed.certificate.values
    returned: dict[fx.Node, list[str]] = {}
    outputs: Sequence[object] = graph.output_node().args[0]  # type: ignore[assignment]
    slots = {**{slot: f"sum of {name}" for name, slot in transformed.sum_slots.items()}, transformed.norm_slot: "norms"}
    for slot, what in slots.items():
        if slot < len(outputs) and isinstance(node := outputs[slot], fx.Node):
            returned.setdefault(node, []).append(what)
    found: list[Row] = []
    sums = _modules_of_sums(transformed, outputs)
    for node in graph.nodes:
        if node.op == "output":
            continue
        own = module_of(node)
        found.append(
            Row(
                node.name,
                str(node.target) if node.op == "call_function" else node.op,
                tuple(n.name for n in node.all_input_nodes),
                _shape(node.meta.get("val")),
                labels.get(node.name, ""),
                node.meta.get(JOB, ""),
                "forward" if node.meta.get("partitioner_tag") == "is_forward" else "backward",
                own[0] if own is not None else sums.get(node, ""),
                "" if node.op == "placeholder" else where(node) or "",
                tuple(returned.get(node, ())),
            )
        )
    return found


def _modules_of_sums(transformed: Transformed, outputs: Sequence[object]) -> dict[fx.Node, str]:
    """Of nodes that one parameter's clipped sum alone is made by."""
    owners: dict[fx.Node, set[str]] = {}
    for name, slot in transformed.sum_slots.items():
        stack = [outputs[slot]]
        while stack:
            node = stack.pop()
            if isinstance(node, fx.Node) and node.meta.get(JOB) == "sum" and name not in owners.get(node, ()):
                owners.setdefault(node, set()).add(name)
                stack += node.all_input_nodes
    return {node: next(iter(names)).rpartition(".")[0] for node, names in owners.items() if len(names) == 1}


def graph_page(transformed: Transformed, plan: Sequence[Mapping[str, str]], title: str) -> str:
    """The page.

    Args:
        transformed: what the passes made of a captured graph.
        plan: rows of the plan (``plan.rows()``), one for each gradient site.
        title: text.

    **Guarantee.** All text of the model, its files and its graph is escaped; the page loads nothing (a policy in its
    head forbids it), and sends nothing.
    """
    rows = rows_of(transformed)
    jobs = Counter(row.job for row in rows)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">",
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>",
        f"<p>{len(rows)} nodes: " + ", ".join(f"{jobs[j]} {text}" for j, text in _JOBS.items()) + ".</p>",
        '<p class="filter">' + "".join(_checkbox(j, text) for j, text in _JOBS.items()),
        '<label>text <input id="search" type="search"></label> <button id="all" type="button">show all</button>',
        ' <span id="shown"></span></p>',
        '<div class="columns"><nav>',
        "<details open><summary>modules</summary>",
        *_tree(Counter(row.module for row in rows)),
        "</details><details open><summary>lines</summary><ul>",
        *_lines(rows),
        "</ul></details></nav><main>",
        "<details open><summary>the plan: a row for each gradient site</summary>",
        *_plan(plan),
        "</details><details open><summary>the graph</summary>",
        '<table id="graph"><thead><tr>' + "".join(f"<th>{h}</th>" for h in _HEAD) + "</tr></thead><tbody>",
        *map(_row, rows),
        "</tbody></table></details><details><summary>the proof</summary>",
        f"<pre>{_text(str(transformed.certificate))}</pre></details></main></div>",
        f"<script>{SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts)


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _checkbox(job: str, text: str) -> str:
    return f'<label class="{job or "own"}"><input type="checkbox" class="job" value="{job}" checked> {text}</label> '


def _tree(counts: Mapping[str, int]) -> Iterator[str]:
    """Modules by their paths, and those that hold them, each a button."""
    yield "<ul>"
    holders = {path[:i] for path in counts for i, letter in enumerate(path) if letter == "."}
    for path in sorted(holders | counts.keys()):
        depth = path.count(".") + bool(path)
        yield f'<li style="margin-left:{depth}em">{_button("module", path, path or "(none)", counts.get(path, 0))}</li>'
    yield "</ul>"


def _lines(rows: Iterable[Row]) -> Iterator[str]:
    """Lines of source in the order in which the graph comes to them."""
    counts = Counter(row.line for row in rows)
    for line in counts:
        yield f"<li>{_button('line', line, line or '(none)', counts[line])}</li>"


def _button(kind: str, value: str, text: str, count: int) -> str:
    return f'<button type="button" data-{kind}="{_text(value)}">{_text(text)}</button> {count}'


def _plan(plan: Sequence[Mapping[str, str]]) -> Iterator[str]:
    if not plan:
        yield "<p>No gradient site.</p>"
        return
    yield '<table id="plan"><thead><tr>' + "".join(f"<th>{_text(h)}</th>" for h in plan[0]) + "</tr></thead><tbody>"
    for row in plan:
        name = row["parameter"]
        cells = [f"<td>{_text(str(value))}</td>" for key, value in row.items() if key != "parameter"]
        link = f'<td><a href="#s-{_text(name)}">{_text(name)}</a></td>'
        yield f'<tr data-parameter="{_text(name)}">{link}{"".join(cells)}</tr>'
    yield "</tbody></table>"


def _row(row: Row) -> str:
    operands = " ".join(f'<a href="#n-{_text(n)}">{_text(n)}</a>' for n in row.operands)
    job = _JOBS[row.job] if row.job else ""
    gives = "".join(f'<br><span id="s-{_text(g[7:])}">{_text(g)}</span>' if g != "norms" else "<br>norms"
                    for g in row.gives)  # fmt: skip
    return (
        f'<tr id="n-{_text(row.name)}" class="{row.job or "own"} {row.side}" data-job="{row.job}" '
        f'data-module="{_text(row.module)}" data-line="{_text(row.line)}">'
        f"<td>{_text(row.name)}</td><td>{_text(row.operation)}</td><td>{operands}</td><td>{_text(row.shape)}</td>"
        f"<td>{_text(row.label)}</td><td>{job}{gives}</td><td>{_text(row.module)}</td><td>{_text(row.line)}</td></tr>"
    )


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return "; ".join(map(_shape, value))
    return "" if value is None else str(value)
