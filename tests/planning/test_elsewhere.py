"""Plans for machines that are not there: the rates of data sheets, and models without content."""

import copy
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpcompile import DPCompileError, ExampleMixingError, PrivateModule, dp_compile
from dpcompile import rates as command
from dpcompile.kernels import paces as pacing
from dpcompile.kernels.data_sheets import GROUPED, MACHINES, PRODUCTS, TRAFFIC, machine_of, rates_of
from dpcompile.kernels.rates import Rates, rates_from
from dpcompile.planning.plan import Plan
from dpcompile.rates import describe_rates, describe_table

B, T, P, D = 8, 64, 96, 128


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """As it was."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def planned(model: nn.Module, *args: Any, rates: str = "h100", options: Any = None, **kwargs: Any) -> Plan:
    given: dict[str, Any] = options or {}
    private = dp_compile(model, **given)
    assert isinstance(private, PrivateModule)
    found = private.trace(*args, rates=rates, **kwargs)
    assert isinstance(found, Plan)
    return found


class Net(nn.Module):
    """A tied weight, a buffer, a constant made in forward, and a layer in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, P), nn.Linear(P, D)
        self.again = self.last
        self.offset: Tensor
        self.register_buffer("offset", torch.ones(D))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """``[B, T, D]`` to ``[B, T]``."""
        x = self.last(self.first(x + self.offset).relu())
        x = self.again(self.first(x).relu()) * torch.arange(D, device=x.device)
        return x.sum(-1) * scale


# --- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MACHINES)
def test_rates_are_the_peaks_times_what_is_said(name: str) -> None:
    """Products of ours are never those of TF32."""
    machine = machine_of(name)
    exact, quick = rates_of(machine, tf32=False), rates_of(machine, tf32=True)
    assert (exact.large, quick.large) == (PRODUCTS * machine.float32, PRODUCTS * machine.tf32)
    differing = [f.name for f in fields(Rates) if getattr(exact, f.name) != getattr(quick, f.name)]
    assert differing == ["large"]
    assert exact.batched == exact.summed == exact.widened == PRODUCTS * machine.float32
    assert exact.narrow == exact.narrow_batched == PRODUCTS * machine.bfloat16 and exact.narrow_products
    assert exact.wide == PRODUCTS * machine.float64 and exact.grouped == GROUPED * machine.float32
    assert exact.traffic == TRAFFIC * machine.bandwidth and not exact.own_products
    assert machine.float64 <= machine.float32 < machine.tf32 < machine.bfloat16


def test_the_newer_machine_is_no_slower() -> None:
    a100, h100, h200 = (rates_of(machine_of(n), tf32=True) for n in ("a100", "h100", "h200"))
    for slower, quicker in ((a100, h100), (h100, h200)):
        assert all(getattr(slower, f.name) <= getattr(quicker, f.name) for f in fields(Rates) if f.name != "call")


def test_convolutions_have_tf32_unless_forbidden() -> None:
    machine = machine_of("a100")
    allowed = rates_of(machine, tf32=False).convolution
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        assert rates_of(machine, tf32=False).convolution == PRODUCTS * machine.float32 < allowed
    finally:
        torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]


def test_float64_products_are_measured_or_half_as_fast() -> None:
    """Only where there is a GPU they are measured; and clipped sums, where the model is allowed less."""
    found = dict.fromkeys(["large", "each", "narrow", "each, widened", "convolution", "grouped"], 0.5)
    found |= {"moved": 1.0, "written": 1.0, "written, fresh": 2.0, "call": 1.0}
    plain = rates_from(found)
    assert plain.wide == plain.batched / 2 and plain.summed == plain.large
    measured = rates_from({**found, "each, wide": 4.0, "large, exact": 8.0})
    assert (measured.wide, measured.summed, measured.large) == (1 / 4, 1 / 8, 2)


def test_products_of_ours_are_measured_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is allowed less does not make ours quicker; its own products are measured as it is allowed."""
    torch.set_float32_matmul_precision("medium")
    monkeypatch.setattr(pacing, "products_on", lambda device: "bf16")
    seen: list[str] = []
    for kind in ("mm", "bmm"):
        own = getattr(torch, kind)

        def spy(*args: Any, own: Any = own, **kwargs: Any) -> Any:
            seen.append(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]
            return own(*args, **kwargs)

        monkeypatch.setattr(torch, kind, spy)
    found = {}
    for name, run, _ in pacing._products(torch.device("cpu")):
        if name in ("large", "large, exact", "each", "each, widened"):
            run()
            found[name] = seen.pop()
    assert found == {"large": "bf16", "large, exact": "ieee", "each": "ieee", "each, widened": "ieee"}


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_command_shows_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rates", "--table", "h100", "--tf32"])
    command.main()
    said = capsys.readouterr().out
    assert said == describe_table("h100", tf32=True) + "\n"
    assert said.startswith("H100 SXM, 80 GB; NVIDIA H100") and "nothing was measured" in said
    assert describe_rates(rates_of(machine_of("h100"), tf32=True)) in said
    assert "narrow             6.926e+05 GFLOP/s" in said and "traffic                 2848 GB/s" in said


def test_the_command_names_the_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rates", "--table", "b200"])
    with pytest.raises(SystemExit):
        command.main()
    said = capsys.readouterr().err
    assert "no rates are known of 'b200'" in said and "'a100', 'h100', 'h200'" in said


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(DPCompileError, match=r"(?s)no rates are known of 'H100'.*use one of 'a100', 'h100', 'h200'"):
        planned(nn.Linear(3, 2), torch.zeros(4, 3), rates="H100")


# --- plans -----------------------------------------------------------------------------------------------------------


def test_meta_tensors_and_real_ones_have_one_plan() -> None:
    """Also fake and mixed ones: no value is read."""
    real = Net()
    with torch.device("meta"):
        meta = Net()
    x = torch.randn(B, T, D)
    plans = [
        str(planned(real, x)),
        str(planned(meta, x.to("meta"))),
        str(planned(real, x.to("meta"))),
        str(planned(meta, x)),
    ]
    assert len(set(plans)) == 1
    assert "for H100 SXM, 80GB, float32 products as float32: by its data sheet, nothing was measured" in plans[0]
    assert plans[0].count("\nlast.weight") == 2 and "again.weight" not in plans[0]  # two uses of one weight


def test_nothing_of_the_model_changes() -> None:
    """Parameters, gradients, random state, the plan that is there, and what training does afterwards."""
    model, x = Net(), torch.randn(B, T, D)
    private: Any = dp_compile(model, backend="eager")
    private(x).mean().backward()
    plan, sums = private.plan, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    state, kept, norms = torch.get_rng_state(), copy.deepcopy(model.state_dict()), private.grad_norms.clone()
    private.trace(x, rates="a100")
    assert private.plan is plan and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(kept[n], v) for n, v in model.state_dict().items())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(sums)
    for p in model.parameters():
        p.grad = None
    private(x).mean().backward()
    assert torch.equal(private.grad_norms, norms)
    assert all(p.grad is not None and torch.equal(p.grad, sums[n]) for n, p in model.named_parameters())


def test_trace_returns_the_plan_of_this_machine_too() -> None:
    private: Any = dp_compile(nn.Linear(3, 2), backend="eager")
    found = private.trace(torch.zeros(4, 3))
    assert found is private.plan and "data sheet" not in str(found)
    untrained: Any = dp_compile(nn.Linear(3, 2).requires_grad_(False), backend="eager")
    assert untrained.trace(torch.zeros(4, 3)) is None


def linear_seconds(rates: Rates, rule: str, *, narrow: bool = False) -> float:
    """What privacy adds on a linear layer without bias, by hand, from docs/plan.md."""
    flops, weights, e, call = 2 * B * T * P * D, B * P * D, 4, rates.call
    plain = flops / (rates.narrow if narrow else rates.large)
    if rule == "keep":
        return (
            flops / (rates.narrow_batched if narrow else rates.batched)
            - plain
            + 3 * weights * e / rates.traffic
            + (3 * call)
        )
    scaled = 2 * B * T * min(P, D) * e / rates.traffic + call + flops / rates.summed - plain
    assert rule == "ghost"
    panels, grams, part = 2, B * T * T, 0.75
    gram = sum(
        2 * grams * width * part / rates.wide + (2 * grams * 8 * part + B * T * width * e) / rates.traffic + 4 * call
        for width in (P, D)
    )
    return scaled + 4 * grams * 8 / rates.traffic + 3 * panels * call + gram


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("rule", ["keep", "ghost"])
def test_predicted_times_are_those_of_the_table(rule: str, tf32: bool, narrow: bool) -> None:
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    rates = rates_of(machine_of("a100"), tf32=tf32)
    net = nn.Linear(D, P, bias=False, dtype=torch.bfloat16 if narrow else torch.float32)
    mode = {"keep": "instantiate", "ghost": "ghost"}[rule]
    plan = planned(net, torch.zeros(B, T, D, dtype=net.weight.dtype), rates="a100", options={"norm": mode})
    assert plan.rules() == {"weight": rule}
    assert plan.prediction.extra_seconds == pytest.approx(linear_seconds(rates, rule, narrow=narrow))
    assert f"float32 products as {'TF32' if tf32 else 'float32'}" in plan.machine


def test_memory_is_predicted_without_a_budget() -> None:
    """Parameters, inputs and outputs; what is kept until the clip."""
    plan = planned(nn.Linear(D, P, bias=False), torch.zeros(B, T, D), options={"norm": "instantiate"})
    standing, cotangents, each = 4 * (P * D + B * T * D), 4 * B * T * P, 4 * B * P * D
    found = plan.prediction
    assert found.plain_peak == pytest.approx(standing + cotangents + 4 * P * D, rel=0.05)
    assert found.peak is not None and found.peak >= standing + each
    assert "; peak " in str(plan) and plan.parts == 1


def test_a_budget_holds_there_too() -> None:
    """In parts, if need be."""
    x = torch.zeros(32, 128, 64)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    free, held = planned(net, x), planned(net, x, options={"memory_budget": 1.05})
    assert free.parts == 1 and held.prediction.peak is not None and held.prediction.plain_peak is not None
    assert held.prediction.peak <= 1.05 * held.prediction.plain_peak
    assert held.prediction.extra_seconds >= free.prediction.extra_seconds
    assert free.prediction.peak is not None and free.prediction.peak > held.prediction.peak


@pytest.mark.parametrize("how", ["autocast of CPUs", "parameters"])
def test_bfloat16_is_planned_as_such(how: str) -> None:
    net, x = nn.Linear(D, P, bias=False), torch.zeros(B, T, D)
    if how == "parameters":
        net, x = net.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how != "parameters"):
        plan = planned(net, x, options={"norm": "instantiate"})
    expected = linear_seconds(rates_of(machine_of("h100"), tf32=False), "keep", narrow=True)
    assert plan.prediction.extra_seconds == pytest.approx(expected)


def test_autocast_of_gpus_is_that_of_the_plan() -> None:
    """Where torch has no GPU, the values are traced on a CPU, which has autocast of its own."""
    net, x = nn.Linear(D, P, bias=False), torch.zeros(B, T, D)
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        found = planned(net, x, options={"norm": "instantiate"})
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)
    assert not torch.is_autocast_enabled("cpu")
    assert found.choices[0].cost.at({}).narrow_batched == 2 * B * T * P * D


def test_convolutions_are_planned_without_the_kernels_of_cpus() -> None:
    plan = planned(nn.Conv2d(64, 64, 3, padding=1, bias=False), torch.zeros(B, 64, 16, 16), options={"norm": "redo"})
    cost = plan.choices[0].cost.at({})
    assert cost.grouped == 2 * B * 256 * 64 * 64 * 9 and cost.filtered == cost.idle == 0


def test_a_decorated_class() -> None:
    @dp_compile
    class Decorated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, P)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model: Any = Decorated()
    assert model.trace(torch.zeros(B, D), rates="h100").rules() == {"layer.weight": "outer", "layer.bias": "keep"}


def test_a_large_model_takes_no_memory() -> None:
    """Of 64 GB of parameters none is there."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(2**16, 2**16), nn.ReLU(), nn.Linear(2**16, 2**16))
        x = torch.empty(4, 2**16)
    plan = planned(net, x, rates="h200")
    assert plan.prediction.peak is not None and plan.prediction.peak > 64e9
    assert plan.rules()["0.weight"] == "outer" and "141GB" in plan.machine


def test_products_and_look_ups_of_one_table() -> None:
    """Only the head's positions are multiplied; dropped products of both are in float64."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(512, D)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids) @ self.table.weight.T

    ids, flops = torch.zeros(B, T, dtype=torch.int64), 2 * B * T * 512 * D
    kept, dropped, ghost = (
        planned(Tied(), ids, options={"norm": n}).choices[0] for n in ("instantiate", "redo", "ghost")
    )
    assert kept.cost.at({}).batched == flops == -kept.cost.at({}).large
    assert dropped.cost.at({}).wide == flops == dropped.cost.at({}).summed and dropped.cost.at({}).batched == 0
    assert dropped.cost.at({}).memory == 2 * kept.cost.at({}).memory == 8 * B * 512 * D
    part = (ghost.panels + 1) / (2 * ghost.panels)
    assert ghost.cost.at({}).wide == pytest.approx(2 * B * part * (T * T * 512 + 4 * T * T * D))


def test_a_model_of_this_machine_is_still_refused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, P)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return x - x.mean(0)

    with pytest.raises(ExampleMixingError, match=r"(?s)`sub` mixes examples.*in forward: return x - x.mean\(0\)"):
        planned(Mixed(), torch.zeros(B, D, device="meta"))


def test_what_there_is_no_plan_for() -> None:
    with pytest.raises(DPCompileError, match=r"(?s)nothing of the model is trained.*requires_grad_"):
        planned(nn.Linear(3, 2).requires_grad_(False), torch.zeros(4, 3))
    blocks = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(DPCompileError, match=r"(?s)models in one graph, on one rank.*leave regions"):
        planned(blocks, torch.zeros(4, 3), options={"regions": "blocks"})
    with pytest.raises(TypeError, match="missing a required argument"):
        planned(nn.Linear(3, 2))


def test_a_model_with_an_argument_of_that_name_keeps_it() -> None:
    class Rated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, rates: float = 1.0) -> Tensor:
            return self.layer(x) * rates

    private: Any = dp_compile(Rated(), backend="eager")
    assert "data sheet" not in str(private.trace(torch.zeros(4, 3), rates=2.0))


def test_dropout_and_attention_and_losses() -> None:
    """What is drawn, and what torch has kernels of its own for, on values that do not exist."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (4, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)
            out = F.dropout(mixed.transpose(1, 2).flatten(2))
            return F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)

    with torch.device("meta"):
        model, x, y = Attending(), torch.empty(4, 8, 64), torch.empty(4, 8, dtype=torch.int64)
    plan = planned(model, x, y=y)
    assert set(plan.rules()) == {f"{n}.{p}" for n in "qkv" for p in ("weight", "bias")}
