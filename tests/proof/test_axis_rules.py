"""The proof's labels against what changes when one example does, operation by operation and in whole joint graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from models import CASES, ZOO, Case
from operations import SIZES, TABLE, Function, inputs_of, sized
from torch import Tensor, fx

from dpcompile import DPCompileError, dp_compile, pipeline
from dpcompile.graph.compile import trace_like
from dpcompile.graph.joint import JointGraph
from dpcompile.graph.labels import Examples, Label, Mixed, Shared, Summed
from dpcompile.proof.prove import Proof, prove

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# --- the experiment ---------------------------------------------------------------------------------------------------


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every value; some are given."""

    def __init__(self, module: fx.GraphModule, given: Mapping[fx.Node, Any]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}
        self.given = given

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        value = self.given.get(n, value)
        if isinstance(value, Tensor) and n.op == "call_function" and "empty" in str(n.target):
            value.zero_()  # memory without values would differ from run to run
        self.values[n] = value
        return value


def run(
    module: fx.GraphModule, inputs: Mapping[fx.Node, Any], given: Mapping[fx.Node, Any] | None = None
) -> dict[fx.Node, Any]:
    torch.manual_seed(0)
    recorder = Recorder(module, given or {})
    with torch.no_grad():
        recorder.run(*(inputs[n] for n in module.graph.nodes if n.op == "placeholder"))
    return recorder.values


def rows_of(axis: Examples, example: int, batch: int, size: int) -> list[int]:
    """Positions of one example along its dimension, counted here independently of the package."""
    outer, inner = int(axis.outer), int(axis.inner)
    assert outer * batch * inner == size, f"{axis} on a dimension of size {size}"
    return [(o * batch + example) * inner + i for o in range(outer) for i in range(inner)]


def replaced(value: Tensor, axis: Examples, examples: list[int], batch: int, other: Tensor) -> Tensor:
    """The value with some examples' slices taken from ``other``."""
    rows = [r for e in examples for r in rows_of(axis, e, batch, value.shape[axis.dim])]
    index = torch.tensor(rows, dtype=torch.long)
    return value.clone().index_copy_(axis.dim, index, other.index_select(axis.dim, index))


def turned(value: Any, axis: Examples, batch: int) -> Any:
    """The value with the examples in the opposite order."""
    if isinstance(value, (tuple, list)):
        return tuple(turned(v, axis, batch) for v in value)
    size = value.shape[axis.dim]
    order = [0] * size
    for e in range(batch):
        for to, of in zip(rows_of(axis, e, batch, size), rows_of(axis, batch - 1 - e, batch, size), strict=True):
            order[to] = of
    moved = value.index_select(axis.dim, torch.tensor(order, dtype=torch.long))
    return torch.empty_like(value).copy_(moved)  # views further on rely on how it lies


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-9, equal_nan=True)


class Experiment:
    """Replaces examples one by one, and two at a time, puts them in another order, and looks at every value of a graph.

    Draws of random numbers that the proof gives to the examples go with them.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        axes: Mapping[fx.Node, Examples],
        inputs: dict[fx.Node, Any],
        batch: int,
        proof: Proof | None = None,
    ) -> None:
        self.batch = batch
        generator = torch.Generator().manual_seed(5)
        others = {n: _like(inputs[n], generator) for n in axes}

        def with_replaced(examples: list[int]) -> dict[fx.Node, Any]:
            changed = {n: replaced(inputs[n], a, examples, batch, others[n]) for n, a in axes.items()}
            return run(module, {**inputs, **changed})

        self.base = run(module, inputs)
        self.one = [with_replaced([e]) for e in range(batch)]
        self.two = with_replaced([0, batch - 1])
        drawn = {} if proof is None else drawn_rows(module.graph, proof)
        given = {n: turned(self.base[n], a, batch) for n, a in drawn.items()}
        self.turned = run(module, {**inputs, **{n: turned(inputs[n], a, batch) for n, a in axes.items()}}, given)

    def contradiction(self, node: fx.Node, label: Label, position: int | None = None) -> str | None:
        """What the numbers say against a label, or None."""

        def of(values: Mapping[fx.Node, Any]) -> Any:
            return values[node] if position is None else values[node][position]

        base = of(self.base)
        if not isinstance(base, Tensor):
            return None
        if isinstance(label, Shared):
            if not same(of(self.turned), base):
                return "shared, but the order of the examples changes it"
            for e in range(self.batch):
                if not same(of(self.one[e]), base):
                    return f"shared, but example {e} changes it"
            if label.zero and base.any():
                return "zero, but it is not"
            if label.counts is not None:
                n = base.shape[label.counts]
                ramp = (
                    torch.arange(n).view([-1 if d == label.counts else 1 for d in range(base.ndim)]).expand(base.shape)
                )
                if not torch.equal(base.long(), ramp):
                    return "counts positions, but it does not"
        if isinstance(label, Examples):
            for e in range(self.batch):
                own = set(rows_of(label, e, self.batch, base.shape[label.dim]))
                others = torch.tensor([r for r in range(base.shape[label.dim]) if r not in own], dtype=torch.long)
                if not same(of(self.one[e]).index_select(label.dim, others), base.index_select(label.dim, others)):
                    return f"{label}, but example {e} changes slices that are not its own"
            if not same(of(self.turned), turned(base, label, self.batch)):
                return f"{label}, but in another order the examples get other values"
        if isinstance(label, Summed):
            first, last = of(self.one[0]).double() - base.double(), of(self.one[-1]).double() - base.double()
            both = of(self.two).double() - base.double()
            scale = float(torch.nan_to_num(base.double()).abs().max()) + 1 if base.numel() else 1.0
            if not torch.allclose(first + last, both, rtol=1e-7, atol=1e-7 * scale, equal_nan=True):
                return "summed over the examples, but two examples together do not change it by the sum of both"
            if not torch.allclose(
                of(self.turned).double(), base.double(), rtol=1e-7, atol=1e-7 * scale, equal_nan=True
            ):
                return "summed over the examples, but their order changes it"
        return None

    def changes(self, node: fx.Node) -> bool:
        """Whether any example changes the value."""
        return any(isinstance(v[node], Tensor) and not same(v[node], self.base[node]) for v in self.one)


def drawn_rows(graph: fx.Graph, proof: Proof) -> dict[fx.Node, Examples]:
    """Draws of random numbers that are labelled as the examples'."""
    random = (n for n in graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()))
    return {n: x for n in random if isinstance(x := proof.of(n), Examples)}


def _like(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.bool:
        return torch.rand(value.shape, generator=generator) > 0.5
    if not value.is_floating_point():
        return torch.randint(0, 2, value.shape, generator=generator, dtype=value.dtype)
    numbers = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(numbers)


def contradictions(experiment: Experiment, graph: fx.Graph, proof: Proof) -> list[str]:
    found = []
    for node in graph.nodes:
        labels = proof.labels.get(node)
        if labels is None or node.op == "output":
            continue
        if isinstance(labels, tuple):
            texts = [experiment.contradiction(node, x, i) for i, x in enumerate(labels)]
        else:
            texts = [experiment.contradiction(node, labels)]
        found += [f"{node.format_node()}: {t}" for t in texts if t]
    return found


# --- single operations ------------------------------------------------------------------------------------------------


def proved(
    function: Function, values: list[Tensor], dims: list[int | None], batch: int
) -> tuple[fx.GraphModule, Proof, Any]:
    traced = trace_like(function, *values)
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    axes = {n: Examples(d) for n, d in zip(placeholders, dims, strict=True) if d is not None}
    joint = JointGraph(traced, axes, tangent_of={}, outputs=(), mask=placeholders[0], batch=batch)
    return traced, prove(joint), axes


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("index", range(len(TABLE)))
def test_operation(index: int, sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The label of every value on the way is what the numbers say, and the result's is the expected one."""
    function, spec, expected = TABLE[index]
    numbers = sized(monkeypatch, sizes)
    values, dims = inputs_of(spec, numbers)
    try:
        function(*values)
    except RuntimeError:
        assert sizes == "equal"
        pytest.skip("the sizes do not fit")
    try:
        traced, proof, axes = proved(function, values, dims, numbers["b"])
    except (RuntimeError, AssertionError) as error:
        assert "value out of a tracing tensor" in str(error) or "in-place operations" in str(error)
        pytest.skip("not traceable without Dynamo")
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    experiment = Experiment(traced, axes, dict(zip(placeholders, values, strict=True)), numbers["b"], proof)
    found = contradictions(experiment, traced.graph, proof)
    assert not found, "\n".join(found)
    result = traced.graph.output_node().args[0]
    if isinstance(result, (tuple, list)):
        result = result[0]
    assert isinstance(result, fx.Node)
    label = proof.of(result)
    got = {Examples: "e", Summed: "s", Shared: "0", Mixed: "x"}[type(label)]
    if sizes == "different" and not expected.endswith("?"):
        assert got == expected, str(label)
    if got == "0" and expected != "0":
        assert not experiment.changes(result)


def test_the_experiment_notices_wrong_labels() -> None:
    """Every wrong claim is contradicted."""
    for function, claim in (
        (lambda x: x.flip(0), Examples(0)),
        (lambda x: x + x[:1], Examples(0)),
        (lambda x: x - x.mean(0), Examples(0)),
        (lambda x: x.T, Examples(0)),
        (lambda x: x.sum(0) ** 2, Summed()),
        (lambda x: x.amax(0), Summed()),
        (lambda x: x[0], Shared()),
        (lambda x: x.sum(0), Shared()),
    ):
        values = [torch.randn(4, 4, dtype=torch.float64)]
        traced, _, axes = proved(function, values, [0], 4)
        (placeholder,) = axes
        experiment = Experiment(traced, axes, {placeholder: values[0]}, 4)
        result = traced.graph.output_node().args[0]
        assert isinstance(result, fx.Node) and experiment.contradiction(result, claim) is not None, claim


# --- whole joint graphs -----------------------------------------------------------------------------------------------


class _Enough(Exception):
    """Stops a compilation when the joint graph has been looked at."""


def joint_of(case: Case, monkeypatch: pytest.MonkeyPatch, batch: int) -> tuple[JointGraph, Proof]:
    """The joint graph of a model before it is rewritten, and its proof."""
    seen: list[tuple[JointGraph, Proof]] = []

    def spy(joint: JointGraph, examples_per_user: int) -> Proof:
        assert examples_per_user == 1
        seen.append((joint, prove(joint)))
        raise _Enough

    monkeypatch.setattr(pipeline, "prove", spy)
    torch.manual_seed(1)
    args, kwargs = case.call(batch, torch.float64)
    private = dp_compile(case.make().double(), backend="eager", in_dims=case.in_dims, dynamic=False)
    with pytest.raises((_Enough, DPCompileError)):
        private(*args, **kwargs)
    return seen[0]


@pytest.mark.parametrize(
    "case", [c for c in ZOO if c.name not in ("BidirectionalRNN", "GRUSequenceFirst")], ids=lambda c: c.name
)
def test_joint_graph(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of every model: each value's label against what one example changes, its cotangent too."""
    batch = 5 if case.static_only else 3
    joint, proof = joint_of(case, monkeypatch, batch)
    generator = torch.Generator().manual_seed(2)
    inputs: dict[fx.Node, Any] = {}
    axes: dict[fx.Node, Examples] = dict(joint.example_axes)
    for node in joint.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            inputs[node] = _like(value, generator)
            label = proof.of(node)
            if node in joint.tangent_of and isinstance(label, Examples):
                axes[node] = label
    experiment = Experiment(joint.module, axes, inputs, batch, proof)
    found = contradictions(experiment, joint.graph, proof)
    assert not found, "\n".join(found)
    for name, gradient in joint.gradients.items():
        if gradient is not None and experiment.changes(gradient):
            assert isinstance(proof.of(gradient), Summed), name


def test_most_values_are_checked_with_strong_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the language model is called mixed, and its values are mostly single examples'."""
    _, proof = joint_of(CASES["LanguageModel"], monkeypatch, 3)
    kinds = [type(x) for label in proof.labels.values() for x in (label if isinstance(label, tuple) else (label,))]
    assert kinds.count(Mixed) == 0 and kinds.count(Examples) > kinds.count(Shared)
