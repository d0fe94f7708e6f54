"""Models in regions whose backward runs in two passes, or is clipped at once, and regions under a checkpoint."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_models import GPT, MODELS, Around, Block, D, T, V, dp_compile, ids, right, rows
from oracle import PseudoLoss, train_step
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dpcompile import PrivacyError, UnsupportedGraphError
from dpcompile.lowering import backward as lower
from dpcompile.module import engine_of

TWICE: dict[str, Any] = {"backend": "eager", "regions": "blocks", "norm": "two_pass"}


def gradients(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    private = dp_compile(model, **{"max_grad_norm": 0.5, "backend": "eager", **options})
    private.zero_grad()
    torch.manual_seed(3)
    train_step(private, (x,), {}, PseudoLoss(len(x)))
    return {n: p.grad.clone() for n, p in private.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (found[name] - value).norm() / value.norm().clamp_min(1e-6)
        assert error <= 1e-5, f"{name} is off by {error:.1e}"


class Checkpointed(GPT):
    """Blocks under a checkpoint inside the model."""

    def __init__(self, how: str) -> None:
        super().__init__(3)
        self.how = how

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        first, second, third = self.blocks
        if self.how == "two in one":
            x = checkpoint(lambda x: second(first(x)), x, use_reentrant=False)
        elif self.how == "with more around":
            for block in (first, second):
                x = checkpoint(lambda x, block=block: (x.sin() + block(x, causal=True)).tanh(), x, use_reentrant=False)
        else:
            for block in (first, second):
                x = checkpoint(block, x, True, use_reentrant=self.how == "reentrant")
        return self.head(self.norm(third(x)))


def wrapped(kind: type[nn.Module] = Block) -> GPT:
    model = GPT(3)
    apply_activation_checkpointing(model, checkpoint_wrapper, check_fn=lambda m: isinstance(m, kind))
    return model


CHECKPOINTS: dict[str, Any] = {
    **{how: lambda how=how: Checkpointed(how) for how in ("one each", "two in one", "with more around", "reentrant")},
    "wrapped blocks": wrapped,
    "wrapped layers": lambda: wrapped(nn.LayerNorm),
}


# --- the same gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GPT", "ViT", "MLP, middle block frozen", "LoRA"])
def test_two_passes_give_what_one_backward_per_example_gives(name: str) -> None:
    make, example = MODELS[name]
    model = make()
    private = dp_compile(model, max_grad_norm=0.5, **TWICE)
    right(model, private, example())
    right(model, private, example())


@pytest.mark.parametrize(
    ("norm", "clipping"),
    [
        ("two_pass", "automatic"),
        ("ghost_clipping", "per_layer"),
        ("mixed_ghost_clipping", "per_block"),
        ("two_pass", lambda norms: 1 / (1 + norms)),
    ],
)
def test_two_passes_agree_with_one_graph(norm: str, clipping: Any) -> None:
    model, x = GPT(2), ids()
    same(
        gradients(model, x, clipping=clipping, norm=norm, regions="blocks"),
        gradients(model, x, clipping=clipping, norm="ghost"),
    )


@pytest.mark.parametrize("clipping", ["per_layer", "per_block"])
def test_groups_within_a_region_are_clipped_at_once(clipping: str) -> None:
    model, x = GPT(3), ids()
    same(gradients(model, x, clipping=clipping, regions="blocks"), gradients(model, x, clipping=clipping))


def test_groups_across_regions_wait() -> None:
    model, x = nn.Sequential(nn.ModuleDict({"model": GPT(3)})["model"]), ids()  # one group holds everything
    same(gradients(model, x, clipping="per_block", regions="blocks"), gradients(model, x, clipping="per_block"))
    private = dp_compile(model, clipping="per_block", backend="eager", regions="blocks")
    private.trace(x)
    assert {run.lowering.kind for run in lowerings(private)} == {"deferred"}


def lowerings(private: Any) -> list[Any]:
    return list(engine_of(private).graphs._regions.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"norm": "two_pass"}) for name in CHECKPOINTS),
        ("with more around", {"clipping": "per_block"}),
        ("wrapped blocks", {"clipping": "per_block"}),
        ("wrapped blocks", {}),
    ],
)
def test_checkpoints_change_nothing(name: str, options: Any) -> None:
    model, x = CHECKPOINTS[name](), ids()
    plain = {k: v for k, v in options.items() if k != "norm"}
    same(gradients(model, x, regions="blocks", **options), gradients(model, x, **plain))


def test_equal_blocks_under_checkpoints_are_compiled_once() -> None:
    private = dp_compile(wrapped(), **TWICE)
    private(ids()).sum().backward()
    assert engine_of(private).compilations == 3  # type: ignore[attr-defined]


@pytest.mark.full
def test_inductor_runs_both_passes() -> None:
    model = wrapped()
    right(model, dp_compile(model, max_grad_norm=0.5, regions="blocks", norm="two_pass"), ids())


@pytest.mark.full
def test_inductor_clips_at_once() -> None:
    model, x = GPT(2), ids()
    options = {"clipping": "per_block", "backend": "inductor"}
    same(gradients(model, x, regions="blocks", **options), gradients(model, x, **options))


# --- the same computation each time ----------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws random numbers, and counts its calls in a buffer that it computes with."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + F.dropout(self.linear(x), 0.5).tanh() * self.calls


def noisy(wrap: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(checkpoint_wrapper(Noisy()) if wrap else Noisy() for _ in range(3)))


def plainly_named(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.replace("_checkpoint_wrapped_module.", ""): v for n, v in values.items()}


@pytest.mark.parametrize("norm", ["auto", "two_pass"])
@pytest.mark.parametrize("wrap", [False, True])
def test_random_numbers_and_buffers_are_those_of_one_forward(norm: str, wrap: bool) -> None:
    x = rows()
    wanted = gradients(noisy(False), x, regions="blocks")
    model = noisy(wrap)
    same(plainly_named(gradients(model, x, regions="blocks", norm=norm)), wanted)
    assert [int(b) for b in model.buffers()] == [1, 1, 1]


@pytest.mark.parametrize("wrap", [False, True])
def test_an_example_that_is_not_finite_leaves_no_trace_in_two_passes(wrap: bool) -> None:
    layers = [nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(3)]
    model = nn.Sequential(*(checkpoint_wrapper(m) if wrap else m for m in layers))
    private = dp_compile(model, max_grad_norm=0.5, **TWICE)
    x = rows()
    x[1, 0], x[2, 1] = math.inf, math.nan
    with pytest.warns(RuntimeWarning, match="2 of 4 examples"):
        private(x).square().sum(1).mean().backward()
    found = {n: p.grad.clone() for n, p in private.named_parameters()}
    assert all(torch.isfinite(g).all() and g.any() for g in found.values())
    private.zero_grad()
    engine_of(private).set_mask(torch.tensor([True, False, False, True]))
    private(torch.nan_to_num(x, posinf=0.0)).square().sum(1).mean().backward()
    same(found, {n: p.grad for n, p in private.named_parameters()})


def test_an_example_that_is_not_finite_in_one_block_counts_in_the_others_if_they_are_clipped_at_once() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3))
    x = rows()
    x[1, 0] = math.inf  # the first layer's gradient holds it; tanh makes the others finite
    found = []
    for regions in (None, "blocks"):
        with pytest.warns(RuntimeWarning, match="1 of 4 examples"):
            found.append(gradients(model, x, clipping="per_layer", regions=regions))
    same(found[1], found[0])


def test_two_passes_and_padding() -> None:
    model = wrapped()
    private = dp_compile(model, max_grad_norm=0.5, **TWICE)
    mask = torch.tensor([True, False, True, True])
    engine_of(private).set_mask(mask)
    right(model, private, ids(), mask=mask)


def test_what_the_user_writes_into_an_output_does_not_matter() -> None:
    model, x = GPT(2), ids()
    found = []
    for options in ({}, TWICE):
        private = dp_compile(model, **{"max_grad_norm": 0.5, "backend": "eager", **options})
        private.zero_grad()
        out = private(x)
        out *= 2
        out.square().sum((1, 2)).mean().backward()
        found.append({n: p.grad.clone() for n, p in private.named_parameters()})
    same(found[1], found[0])


# --- what runs, and what is held -------------------------------------------------------------------------------------


def runs(monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """How many backward graphs run in a step of a model of five regions."""
    count: list[int] = []
    call = lower._call
    monkeypatch.setattr(lower, "_call", lambda *args: (count.append(1), call(*args))[1])
    private = dp_compile(GPT(3), backend="eager", regions="blocks", **options)
    private(ids()).square().sum((1, 2)).mean().backward()
    monkeypatch.undo()
    return len(count)


def test_how_many_backward_graphs_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs(monkeypatch) == 10  # two parts each
    assert runs(monkeypatch, norm="two_pass") == 10  # two passes each
    assert runs(monkeypatch, clipping="per_layer") == 5


class Alive(TorchDispatchMode):
    """The largest number of bytes that were alive at once, of what was made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.known = {k: v for k, v in self.known.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(n for _, n in self.known.values()))
        return result


def peak(model: nn.Module, **options: Any) -> int:
    private = dp_compile(model, **{"backend": "eager", "regions": "blocks", "norm": "ghost", **options})
    x = torch.randint(0, V, (32, T))
    for _ in range(2):
        private.zero_grad()
        with Alive() as alive:
            private(x).square().sum((1, 2)).mean().backward()
    return alive.peak


def deep(wrap: bool) -> GPT:
    model = GPT(8)
    if wrap:
        apply_activation_checkpointing(model, checkpoint_wrapper, check_fn=lambda m: isinstance(m, Block))
    return model


@pytest.mark.full
def test_what_is_held() -> None:
    """Deferred, a checkpoint does not help the backward; two passes hold inputs of blocks alone."""
    deferred, twice = peak(deep(True)), peak(deep(True), norm="ghost_clipping")
    assert twice < 0.6 * deferred, (twice, deferred)
    assert peak(deep(True), clipping="per_block") < 0.6 * deferred
    assert peak(deep(False), norm="ghost_clipping") < peak(deep(False))


@pytest.mark.parametrize("model", [GPT(2), wrapped()], ids=["kept", "recomputed"])
def test_a_forward_without_a_backward_is_freed(model: nn.Module) -> None:
    private = dp_compile(model, **TWICE)
    out = private(ids())
    memory = StorageWeakRef(out.untyped_storage())
    del out
    assert memory.expired()


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_budget_chooses_and_the_plan_says_so() -> None:
    x = torch.randint(0, V, (32, T))
    model = deep(True)
    wanted = gradients(model, x)
    for budget, chosen in ((100.0, "one backward"), (1.2, "two passes")):
        private = dp_compile(model, max_grad_norm=0.5, backend="eager", regions="blocks", memory_budget=budget)
        private.zero_grad()
        torch.manual_seed(3)
        train_step(private, (x,), {}, PseudoLoss(len(x)))
        same({n: p.grad.clone() for n, p in private.named_parameters()}, wanted)
        assert str(private.plan).splitlines()[-1].startswith(f"lowering: {chosen}; peak ")
    private = dp_compile(model, backend="eager", regions="blocks", memory_budget=1000)
    private.trace(x)
    assert ", over the budget, one backward " in str(private.plan)
    private = dp_compile(model, **TWICE)
    private.trace(x)
    assert str(private.plan).endswith("two passes: forced by norm='two_pass'")


def test_the_forward_that_is_only_looked_at_leaves_nothing() -> None:
    x = rows()
    wanted = gradients(noisy(False), x, regions="blocks")
    model = noisy(True)
    same(plainly_named(gradients(model, x, regions="blocks", memory_budget=1)), wanted)
    assert [int(b) for b in model.buffers()] == [1, 1, 1]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_second_backward_is_refused() -> None:
    private = dp_compile(wrapped(), **TWICE)
    loss = private(ids()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="a second backward through the same forward"):
        loss.backward()


def test_an_input_that_changes_before_the_backward_is_refused() -> None:
    model = nn.Sequential(*(checkpoint_wrapper(nn.Linear(D, D)) for _ in range(2)))
    private, x = dp_compile(model, **TWICE), rows()
    loss = private(x).sum()
    x.zero_()
    with pytest.raises(PrivacyError, match="was changed in place between a forward and its backward"):
        loss.backward()
    loss = private(rows()).sum()
    with torch.no_grad():
        next(model.parameters()).zero_()
    with pytest.raises(PrivacyError, match="'0._checkpoint_wrapped_module.weight' was changed in place"):
        loss.backward()


class Hidden:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Drawing(torch.autograd.Function):
    """Its backward draws random numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * torch.rand_like(g)


class DrawsOnTheWayBack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(Drawing.apply(self.linear(x)))  # type: ignore[arg-type]


def selective(m: Any, blocks: Any, x: Tensor) -> Tensor:
    context = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    return checkpoint(blocks[1], blocks[0](x), use_reentrant=False, context_fn=context)


def test_refused() -> None:
    x = rows()
    with pytest.raises(UnsupportedGraphError, match="under a checkpoint with a context_fn"):
        dp_compile(Around(selective), backend="eager", regions="blocks")(x)
    with pytest.raises(UnsupportedGraphError, match="the model returns a Hidden: a backward in two passes"):
        dp_compile(Around(lambda m, blocks, x: Hidden(blocks[1](blocks[0](x)))), **TWICE)(x)
    with pytest.raises(UnsupportedGraphError, match="draws random numbers or writes to memory"):
        dp_compile(nn.Sequential(DrawsOnTheWayBack(), DrawsOnTheWayBack()), **TWICE)(x).sum().backward()
