"""``DPTrainer``: the Trainer's loop makes the steps of our own, and nothing else of it touches them."""

from __future__ import annotations

import copy
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)

from dpcompile import DPCompileError, PoissonLoader, PrivacyError, make_private  # noqa: E402
from dpcompile.integrations.transformers import DPSeq2SeqTrainer, DPTrainer, PrivacyArguments  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

VOCABULARY, LENGTH = 20, 5


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Examples of ``LENGTH`` tokens, of which the last are padding, with the labels of one task."""

    def __init__(self, task: str, count: int = 24, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
        self.lengths = torch.randint(2, LENGTH + 1, (count,), generator=generator)
        self.floats = torch.rand(count, 3, generator=generator)
        self.task = task

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, mask = self.ids[index], torch.arange(LENGTH) < self.lengths[index]
        item = {"input_ids": ids * mask, "attention_mask": mask.long()}
        places = {"start_positions": ids[0] % LENGTH, "end_positions": ids[1] % (LENGTH + 2)}  # some outside
        labels: dict[str, Any] = {
            "classes": {"labels": ids[0] % 3},
            "number": {"labels": self.floats[index, 0]},
            "several": {"labels": (self.floats[index] > 0.5).float()},
            "causal": {"labels": ids.where(mask, -100)},
            "masked": {"labels": ids.where(mask & (ids % 2 == 0), -100)},
            "tagging": {"labels": (ids % 3).where(mask, -100)},
            "translation": {"labels": ids.where(mask, -100)},
            "span": places,
        }
        return item | labels[self.task]


def bert(kind: Any, **config: Any) -> Any:
    shape: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return kind(BertConfig(vocab_size=VOCABULARY, intermediate_size=16, **shape, **(dropout | config)))


def gpt2(**config: Any) -> Any:
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, **tokens, **(dropout | config)))


def llama() -> Any:
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, **heads))


def t5() -> Any:
    shape: dict[str, Any] = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, **shape)
    return T5ForConditionalGeneration(config)


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "classes": (lambda: bert(BertForSequenceClassification, num_labels=3), "classes"),
    "regression": (lambda: bert(BertForSequenceClassification, num_labels=1), "number"),
    "multi-label": (lambda: bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"), "several"),
    "masked": (lambda: bert(BertForMaskedLM), "masked"),
    "tagging": (lambda: bert(BertForTokenClassification, num_labels=3), "tagging"),
    "span": (lambda: bert(BertForQuestionAnswering), "span"),
    "gpt2": (gpt2, "causal"),
    "llama": (llama, "causal"),
    "t5": (t5, "translation"),
}


def model_and_rows(name: str) -> tuple[Any, Rows]:
    torch.manual_seed(0)
    make, task = MODELS[name]
    return make(), Rows(task)


@pytest.fixture
def trainer(tmp_path: pathlib.Path) -> Callable[..., DPTrainer]:
    """A DPTrainer with plain SGD, 4 examples to a forward, and 8 to a draw of 24."""

    def make(
        model: Any,
        rows: Any,
        *,
        privacy: dict[str, Any] | None = None,
        kind: type[Any] = DPTrainer,
        given: dict[str, Any] | None = None,
        folder: str = "run",
        **options: Any,
    ) -> Any:
        arguments: dict[str, Any] = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2,
            "learning_rate": 0.5,
            "optim": "sgd",
            "use_cpu": True,
            "report_to": [],
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        } | options
        chosen = {"noise_multiplier": 1.0, "target_delta": 1e-3, "backend": "eager", "seed": 5} | (privacy or {})
        chosen = {name: value for name, value in chosen.items() if value is not None}
        arguments = {name: value for name, value in arguments.items() if value is not None}
        return kind(
            model,
            TrainingArguments(str(tmp_path / folder), **arguments),
            train_dataset=rows,
            privacy=PrivacyArguments(**chosen),
            **(given or {}),
        )

    return make


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")  # noqa: B023


def drawn(rows: Any, steps: int, seed: int = 5, size: int = 8) -> Iterator[list[dict[str, Tensor]]]:
    """The examples of each draw, from a loader of its own."""
    numbered = list(range(len(rows)))
    loader = PoissonLoader(numbered, expected_batch_size=size, physical_batch_size=4, seed=seed)
    found: list[int] = []
    while True:
        for batch in loader.batches():
            found += batch.data[batch.mask].tolist()
            if batch.ends_step:
                yield [rows[i] for i in found]
                found, steps = [], steps - 1
                if not steps:
                    return


def one_by_one(model: nn.Module, rows: Any, loss: Callable[[nn.Module, dict[str, Tensor]], Tensor], rates: list[float]) -> dict[str, Tensor]:
    """Slow and plain: one backward for each example, the model's own loss of a batch that holds it alone; no noise."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for rate, examples in zip(rates, drawn(rows, len(rates)), strict=True):
        total = [torch.zeros_like(p) for p in parameters]
        for example in examples:
            value = loss(model, {name: x[None] for name, x in example.items()})
            slopes = torch.autograd.grad(value, parameters, allow_unused=True)
            slopes = [torch.zeros_like(p) if g is None else g for g, p in zip(slopes, parameters, strict=True)]
            norm = torch.sqrt(sum((g.double().square().sum() for g in slopes), torch.zeros((), dtype=torch.float64)))
            for t, g in zip(total, slopes, strict=True):
                t += g * min(1.0, 1.0 / max(float(norm), 1e-12))
        with torch.no_grad():
            for p, t in zip(parameters, total, strict=True):
                p -= rate * t / 8
    return weights(model)


def linear(steps: int, rate: float = 0.5) -> list[float]:
    return [rate * (steps - step) / steps for step in range(steps)]


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_one_backward_per_example(name: str, trainer: Any) -> None:
    model, rows = model_and_rows(name)
    plain = copy.deepcopy(model)
    run = trainer(model, rows, privacy={"noise_multiplier": 0.0}, max_steps=3)
    run.train()
    reference = one_by_one(plain, rows, lambda m, example: m(**example).loss, linear(3))
    assert_same(weights(model), reference, 1e-5)
    assert run.state.global_step == run._private.optimizer.logical_step == 3
