"""Losses with one value per example, and losses inside the model that are refused in their favour."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_right, clip, per_example_gradients, train_step
from torch import Tensor, nn

import dpcompile
from dpcompile import DPOptimizer, ExampleMixingError, compile_step
from dpcompile.losses import per_example_causal_lm, per_example_cross_entropy, per_example_load_balancing

dp_compile: Any = dpcompile.dp_compile  # the tests read attributes that a model's own type does not have

B, T, V = 4, 5, 7


def ragged() -> tuple[Tensor, Tensor]:
    """Logits, and labels of which each example has another number; the last example has none."""
    torch.manual_seed(0)
    labels = torch.randint(0, V, (B, T))
    for i, length in enumerate((5, 3, 2, 0)):
        labels[i, length:] = -100
    return torch.randn(B, T, V), labels


def test_each_example_is_its_own_mean() -> None:
    logits, labels = ragged()
    found = per_example_cross_entropy(logits, labels)
    wanted = [F.cross_entropy(logits[i], labels[i]) for i in range(3)] + [torch.tensor(0.0)]
    torch.testing.assert_close(found, torch.stack(wanted))


def test_next_tokens() -> None:
    logits, labels = ragged()
    found = per_example_causal_lm(logits, labels)
    torch.testing.assert_close(found[1], F.cross_entropy(logits[1, :2], labels[1, 1:3]))
    torch.testing.assert_close(found, per_example_cross_entropy(logits[:, :-1], labels[:, 1:]))


def test_a_public_divisor() -> None:
    logits, labels = ragged()
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(per_example_cross_entropy(logits, labels, divide_by=T).sum(), total / T)


def test_classification_and_segmentation() -> None:
    logits, labels = torch.randn(B, V), torch.randint(0, V, (B,))
    torch.testing.assert_close(
        per_example_cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="none")
    )
    assert per_example_cross_entropy(torch.randn(B, 2, 3, V), torch.zeros(B, 2, 3).long()).shape == (B,)


def test_bfloat16_logits_are_widened() -> None:
    logits, labels = ragged()
    assert per_example_causal_lm(logits.bfloat16(), labels).dtype == torch.float32
    assert per_example_causal_lm(logits.double(), labels).dtype == torch.float64


@pytest.mark.parametrize(
    ("loss", "logits", "labels", "message"),
    [
        (per_example_cross_entropy, (B, V, T), (B, T), "do not belong together: logits have the classes as one more"),
        (per_example_cross_entropy, (B, V), (B, 1), "do not belong together"),
        (per_example_cross_entropy, (V,), (), "do not belong together"),
        (per_example_causal_lm, (B, 1, V), (B, 1), r"labels must be \[B, T\] with T of 2 or more, not \[4, 1\]"),
        (per_example_causal_lm, (B, V), (B,), r"labels must be \[B, T\]"),
    ],
)
def test_shapes_that_do_not_fit(loss: Any, logits: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(torch.randn(logits), torch.zeros(labels).long())


class Decoder(nn.Module):
    """A language model that computes the loss too, as Hugging Face's do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(V, 6), nn.Linear(6, V)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        logits = self.head(self.table(ids).tanh())
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return loss, logits


def test_training_on_it_is_right() -> None:
    torch.manual_seed(0)
    model, (_, labels) = Decoder(), ragged()
    ids = labels.clamp_min(0)

    def loss(output: Any, rows: slice) -> Tensor:
        return per_example_causal_lm(output[1], labels[rows])

    truth = clip(per_example_gradients(model, (ids,), {}, loss), 0.1)
    private = dp_compile(copy.deepcopy(model), max_grad_norm=0.1, backend="eager")
    train_step(private, (ids,), {}, loss)
    assert_right(private, truth, 1e-4)


def test_in_a_compiled_step() -> None:
    torch.manual_seed(0)
    model, (_, labels) = Decoder(), ragged()
    ids = labels.clamp_min(0)
    truth = per_example_gradients(model, (ids,), {}, lambda out, rows: per_example_causal_lm(out[1], labels[rows]))
    private = dp_compile(model, backend="eager")
    optimizer = DPOptimizer(
        torch.optim.SGD(private.parameters(), lr=0.0), private, noise_multiplier=1.0, expected_batch_size=B, seed=0
    )
    step = compile_step(private, lambda out, y: per_example_causal_lm(out[1], y), optimizer)
    step(ids, labels)
    torch.testing.assert_close(private.grad_norms.double(), clip(truth, 1.0).norms, rtol=1e-4, atol=1e-6)


def test_a_mean_over_the_tokens_of_the_batch_is_refused() -> None:
    _, labels = ragged()
    with pytest.raises(ExampleMixingError) as caught:
        dp_compile(Decoder(), backend="eager")(labels.clamp_min(0), labels=labels)
    text = str(caught.value)
    assert "`div` mixes examples: it divides a sum over the examples by another one" in text
    assert "test_losses.py" in text and "F.cross_entropy(logits[:, :-1]" in text
    assert "dpcompile.losses.per_example_causal_lm" in text


def test_logs_do_not_break_the_graph(caplog: pytest.LogCaptureFixture) -> None:
    """Libraries warn and log inside forward; where torch.compile breaks the graph for that, we go on."""
    logger = logging.getLogger("dptest")

    class Talkative(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            if logger.isEnabledFor(logging.INFO):
                logger.info("shape %s", input.shape)
            logger.warning("careful")
            warnings.warn("careful", UserWarning, stacklevel=2)
            return super().forward(input)

    private = dp_compile(Talkative(3, 2), backend="eager")
    private(torch.randn(B, 3)).sum(1).mean().backward()
    assert private.grad_norms.shape == (B,)


# --- load balancing ---------------------------------------------------------------------------------------------------


def test_load_balancing_is_that_of_transformers_on_one_example() -> None:
    """Of two layers and three examples, with tokens that do not count."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    torch.manual_seed(0)
    layers = [torch.randn(3, 6, 4) for _ in range(2)]
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    for given in (None, mask):
        each = per_example_load_balancing([x.flatten(0, 1) for x in layers], 3, 2, given)
        for i in range(3):
            own = None if given is None else given[i : i + 1]
            whole = mixtral.load_balancing_loss_func(tuple(x[i] for x in layers), 4, 2, own)
            torch.testing.assert_close(each[i], whole / 2)  # ours is 1 where tokens are spread evenly
    even = torch.eye(4).repeat(2, 1)[None] * 1e4
    torch.testing.assert_close(per_example_load_balancing(even, 1, 1), torch.ones(1))
    with pytest.raises(ValueError, match=r"must be \[B \* T, experts\] of B = 4"):
        per_example_load_balancing(torch.randn(6, 4), 4, 1)


class Balanced(nn.Module):
    """A mixture of experts of Transformers, and what is returned of it."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        pytest.importorskip("transformers")
        from models.experts import EXPERTS
        from models.pretrained import build

        config: Any = EXPERTS | {"num_hidden_layers": 1}
        self.model = build("MixtralForCausalLM", num_local_experts=3, **config)
        self.inside = inside
        with torch.no_grad():
            self.model(torch.zeros(1, 2, dtype=torch.long), output_router_logits=True)

    def forward(self, ids: Tensor) -> Any:
        out = self.model(ids, output_router_logits=True)
        return out.logits, (out.aux_loss if self.inside else out.router_logits[0])


def test_load_balancing_over_the_batch_is_refused_and_its_remedy_works() -> None:
    """The router's logits in place of the loss, and one loss for each example."""
    torch.manual_seed(0)
    ids = torch.randint(2, 11, (4, 5))
    refused: Any = dpcompile.dp_compile(Balanced(inside=True), backend="eager")
    with pytest.raises(ExampleMixingError, match=r"counts values of all examples[\s\S]*per_example_load_balancing"):
        refused(ids)

    def loss(out: Any, rows: slice) -> Tensor:
        balance = per_example_load_balancing(out[1], out[0].shape[0], 2)
        return per_example_causal_lm(out[0], ids[rows]) + balance

    model = Balanced(inside=False)
    gradients = per_example_gradients(model, (ids,), {}, loss)
    private: Any = dpcompile.dp_compile(copy.deepcopy(model), max_grad_norm=0.5, backend="eager")
    train_step(private, (ids,), {}, loss)
    assert_right(private, clip(gradients, 0.5), 1e-4)
