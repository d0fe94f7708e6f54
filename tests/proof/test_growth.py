"""What rules say of how results grow with their operands, against numbers: multiples and sums of operands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from operations import TABLE, inputs_of, sized
from torch import Tensor, fx

from dpcompile.graph.compile import trace_like
from dpcompile.graph.labels import Examples, Mixed, Shared
from dpcompile.graph.operations import operation_name
from dpcompile.proof.rules import Call, named_arguments
from dpcompile.proof.rules.growth import Degrees, Homogeneous, Linear, Product, Sum, add_growth, find_growth
from dpcompile.proof.rules.shared import shared

_DRAWS = ("rand", "bernoulli", "dropout", "normal", "uniform", "multinomial", "exponential", "empty", "fractional")


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def called(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def results(value: Any) -> Sequence[Tensor]:
    parts = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in parts if isinstance(v, Tensor)]


def wide(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def close(a: Tensor, b: Tensor) -> bool:
    """Where both are finite: 0 times infinity is no number, whatever the operation."""
    a, b = a.to(torch.complex128), b.to(torch.complex128)
    counts = a.isfinite() & b.isfinite()
    return torch.allclose(a[counts], b[counts], rtol=1e-5, atol=1e-7)


def all_zero(node: fx.Node, values: dict[fx.Node, Any], zeros: Sequence[fx.Node]) -> bool:
    """Whether the result is zero for zeros, where a label says so."""
    labels = {n: Shared(zero=n in zeros) for n in node.all_input_nodes}
    label = shared(Call(node, named_arguments(node), labels, 3, {}, _NoRows()))
    if not isinstance(label, Shared) or not label.zero:
        return True
    found = results(called(node, values | {n: torch.zeros_like(values[n]) for n in zeros}))
    return all(close(torch.zeros_like(x), x) for x in found)


class _NoRows:
    def refusal(self, call: fx.Node, operand: fx.Node, axis: Examples) -> Mixed | None:
        return None


def false_claims(node: fx.Node, values: dict[fx.Node, Any]) -> Iterator[str]:
    """For each operand by itself and for all of them: twice as much of it, and, for linear ones, other values added."""
    operands = [n for n in node.all_input_nodes if wide(values[n])]
    growth = find_growth(operation_name(node.target))
    for scaled in [*([n] for n in operands), operands] if len(operands) > 1 else [operands]:
        if scaled and not all_zero(node, values, scaled):
            yield f"{node.format_node()}: not zero for zeros in {scaled}"
        degrees = {n: float(n in scaled) for n in node.all_input_nodes}
        degree = Degrees(node, named_arguments(node), degrees, lambda n: False).of_result()
        if degree is None or not scaled:
            continue
        before = results(values[node])
        after = results(called(node, values | {n: 2 * values[n] for n in scaled}))
        powers = degree if isinstance(degree, tuple) else [degree] * len(before)
        for a, b, power in zip(before, after, powers, strict=True):
            if not close(a * 2**power, b):
                yield f"{node.format_node()}: not by the power {power} of {scaled}"
        if growth is None or isinstance(growth, Homogeneous) or powers[0] != 1:
            continue
        generator = torch.Generator().manual_seed(3)
        others = {n: torch.randn(values[n].shape, generator=generator).to(values[n]) for n in scaled}
        added = results(called(node, values | others))
        both = results(called(node, values | {n: values[n] + x for n, x in others.items()}))
        of_all = 1 if isinstance(growth, Linear) and growth.first_result else len(before)
        for a, b, c in zip(before[:of_all], added, both, strict=False):
            if wide(c) and not close(a + b, c):
                yield f"{node.format_node()}: not linear in {scaled}"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("index", range(len(TABLE)))
def test_results_grow_as_their_rules_say(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    function, spec, _ = TABLE[index]
    values, _ = inputs_of(spec, sized(monkeypatch, "different"))
    try:
        module = trace_like(function, *values)
    except (RuntimeError, AssertionError):
        pytest.skip("not traceable without Dynamo")
    recorder = Recorder(module)
    with torch.no_grad():
        recorder.run(*values)
        for node in module.graph.nodes:
            known = node.op == "call_function" and find_growth(operation_name(node.target)) is not None
            if known and not any(x in operation_name(node.target) for x in _DRAWS):
                assert list(false_claims(node, recorder.values)) == []


def test_a_wrong_claim_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    for function, name, growth, found in (
        (lambda x: x.sin(), "sin", Linear(), "not by the power 1.0"),
        (lambda x: x.abs(), "abs", Linear(), "not linear in"),
        (lambda x: x.square(), "pow", Linear("self"), "not by the power 1.0"),
        (lambda x: x.cos(), "cos", Linear(), "not zero for zeros"),
        (lambda x: x + x.exp(), "add", Product(("self", "other")), "not zero for zeros"),
        (lambda x: x * x.exp(), "mul", Sum(("self", "other")), "not by the power 1.0"),
    ):
        monkeypatch.setattr("dpcompile.proof.rules.growth._GROWTHS", {name: growth})
        module = trace_like(function, x)
        recorder = Recorder(module)
        with torch.no_grad():
            recorder.run(x)
        node = next(n for n in module.graph.nodes if operation_name(n.target) == name)
        assert found in next(false_claims(node, recorder.values))


def test_an_operation_has_one_growth() -> None:
    with pytest.raises(AssertionError, match="two growths of mul"):
        add_growth(Linear(), "mul")
