"""Models compiled in regions: the same gradients as one backward per example, whatever passes between the blocks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from block_models import GPT, MLP, MODELS, Around, B, D, T, V, ViT, dp_compile, ids, right, rows
from oracle import PseudoLoss, assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn

from dpcompile import (
    DPCompileError,
    DPOptimizer,
    ExampleMixingError,
    PoissonLoader,
    PrivacyError,
    UnsupportedGraphError,
    compile_step,
)
from dpcompile.module import engine_of

OUTSIDE = torch.tensor(0.5)


@pytest.mark.parametrize("name", MODELS)
def test_regions_give_what_one_backward_per_example_gives(name: str) -> None:
    make, example = MODELS[name]
    model = make()
    private = dp_compile(model, max_grad_norm=0.5, backend="eager", regions="blocks")
    right(model, private, example())
    right(model, private, example())


@pytest.mark.parametrize("norm", ["ghost", "instantiate", "redo", "direct"])
def test_every_rule_can_be_deferred(norm: str) -> None:
    model = GPT(2)
    right(model, dp_compile(model, max_grad_norm=0.5, backend="eager", regions="blocks", norm=norm), ids())


@pytest.mark.parametrize("clipping", ["automatic", "per_layer", "per_block", lambda norms: 1 / (1 + norms)])
def test_other_clippings_agree_with_one_graph(clipping: Any) -> None:
    model, x = GPT(2), ids()
    loss = PseudoLoss(B)
    options = {"backend": "eager", "clipping": clipping, "max_grad_norm": 0.5}
    found = []
    for regions in (None, "blocks"):
        private = dp_compile(model, **options, regions=regions)
        private.zero_grad()
        train_step(private, (x,), {}, loss)
        found.append({n: p.grad.clone() for n, p in private.named_parameters()})
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-4, atol=1e-7, msg=name)


def test_a_clipping_function_that_mixes_examples_is_refused() -> None:
    private = dp_compile(MLP(), backend="eager", regions="blocks", clipping=lambda norms: 1 / norms.sum().expand(B))
    with pytest.raises(PrivacyError, match="own weight: `reciprocal` mixes examples"):
        private(rows())


@pytest.mark.parametrize("regions", [None, "blocks", "breaks"])
def test_a_clipping_function_that_begins_to_mix_examples_has_no_effect(regions: Any) -> None:
    calls = []

    def function(norms: Tensor) -> Tensor:
        calls.append(norms)
        return 0.01 * norms.mean().expand_as(norms) if len(calls) > 1 else torch.full_like(norms, 0.01)

    private = dp_compile(MLP(), backend="eager", regions=regions, clipping=function, max_grad_norm=100.0)
    x, found = rows(), []
    for size in (1.0, 300.0):
        x[0] *= size  # an example that is not in the sum
        private.zero_grad()
        engine_of(private).set_mask(torch.arange(B) != 0)
        train_step(private, (x,), {}, PseudoLoss(B))
        found.append([p.grad.clone() for p in private.parameters()])
    assert found[0][0].norm() > 0
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("regions", [None, "blocks", "breaks"])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda norms: torch.from_numpy(0 * norms.numpy() + norms.numpy().mean()),
            "`numpy` reads the norms past torch",
        ),
        (lambda norms: norms * float(np.mean(np.asarray(norms))), "`__array__` reads the norms past torch"),
        (lambda norms: torch.from_dlpack(norms), "`__dlpack__` reads the norms past torch"),
        (lambda norms: torch.tensor(norms.tolist()), "`tolist` reads the norms past torch"),
        (lambda norms: norms * torch.tensor(0.5), "a tensor that is not made from the norms"),
        (lambda norms: norms * OUTSIDE, "convert all Tensors to FakeTensors"),
        (lambda norms: norms if norms.max() > 1 else 2 * norms, "data-dependent"),
    ],
)
def test_clipping_functions_that_cannot_be_traced(function: Any, message: str, regions: Any) -> None:
    private = dp_compile(MLP(), backend="eager", regions=regions, clipping=function)
    with pytest.raises(PrivacyError, match=f"the clipping function could not be traced: .*{message}"):
        private(rows())


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda norms: torch.where(norms > 1, 1 / norms, torch.ones_like(norms)), 1),
        (lambda norms: 1 / (1 + norms.float()), 1),
        (lambda norms: norms.new_full(norms.shape, 1.0) / len(norms), 3),
        (lambda norms: (1 / norms).mul_(0.5).clamp_(max=0.5), 1),
    ],
)
@pytest.mark.parametrize("norm", ["auto", "two_pass"])
def test_a_clipping_function_is_right_for_every_size_of_the_batch(function: Any, expected: int, norm: str) -> None:
    model, calls = MLP(), []

    def counted(norms: Tensor) -> Tensor:
        calls.append(norms)
        return function(norms)

    private = dp_compile(model, backend="eager", regions="blocks", clipping=counted, max_grad_norm=0.7, norm=norm)
    for batch in (B, B + 3, B, 2 * B):
        x, loss = torch.randn(batch, *rows().shape[1:]), PseudoLoss(batch)
        private.zero_grad()
        train_step(private, (x,), {}, loss)
        wanted = clip(per_example_gradients(model, (x,), {}, loss), 0.7, clipping=function)
        assert_right(private, wanted, 1e-4)
    assert len(calls) == expected


@pytest.mark.full
def test_inductor_compiles_both_parts_of_the_backward() -> None:
    model = GPT(2)
    right(model, dp_compile(model, max_grad_norm=0.5, regions="blocks"), ids())


@pytest.mark.full
def test_inductor_saves_images_channels_last() -> None:
    model = ViT()
    right(model, dp_compile(model, max_grad_norm=0.5, regions="blocks"), torch.randn(B, 3, 16, 16))


def test_equal_blocks_are_compiled_once() -> None:
    counts = []
    for depth in (2, 6):
        private = dp_compile(GPT(depth), backend="eager", regions="blocks")
        private(ids()).sum().backward()
        counts.append(engine_of(private).compilations)  # type: ignore[attr-defined]
    assert counts == [3, 3]  # embeddings, a block, norm and head


def test_blocks_that_differ_are_not_taken_for_equal() -> None:
    model = GPT(3)
    model.blocks[1].heads = 4  # type: ignore[union-attr]
    model.blocks[2].up.weight.requires_grad_(False)  # type: ignore[union-attr]
    private = dp_compile(model, max_grad_norm=0.5, backend="eager", regions="blocks")
    right(model, private, ids())
    assert engine_of(private).compilations == 5  # type: ignore[attr-defined]


def test_training_mode_is_followed() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * (3 if self.training else 1)

    model = nn.Sequential(Noisy(), Noisy())
    private = dp_compile(model, max_grad_norm=0.5, backend="eager", regions="blocks")
    right(model, private, rows())
    model[1].eval()
    right(model, private, rows())


@pytest.mark.full
def test_batches_of_other_sizes() -> None:
    model = GPT(2)
    private = dp_compile(model, max_grad_norm=0.5, backend="eager", regions="blocks")
    for batch in (4, 3, 1, 6):
        right(model, private, torch.randint(0, V, (batch, T)))


def test_padding_has_weight_zero() -> None:
    model = GPT(2)
    private = dp_compile(model, max_grad_norm=0.5, backend="eager", regions="blocks")
    mask = torch.tensor([True, False, True, True])
    engine_of(private).set_mask(mask)
    right(model, private, ids(), mask=mask)
    with pytest.raises(PrivacyError, match="second backward on one batch of the loader"):
        private(ids()).sum().backward()


def test_micro_batches_add_up() -> None:
    model = MLP()
    private = dp_compile(model, max_grad_norm=0.5, backend="eager", regions="blocks")
    batches = [rows(), rows()]
    total: dict[str, Tensor] = {}
    for x in batches:
        private.zero_grad()
        private(x).square().sum(1).mean().backward()
        for name, p in private.named_parameters():
            total[name] = total.get(name, 0) + p.grad.clone()
    private.zero_grad()
    for x in batches:
        private(x).square().sum(1).mean().backward()
    for name, p in private.named_parameters():
        torch.testing.assert_close(p.grad, total[name])


@pytest.mark.parametrize("regions", [None, "blocks"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_an_example_that_is_not_finite_has_weight_zero_in_its_whole_group(clipping: str, regions: str | None) -> None:
    """Flat: in all regions. By layers: in the first, whose gradient holds it; tanh makes the others finite."""
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3))
    options: Any = {"max_grad_norm": 0.5, "backend": "eager", "clipping": clipping, "regions": regions}
    private = dp_compile(model, **options)
    x = rows()
    x[1, 0] = math.inf
    with pytest.warns(RuntimeWarning, match="1 of 4 examples"):
        private(x).square().sum(1).mean().backward()
    found = {n: p.grad.clone() for n, p in private.named_parameters()}
    assert torch.isnan(private.grad_norms[1]) or torch.isinf(private.grad_norms[1])
    h = model[0](x).tanh()
    layers = model if clipping == "flat" else model[2:]  # the others, on what they get
    given = torch.where(torch.isfinite(x), x, 0.0) if clipping == "flat" else h.detach()
    mask = torch.tensor([True, clipping != "flat", True, True])
    truth = clip(
        per_example_gradients(layers, (given,), {}, lambda out, rows: out.square().sum(1)),
        0.5 if clipping == "flat" else 0.5 / 3**0.5 * 2**0.5,
        mask=mask,
        groups=None if clipping == "flat" else {n: n.split(".")[0] for n, _ in layers.named_parameters()},
    )
    for name, wanted in truth.sums.items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6, msg=name)
    assert all(torch.isfinite(g).all() for g in found.values())


def test_the_optimizer_and_the_loader_take_it() -> None:
    model = MLP()
    private = dp_compile(model, backend="eager", regions="blocks")
    optimizer = DPOptimizer(
        torch.optim.SGD(private.parameters(), lr=0.1), private, noise_multiplier=1.0, expected_batch_size=4, seed=3
    )
    data = torch.utils.data.TensorDataset(torch.randn(16, D), torch.randint(0, 3, (16,)))
    loader = PoissonLoader(data, expected_batch_size=4, physical_batch_size=4, seed=5)
    loader.attach(private, optimizer)
    before = [p.clone() for p in private.parameters()]
    steps = 0
    for x, y in loader:
        F.cross_entropy(private(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    assert optimizer.logical_step == 4 <= steps
    assert all(not torch.equal(a, b) for a, b in zip(before, private.parameters(), strict=True))


def test_check_compares_the_whole_model() -> None:
    private = dp_compile(GPT(2), backend="eager", regions="blocks", check=True)
    private(ids()).square().mean((1, 2)).mean().backward()
    assert private.grad_norms.shape == (B,)


def test_a_block_whose_output_is_not_used_has_gradient_zero() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(D, 3) for _ in range(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.heads[0](x), self.heads[1](x)

    private = dp_compile(Two(), backend="eager", regions="blocks")
    private(rows())[1].sum().backward()
    assert not private.heads[0].weight.grad.any() and private.heads[1].weight.grad.any()


def test_without_gradients_it_is_the_plain_model() -> None:
    model, x = GPT(2).eval(), ids()
    private = dp_compile(model, backend="eager", regions="blocks")
    with torch.no_grad():
        torch.testing.assert_close(private(x), model(x))
    assert private(x).requires_grad


def test_the_model_is_left_as_it_was() -> None:
    model = GPT(2)
    hook = model.blocks[0].register_forward_hook(lambda *_: None)
    private = dp_compile(model, max_grad_norm=0.5, backend="eager", regions="blocks")
    right(model, private, ids())
    assert "forward" not in model.blocks[0].__dict__ and list(model.blocks[0]._forward_hooks) == [hook.id]
    loss = model(ids()).sum()
    loss.backward()
    with pytest.raises(PrivacyError, match="did not come out of the clipped backward alone"):
        engine_of(private).ledger.verify(["head.weight"])


def test_the_plan_names_every_region_once() -> None:
    private = dp_compile(GPT(3), backend="eager", regions="blocks")
    private.trace(ids())
    rules = private.plan.rules()
    assert "blocks.0.up.weight" in rules and "blocks.1.up.weight" not in rules and "head.weight" in rules
    assert str(private.plan).count("clipping: flat") == 3
    assert all(p.grad is None for p in private.parameters())


def mixing(m: Any, blocks: Any, x: Tensor) -> Tensor:
    h = blocks[0](x)
    return blocks[1](h - h.mean(0))


def summed(m: Any, blocks: Any, x: Tensor) -> Tensor:
    return blocks[1](blocks[0](x).sum(0))


def parameters_alone(m: Any, blocks: Any, x: Tensor) -> Tensor:
    return blocks[1](m.free * 2) + blocks[0](x)


def under_autocast(m: Any, blocks: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return blocks[1](blocks[0](x))


def without_gradients(m: Any, blocks: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = blocks[0](x)
    return blocks[1](h)


def read_out(m: Any, blocks: Any, x: Tensor) -> Tensor:
    return blocks[1](blocks[0](x) * float(x.sum()))


class Centred(torch.autograd.Function):
    """The identity, whose gradient mixes the examples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g - g.mean(0)


def mixed_on_the_way_back(m: Any, blocks: Any, x: Tensor) -> Tensor:
    return blocks[1](Centred.apply(blocks[0](x)))  # type: ignore[arg-type]


def rolled_on_the_way_back(m: Any, blocks: Any, x: Tensor) -> Tensor:
    return blocks[1](blocks[0](x).roll(1, 0))


REFUSED = {
    mixed_on_the_way_back: (ExampleMixingError, "it reaches the gradient of input"),
    rolled_on_the_way_back: (ExampleMixingError, "mixes examples"),
    mixing: (ExampleMixingError, "mixes examples"),
    summed: (DPCompileError, "sum"),
    parameters_alone: (UnsupportedGraphError, "is given no example, and makes values of parameter 'free'"),
    under_autocast: (UnsupportedGraphError, "under torch.no_grad or autocast inside the model"),
    without_gradients: (UnsupportedGraphError, "under torch.no_grad or autocast inside the model"),
    read_out: (DPCompileError, "mixes examples|reads a Python number|values of tensors"),
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_refused(function: Any) -> None:
    kind, message = REFUSED[function]
    private = dp_compile(Around(function), backend="eager", regions="blocks")
    with pytest.raises(kind, match=message):
        private(rows())


def test_a_second_backward_is_refused() -> None:
    private = dp_compile(MLP(), backend="eager", regions="blocks")
    loss = private(rows()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="a second backward through the same forward"):
        loss.backward()


def test_a_backward_through_another_part_is_refused() -> None:
    private = dp_compile(Around(lambda m, blocks, x: (blocks[0](x), blocks[1](x))), backend="eager", regions="blocks")
    first, second = private(rows())
    first.sum().backward()
    with pytest.raises(PrivacyError, match="a second backward through the same forward"):
        second.sum().backward()


def test_two_forwards_before_one_backward_are_refused() -> None:
    private = dp_compile(MLP(), backend="eager", regions="blocks")
    with pytest.raises(PrivacyError, match="called twice before one backward"):
        (private(rows()).sum() + private(rows()).sum()).backward()


def test_a_compiled_step_needs_one_graph() -> None:
    private = dp_compile(MLP(), backend="eager", regions="blocks")
    optimizer = DPOptimizer(
        torch.optim.SGD(private.parameters(), lr=0.1), private, noise_multiplier=1.0, expected_batch_size=4
    )
    with pytest.raises(UnsupportedGraphError, match="compiled in regions"):
        compile_step(private, F.cross_entropy, optimizer)


def test_an_unknown_way_to_cut_is_refused() -> None:
    with pytest.raises(DPCompileError, match="unknown regions 'layers'"):
        dp_compile(MLP(), regions="layers")
