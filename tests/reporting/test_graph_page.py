"""The page of a graph: well-formed, self-contained, escaped, and what it marks is what it says."""

from __future__ import annotations

import html.parser
import pathlib
import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpcompile import DPCompileError, PrivacyError, dp_compile, viz
from dpcompile.module import engine_of
from dpcompile.reporting.graph_page import Row, rows_of

_VOID = {"meta", "input", "br"}


class Page(html.parser.HTMLParser):
    """A page taken apart: every element closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in {tag}"
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in attributes.items())]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh())
        self.add_module("<i>&\"'", nn.Linear(2 * 16, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.features(x).flatten(1)
        return self.get_submodule("<i>&\"'")(hidden) if "</script><b onload='x'>" else hidden


def made(tmp_path: pathlib.Path, **options: Any) -> tuple[Any, str, Page]:
    model: Any = dp_compile(Net(), backend="eager", **options)
    model.trace(torch.randn(4, 1, 6, 6))
    text = viz.page(model, tmp_path / "graph.html").read_text("utf-8")
    return model, text, Page(text)


def test_it_is_whole_and_needs_nothing_else(tmp_path: pathlib.Path) -> None:
    _, text, page = made(tmp_path)
    assert not page.open and text.startswith("<!DOCTYPE html>")
    names = {name for _, attributes in page.elements for name in attributes}
    assert not names & {"src", "srcset", "action"} and "http:" not in text and "https:" not in text
    assert not [n for n in names if n.startswith("on")], "no handlers in attributes"
    assert all(str(a["href"]).startswith("#") for a in page.all("a"))
    assert not page.all("link") + page.all("img") + page.all("iframe") and len(page.all("script")) == 1
    assert page.all("meta")[1]["content"] == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def test_what_comes_from_the_model_is_text(tmp_path: pathlib.Path) -> None:
    _, text, page = made(tmp_path)
    assert not page.all("i") + page.all("b")
    assert any("</script><b onload='x'>" in data for tag, data in page.texts if tag == "td")
    assert len(page.all("button", **{"data-module": "<i>&\"'"})) == 1
    (script,) = [data for tag, data in page.texts if tag == "script"]
    assert "onload" not in script and "Linear" not in script and text.count("</script>") == 1


@pytest.mark.parametrize("options", [{}, {"clipping": "per_layer"}, {"norm": "ghost"}, {"regions": "blocks"}])
def test_every_node_is_there_once_and_marked(tmp_path: pathlib.Path, options: dict[str, Any]) -> None:
    model, _, page = made(tmp_path, **options)
    graph = model.graph.graph
    rows = [a for a in page.all("tr") if "data-job" in a]
    assert [a["id"] for a in rows] == [f"n-{n.name}" for n in graph.nodes if n.op != "output"]
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {str(a["href"])[1:] for a in page.all("a")}
    assert targets <= set(ids)
    jobs = Counter(str(a["data-job"]) for a in rows)
    assert jobs["norm"] and jobs["clip"] and jobs["sum"] and jobs[""]
    plan = [a["data-parameter"] for a in page.all("tr") if "data-parameter" in a]
    transformed = engine_of(model).transformed
    assert transformed is not None and plan == [row["parameter"] for row in transformed.plan.rows()]


def test_marks_are_what_the_nodes_do(tmp_path: pathlib.Path) -> None:
    """Against the graph: what the proof saw is the model's; sums come behind the clip, and it behind the norms."""
    model, _, _ = made(tmp_path, norm="ghost")
    transformed = engine_of(model).transformed
    assert transformed is not None
    rows: dict[str, Row] = {row.name: row for row in rows_of(transformed)}
    below: dict[str, set[str]] = {}
    for row in rows.values():
        below[row.name] = {rows[n].job for n in row.operands}.union(*(below[n] for n in row.operands))
        assert (row.job == "") == (row.name in transformed.certificate.values), row
        assert row.job == "sum" or "sum" not in below[row.name]
        assert row.job or not below[row.name] - {""}
    given = {what: row for row in rows.values() for what in row.gives}
    assert given.keys() == {"norms", *(f"sum of {name}" for name in transformed.sum_slots)}
    for what, row in given.items():
        assert row.job == ("norm" if what == "norms" else "sum") and {"norm", "clip"} <= below[row.name]
        assert what == "norms" or row.module == what[7:].rpartition(".")[0]
    hidden = next(row for row in rows.values() if row.module == "features.1" and row.side == "forward")
    assert re.fullmatch(rf"{re.escape(__file__)}:\d+, in forward: hidden = .*", hidden.line)
    assert hidden.shape == "float32 [4, 2, 4, 4]" and hidden.label == "examples on dim 0 (B)"


def test_what_has_no_page(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DPCompileError, match="nothing is compiled yet"):
        viz.page(dp_compile(Net(), backend="eager"), tmp_path / "graph.html")
    with pytest.raises(PrivacyError, match="Net is not a private model"):
        viz.page(Net(), tmp_path / "graph.html")
