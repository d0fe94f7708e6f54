"""Parameters that several regions use in one forward: their gradients add before the norm is taken."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from block_models import MLP, Around, B, D, T, V, ids, right, rows
from oracle import PseudoLoss, train_step
from shared_models import USES, Peeking, Tied, private, twice
from torch import Tensor, nn

from dpcompile.module import engine_of
from dpcompile.planning import shared_uses


@pytest.mark.parametrize("norm", ["auto", "ghost", "instantiate", "redo", "direct", "bk_mixed_ghost"])
def test_a_tied_head(norm: str) -> None:
    model = Tied()
    compiled = private(model, norm=norm)
    right(model, compiled, ids())
    right(model, compiled, ids())
    assert compiled.plan.rules()["tokens.weight"] == ("keep" if norm == "instantiate" else "later")


def test_a_tied_head_through_inductor() -> None:
    model = Tied()
    right(model, private(model, backend="inductor"), ids())


@pytest.mark.parametrize("norm", ["auto", "ghost", "instantiate"])
@pytest.mark.parametrize("function", USES, ids=lambda f: f.__name__)
def test_uses_in_several_regions(function: Any, norm: str) -> None:
    model = Around(function)
    compiled = private(model, norm=norm)
    for batch in (B, 1, B):
        right(model, compiled, torch.randn(batch, D))


class Convolutions(nn.Module):
    """A grouped filter, a transposed one and norms that two blocks share."""

    def __init__(self) -> None:
        super().__init__()

        def block() -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.GroupNorm(2, 4), nn.Tanh(), nn.ConvTranspose2d(4, 4, 2)
            )

        self.blocks: Any = nn.ModuleList([block(), block()])
        for i in (0, 1, 3):
            self.blocks[1][i] = self.blocks[0][i]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("norm", ["auto", "ghost", "instantiate", "direct"])
def test_convolutions_and_norm_layers_in_two_blocks(norm: str) -> None:
    model = Convolutions()
    right(model, private(model, norm=norm), torch.randn(B, 4, 5, 5))


def test_weights_shared_by_two_blocks() -> None:
    model = MLP(2)
    model.layers[2].weight = model.layers[0].weight  # type: ignore[union-attr]
    compiled = private(model)
    right(model, compiled, rows())
    mask = torch.tensor([True, False, True, True])
    engine_of(compiled).set_mask(mask)
    right(model, compiled, rows(), mask=mask)


def test_a_use_that_is_seen_only_when_it_runs() -> None:
    """The first backward asks the regions for one example at a time; the second forward is compiled for it."""
    shared = nn.Linear(D, D)
    model = nn.Sequential(shared, nn.Tanh(), Peeking([shared]), Peeking([shared]))
    compiled = private(model)
    right(model, compiled, rows())
    engine: Any = engine_of(compiled)
    assert engine.graphs.shared == {"0.weight"} and "later" not in compiled.plan.rules().values()
    right(model, compiled, rows())
    assert compiled.plan.rules()["0.weight"] == "later"


def test_cross_terms_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of these tests: with the uses' squared norms added they fail."""
    original = shared_uses.joint_norm

    def added(parts: Any, batch: int, mode: str) -> Tensor:
        return torch.stack([original([p], batch, mode) for p in parts]).sum(0)

    monkeypatch.setattr("dpcompile.regions.backward.joint_norm", added)
    for model, x in ((Tied(), ids()), (Around(twice), rows())):
        with pytest.raises(AssertionError, match="norms are off"):
            right(model, private(model), x)


@pytest.mark.parametrize("clipping", ["per_layer", "automatic"])
def test_it_agrees_with_one_graph(clipping: str) -> None:
    model, x, loss = Tied(), ids(), PseudoLoss(B)
    found = []
    for regions in (None, "blocks"):
        compiled = private(copy.deepcopy(model), clipping=clipping, regions=regions)
        train_step(compiled, (x,), {}, loss)
        found.append({n: p.grad for n, p in compiled.named_parameters()} | {"norms": compiled.grad_norms})
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_check_compares_shared_parameters_too() -> None:
    private(Tied(), check=True)(ids()).square().mean((1, 2)).mean().backward()


@pytest.mark.parametrize("ghosts", [True, False])
def test_examples_are_taken_some_at_a_time(ghosts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gram matrices and per-example gradients larger than the allowed scratch memory."""
    monkeypatch.setattr(shared_uses, "_SCRATCH", 0)
    monkeypatch.setattr(shared_uses, "_prefers_ghost", lambda *_: ghosts)
    model = Tied()
    right(model, private(model), torch.randint(0, V, (7, T)))
