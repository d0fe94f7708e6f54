"""``verify=True``: the first step of compiled code against the graph that was compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from faulty_compiler import Fault, doing_harm
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import dpcompile
from dpcompile import PrivacyError, UnsupportedGraphError
from dpcompile._torch import aot, mended_inductor
from dpcompile._torch import compile as torch_compile
from dpcompile.module import engine_of
from dpcompile.runtime.reference import Noise, Reference
from dpcompile.runtime.verify import Verifier

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], None]:
    return doing_harm(monkeypatch)


class Blocks(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.inp = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Dropout(dropout), nn.Tanh()) for _ in range(3))
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def right(results: list[Any], backward: bool) -> None:
    """No harm."""


def scaled(shape: tuple[int, ...], factor: float) -> Fault:
    """The first result of the backward with this shape is multiplied."""

    def fault(results: list[Any], backward: bool) -> None:
        for i, x in enumerate(results):
            if backward and isinstance(x, Tensor) and tuple(x.shape) == shape:
                results[i] = x * factor
                return

    return fault


def swapped(results: list[Any], backward: bool) -> None:
    """Two results of one shape change places."""
    found = [i for i, x in enumerate(results) if backward and isinstance(x, Tensor) and tuple(x.shape) == (16, 16)]
    if len(found) > 1:
        results[found[0]], results[found[1]] = results[found[1]], results[found[0]]


def without_an_example(results: list[Any], backward: bool) -> None:
    """The norm of the second example is lost."""
    for x in results:
        if backward and isinstance(x, Tensor) and x.ndim <= 2 and x.shape[-1:] == (6,) and x.is_floating_point():
            x[..., 1] = 0


def another_output(results: list[Any], backward: bool) -> None:
    """The model computes something else."""
    if not backward:
        results[0] = results[0] + 0.01


def step(model: Any, x: Tensor | None = None) -> None:
    torch.manual_seed(0)
    model(torch.randn(6, 8) if x is None else x).square().mean().backward()


HARM = [scaled((16, 16), 0.0), scaled((16, 16), 1.002), swapped, without_an_example, another_output]
LOWERINGS = [
    {"regions": "blocks", "clipping": "per_layer"}, {"regions": "breaks"}, {"regions": "blocks", "norm": "two_pass"},
    {"dynamic": True},
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "fault"),
    [*(({}, fault) for fault in HARM), *((options, HARM[1]) for options in LOWERINGS),
     *(({"regions": "blocks"}, fault) for fault in HARM if fault is not swapped)],
)  # fmt: skip
def test_harm_is_seen(compiler: Any, options: dict[str, Any], fault: Fault) -> None:
    compiler(fault)
    model = dp_compile(Blocks(), **options)
    with pytest.raises(PrivacyError, match="does not compute what its graph says"):
        step(model)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"regions": "blocks"}, {"memory_budget": 1}, *LOWERINGS], ids=str)
def test_no_harm_no_alarm(compiler: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each graph is compared once, and then let go; random numbers are the same."""
    verifiers: list[Verifier] = []
    before = Verifier.take
    monkeypatch.setattr(Verifier, "take", lambda self, joint: (verifiers.append(self), before(self, joint))[1])
    compiler(right)
    model = dp_compile(Blocks(0.5), **options)
    for _ in range(2):
        step(model)
        model.zero_grad()
    assert verifiers
    assert all(v._reference is None and v._tries > 0 for v in verifiers)


def test_switched_off(compiler: Any) -> None:
    compiler(scaled((16, 16), 0.0))
    model = dp_compile(Blocks(), verify=False)
    step(model)
    assert not model.blocks[2][0].weight.grad.any() or not model.blocks[0][0].weight.grad.any()


def test_the_message_names_what_is_wrong(compiler: Any) -> None:
    compiler(scaled((3, 16), 0.9))
    said = r"the model \(Blocks\).*the clipped sum of 'out.weight' by 0.1.*`(mm|product)`"
    with pytest.raises(PrivacyError, match=said):
        step(dp_compile(Blocks()))


def test_a_padded_batch_does_not_count(compiler: Any) -> None:
    """Sums of nothing are zero whatever the code does: the next batch is looked at."""
    compiler(scaled((16, 16), 0.5))
    model = dp_compile(Blocks())
    engine_of(model).set_mask(torch.zeros(6, dtype=torch.bool))
    step(model)
    engine_of(model).set_mask(torch.ones(6, dtype=torch.bool))
    with pytest.raises(PrivacyError, match="does not compute what its graph says"):
        step(model)


@pytest.mark.parametrize("make", [Blocks, lambda: nn.Linear(8, 3)], ids=["dropout", "saves its inputs alone"])
def test_two_forwards_before_their_backwards(compiler: Any, make: Callable[[], nn.Module]) -> None:
    compiler(right)
    model = dp_compile(make())
    torch.manual_seed(0)
    first, second = model(torch.randn(6, 8)), model(torch.randn(6, 8) * 3)
    first.square().mean().backward()
    model.zero_grad()
    second.square().mean().backward()
    with torch.no_grad():
        model(torch.randn(6, 8))


def test_inputs_that_change_in_between(compiler: Any) -> None:
    """The graph cannot be run on them again; the next batch is looked at."""
    compiler(scaled((16, 16), 0.5))
    model = dp_compile(Blocks(0.0))
    x = torch.randn(6, 8)
    out = model(x)
    x.copy_(torch.randn(6, 8))
    with pytest.raises((PrivacyError, RuntimeError)):
        out.square().mean().backward()
        step(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(compiler: Any, dtype: torch.dtype) -> None:
    compiler(right)
    step(dp_compile(Blocks().to(dtype)), torch.randn(6, 8, dtype=dtype))
    compiler(scaled((16, 16), 1 + 1e-6 if dtype == torch.float64 else 0.5))
    with pytest.raises(PrivacyError, match="does not compute what its graph says"):
        step(dp_compile(Blocks().to(dtype)), torch.randn(6, 8, dtype=dtype))


def test_an_example_that_is_not_finite(compiler: Any) -> None:
    compiler(right)
    x = torch.randn(6, 8)
    x[2] = float("inf")
    with pytest.warns(RuntimeWarning, match="1 of 6 examples"):
        step(dp_compile(Blocks()), x)


def test_a_whole_graph(compiler: Any) -> None:
    """Forward and backward in one function, as `compile_step` has them."""
    model = dp_compile(Blocks(0.0), backend="eager")
    model.trace(torch.randn(6, 8))
    graph, sources = aot.flat_graph(model.graph)
    transformed = engine_of(model).transformed
    assert transformed is not None
    torch.manual_seed(0)
    values: list[Any] = []
    for node, source in zip(graph.graph.find_nodes(op="placeholder"), sources, strict=True):
        ones = source is None or node.name == transformed.mask  # the cotangents, and no padding
        values.append((torch.ones if ones else torch.randn)(node.meta["val"].shape))

    def verified(factor: float) -> Any:
        verifier = Verifier("the step")
        verifier.describe(transformed)
        slot = transformed.sum_slots["out.weight"]
        run = lambda *v: [x * factor if i == slot else x for i, x in enumerate(graph(*v))]  # noqa: E731
        return verifier.whole(run, graph)

    verified(1.0)(*values)
    with pytest.raises(PrivacyError, match="the step.*'out.weight' by 0.01"):
        verified(1.01)(*values)


@pytest.mark.full
def test_states_of_generators_among_what_is_saved() -> None:
    """Of a draw that is made again in the backward the forward saves the generator's state, behind its outputs."""

    def block(x: Tensor) -> Tensor:
        return x * nn.functional.dropout1d(torch.ones_like(x), 0.5)

    class Again(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(block, super().forward(x), use_reentrant=False)  # type: ignore[return-value]

    private: Any = dp_compile(Again(5, 4))
    private(torch.randn(3, 6, 5)).sum((1, 2)).mean().backward()
    assert private.grad_norms.shape == (3,)


class Solved(nn.Module):
    """Its graph checks for errors, so that it takes and returns a token that orders effects."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.out = nn.Parameter(torch.randn(8, 8) + 4 * torch.eye(8)), nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.linalg.solve(self.square, self.out)


def test_tokens_have_no_place_in_what_is_compiled(compiler: Any) -> None:
    def harm(results: list[Any], backward: bool) -> None:
        if not backward:
            results[0] *= 1.01

    compiler(right)
    step(dp_compile(Solved()))
    compiler(harm)
    with pytest.raises(PrivacyError, match="output 1 by 0.01"):
        step(dp_compile(Solved()))


class Rectified(nn.Module):
    """Of its sums before the ReLU, half are near zero: rounding decides their sign."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(8, 32, bias=False), nn.Linear(32, 3)
        with torch.no_grad():
            self.inp.weight[::2, 4:] = -self.inp.weight[::2, :4]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.inp(x)))


@pytest.mark.parametrize("seed", range(5))
def test_what_is_decided_by_rounding_is_no_harm(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """A ReLU near zero is on in one run and off in the other; which moves a gradient by an example's whole share."""

    def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        graph = Reference(gm)
        names = [n.name for n in graph.graph.find_nodes(op="placeholder")]
        rounding = None if options.get("is_backward") else Noise(100 + seed, decisions=True)

        def run(arguments: list[Any]) -> list[Any]:
            given = dict(zip(names, arguments, strict=True))
            arguments.clear()
            return graph.run(given, None, rounding)[0]

        return torch_compile.make_boxed(run)

    monkeypatch.setattr(torch_compile._compile_fx, "compile_fx_inner", compile_graph)
    errors: list[float] = []
    before = Verifier._errors
    monkeypatch.setattr(Verifier, "_errors", lambda *a: (found := before(*a), errors.append(max(found.values())))[0])
    torch.manual_seed(seed)
    half = torch.randn(6, 4)
    step(dp_compile(Rectified()), torch.cat([half, half + 1e-7 * torch.randn(6, 4)], 1))
    assert errors[0] > 1e-3


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_noise(sign: float) -> None:
    """By an epsilon; a sum near zero, by which something is decided, by some of its row."""
    value = torch.tensor([[1.0, 1.0, 1e-20]]).repeat(1000, 1)
    eps = torch.finfo(torch.float32).eps
    generator = torch.Generator().manual_seed(0)
    moved = Noise(0, sign).on(value, generator, True) - value
    assert 0 < moved[:, :2].abs().max() <= eps and moved[:, 2].abs().max() <= 1e-20 * eps * 1.001
    further = Noise(0, sign, decisions=True)
    assert (further.on(value, generator, False) - value)[:, 2].abs().max() <= 1e-20 * eps * 1.001
    moved = further.on(value, generator, True)[:, 2]
    assert 20 * eps < moved.max() < 33 * eps and -33 * eps < moved.min() < -20 * eps
    one, other = (Noise(0, s, decisions=True).on(value, torch.Generator().manual_seed(3), True) for s in (1.0, -1.0))
    torch.testing.assert_close((one + other) / 2, value, rtol=1e-6, atol=1e-12)


def test_through_inductor() -> None:
    """Dropout and all: what Inductor draws is drawn again."""
    for options in ({}, {"regions": "blocks"}):
        torch._dynamo.reset()
        model = dp_compile(Blocks(0.5), **options)
        step(model)
        assert model.grad_norms.isfinite().all()


@pytest.mark.full
def test_pools_on_torch_with_the_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the workaround of `_torch` the pool's backward may come too late: then the step is stopped."""
    monkeypatch.setattr(mended_inductor, "FORGETS_WRITES", False)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(4096, 10)]
    net, x = nn.Sequential(*layers), torch.randn(4, 3, 32, 32)
    plain = copy.deepcopy(net)
    plain(x).square().flatten(1).mean(1).sum().backward()
    model = dp_compile(net, max_grad_norm=1e9, loss_reduction="sum")
    try:
        model(x).square().flatten(1).mean(1).sum().backward()
    except (PrivacyError, UnsupportedGraphError) as error:
        assert "scatter" in str(error)
        return
    for own, wanted in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, wanted.grad, rtol=1e-4, atol=1e-5)
