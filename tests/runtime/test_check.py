"""check=True: it passes on what is right and fails on what is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpcompile import DPCompileError, PrivacyError, dp_compile
from dpcompile.rewriting import norm_nodes, sum_nodes

B = 5


def run(model: nn.Module, *inputs: Tensor, **options) -> nn.Module:
    private = dp_compile(model, backend="eager", check=True, max_grad_norm=0.3, **options)
    output = private(*inputs)
    (output if output.ndim == 0 else output.square().flatten(1).sum(1).mean()).backward()
    return private


def test_passes_where_the_answers_agree() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    for clipping in ("flat", "automatic", "per_layer"):
        net.zero_grad()
        run(net, torch.randn(B, 4), clipping=clipping)


def test_scalar_loss_in_the_model() -> None:
    class Loss(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square().sum(1).mean()

    run(Loss(4, 3), torch.randn(B, 4))


def test_batch_of_one() -> None:
    run(nn.Linear(4, 3), torch.randn(1, 4))


def test_only_the_first_step_is_compared() -> None:
    model = run(nn.Linear(4, 3), torch.randn(B, 4))
    model.zero_grad()
    model(torch.randn(B, 4)).sum(1).mean().backward()


def test_a_norm_that_is_too_small_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_nodes, "outer", lambda sides: sides.cols.square().sum(-1).flatten(1).sum(1))
    with pytest.raises(PrivacyError, match=r"check=True: the gradient norms differ from torch.func.vmap\(grad\)"):
        run(nn.Linear(4, 3), torch.randn(B, 4), norm="ghost")


def test_a_sum_that_is_not_clipped_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sum_nodes, "_weighted_site", lambda site, known, w, dtype, _: sum_nodes.run_operation(
        site.operation, known, dtype))  # fmt: skip
    with pytest.raises(PrivacyError, match="the clipped gradient of parameter 'weight' differ"):
        run(nn.Linear(4, 3), 10 * torch.randn(B, 4), norm="ghost")


def test_random_models_cannot_be_compared() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    with pytest.raises(DPCompileError, match=r"(?s)could not run the model under torch.func.vmap.*\.eval\(\)"):
        run(model, torch.randn(B, 4))


def test_positional_and_keyword_inputs_with_dims() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return super().forward(x.movedim(1, 0)) * scale

    private = dp_compile(Two(4, 3), backend="eager", check=True, in_dims={"x": 1, "scale": None})
    F.mse_loss(
        private(torch.randn(4, B).unsqueeze(2).expand(4, B, 4).clone(), scale=torch.ones(3)), torch.zeros(B, 4, 3)
    ).backward()
