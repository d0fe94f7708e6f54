"""The list of passes: what it says of itself, and what a trace writes down."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from dpcompile import DPCompileError, ExampleMixingError, dp_compile, pipeline
from dpcompile.graph.normalise import expand_last
from dpcompile.graph.passes import run_passes


def test_every_pass_says_what_it_does() -> None:
    for step in (*pipeline.PRIVATIZE, *pipeline.LABEL):
        assert step.__doc__, step.__name__


def test_a_trace_shows_the_graph_before_and_after(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPCOMPILE_TRACE", str(tmp_path))
    private = dp_compile(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), backend="eager")
    private(torch.randn(5, 3)).square().mean().backward()
    (folder,) = tmp_path.iterdir()
    table = (folder / "passes.txt").read_text()
    assert [line.split()[0] for line in table.splitlines()] == ["pass", *(p.__name__ for p in pipeline.PRIVATIZE)]
    assert "Prove that examples do not mix: a label for every value." in table
    written = {f.name: f.read_text() for f in folder.iterdir()}
    assert set(written) == {"passes.txt", "00-captured.txt", "13-insert_clipping.txt"}
    assert "where" in written["13-insert_clipping.txt"]  # weight 0 is exact
    assert "where" not in written["00-captured.txt"]


def test_a_trace_shows_which_pass_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPCOMPILE_TRACE", str(tmp_path))
    private = dp_compile(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), backend="eager")
    with pytest.raises(ExampleMixingError):
        private(torch.randn(5, 3))
    (folder,) = tmp_path.iterdir()
    last = (folder / "passes.txt").read_text().split("\nlabel ")[1]
    assert "what to do: " in last


def test_a_trace_that_cannot_be_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DPCOMPILE_TRACE", str(tmp_path / "file"))
    private = dp_compile(nn.Linear(3, 4), backend="eager")
    with pytest.raises(DPCompileError, match=r"(?s)DPCOMPILE_TRACE is '.*file'.*set it to a folder"):
        private(torch.randn(5, 3))


@dataclass
class _Work:
    module: fx.GraphModule


def test_a_pass_that_breaks_the_graph_is_caught() -> None:
    """The tests run with DPCOMPILE_LINT."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.neg, (x,)))

    def breaks(work: _Work) -> None:
        next(n for n in graph.nodes if n.op == "call_function").append(x)

    with pytest.raises(RuntimeError, match="before it has been defined"):
        run_passes([breaks], _Work(fx.GraphModule({}, graph)))


def _traced(function: Callable[..., Tensor], *values: Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*values)


SPREAD: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "scaled": (lambda x, y: x.expand(4, 5, 3) / 7, True),
    "scaled twice": (lambda x, y: -(x.expand(4, 5, 3) / 7), True),
    "cast": (lambda x, y: torch.ops.prims.convert_element_type.default(x.expand(4, 5, 3), torch.float64), True),
    "more dimensions": (lambda x, y: x.expand(2, 4, 5, 3) * 2.0, True),
    "by another value": (lambda x, y: x.expand(4, 5, 3) * y, False),
    "by itself": (lambda x, y: (lambda z: z * z)(x.expand(4, 5, 3)), False),
    "with a view behind": (lambda x, y: (lambda z: z.view(20, 3).sum() * z)(x.expand(4, 5, 3) / 7), False),
}


def test_what_is_spread_and_returned_stays_as_it_is() -> None:
    module = _traced(lambda x: x.expand(4, 5, 3) / 7, torch.randn(4, 1, 3))
    expand_last(module.graph)
    assert not module(torch.randn(4, 1, 3)).stride(1) == 0


@pytest.mark.parametrize("case", list(SPREAD))
def test_what_is_spread_is_scaled_before(case: str) -> None:
    function, moved = SPREAD[case]
    values = torch.randn(4, 1, 3), torch.randn(4, 5, 3)
    module = _traced(lambda *given: function(*given).exp(), *values)
    expand_last(module.graph)
    module.graph.lint()
    module.recompile()
    assert torch.equal(module(*values), function(*values).exp())
    (last,) = module.graph.output_node().all_input_nodes[0].all_input_nodes
    assert (last.target is torch.ops.aten.expand.default) == moved
    assert last.meta["val"].shape == function(*values).shape
    assert last.meta["val"].dtype == function(*values).dtype
