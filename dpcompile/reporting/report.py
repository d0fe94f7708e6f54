"""The report itself: named values in sections, epsilon at several delta, and what is not covered; as text or data."""

from __future__ import annotations

import html
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpcompile.errors import DPCompileError

__all__ = ["Report"]

_STYLE = (
    "body{font-family:sans-serif;max-width:50em;margin:2em auto;line-height:1.4}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left;vertical-align:top}pre{overflow-x:auto}"
)


@dataclass(frozen=True)
class Report:
    """What a training run was and cost. It holds public facts only, if the audit that was handed in does.

    Attributes:
        title: of the page.
        summary: one sentence.
        sections: title -> name -> value.
        curve: ``(delta, epsilon)``, upper bounds.
        certificate: the proof of what was compiled last, as text; "" if nothing is compiled.
        not_covered: what epsilon says nothing of.
    """

    title: str
    summary: str
    sections: Mapping[str, Mapping[str, str]]
    curve: Sequence[tuple[float, float]]
    certificate: str
    not_covered: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data. An infinite epsilon is the string "inf", for JSON has no number for it."""
        found = asdict(self)
        found["curve"] = [{"delta": d, "epsilon": e if e < float("inf") else "inf"} for d, e in self.curve]
        return found

    def json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def markdown(self) -> str:
        """The page in Markdown."""
        lines = [f"# {self.title}", "", self.summary]
        for title, values in self.sections.items():
            lines += ["", f"## {title}", "", *_table([("", ""), *values.items()])]
        lines += ["", "## The whole curve", "", *_table([("δ", "ε, at most"), *self._rows()])]
        lines += ["", "## What this does not cover", "", *(f"- {text}" for text in self.not_covered)]
        if self.certificate:
            lines += ["", "## The proof", "", "```text", self.certificate, "```"]
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """The page as one HTML file; with a plot of the curve where matplotlib is installed."""
        body = [f"<h1>{_text(self.title)}</h1>", f"<p>{_text(self.summary)}</p>"]
        for title, values in self.sections.items():
            body += [f"<h2>{_text(title)}</h2>", _html_table(values.items())]
        body += ["<h2>The whole curve</h2>", self._plot(), _html_table([("δ", "ε, at most"), *self._rows()])]
        body += ["<h2>What this does not cover</h2>", "<ul>"]
        body += [f"<li>{_text(text)}</li>" for text in self.not_covered]
        body += ["</ul>"]
        if self.certificate:
            body += ["<h2>The proof</h2>", f"<pre>{_text(self.certificate)}</pre>"]
        head = f'<meta charset="utf-8"><title>{_text(self.title)}</title><style>{_STYLE}</style>'
        return f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'

    def save(self, path: str | pathlib.Path) -> None:
        """Write it, by the end of the name: ``.md``, ``.json`` or ``.html``.

        Raises:
            DPCompileError: another ending.
        """
        path = pathlib.Path(path)
        writers = {".md": self.markdown, ".json": self.json, ".html": self.html}
        if path.suffix not in writers:
            raise DPCompileError(
                f"a report cannot be written to {path.name!r}", remedy="give a name that ends in .md, .json or .html"
            )
        path.write_text(writers[path.suffix](), encoding="utf-8")

    def __str__(self) -> str:
        return self.markdown()

    def _repr_html_(self) -> str:
        return self.html()

    def _rows(self) -> list[tuple[str, str]]:
        return [(f"{delta:g}", f"{epsilon:.4g}") for delta, epsilon in self.curve]

    def _plot(self) -> str:
        """An SVG of epsilon over delta, "" without matplotlib or a finite epsilon."""
        finite = [(d, e) for d, e in self.curve if e < float("inf")]
        try:
            from matplotlib.backends.backend_svg import FigureCanvasSVG
            from matplotlib.figure import Figure
        except ImportError:
            return ""
        if not finite:
            return ""
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.plot(*zip(*finite, strict=True), marker=".")
        axes.set(xscale="log", xlabel="δ", ylabel="ε, at most")
        axes.grid(alpha=0.3)
        written = io.StringIO()
        figure.savefig(written, format="svg")
        text = written.getvalue()
        return text[text.index("<svg") :]


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    first, *rest = [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    return [f"| {first} |", "| --- | --- |", *(f"| {row} |" for row in rest)]


def _html_table(rows: Any) -> str:
    lines = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows)
    return f"<table>{lines}</table>"


def _text(value: str) -> str:
    return html.escape(str(value))
