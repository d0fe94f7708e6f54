"""``DPTrainer``: the Trainer's loop makes the steps of our own, and nothing else of it touches them."""

from __future__ import annotations

import copy
import dataclasses
import math
import pathlib
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launching import launch, passed
from torch import Tensor, nn
from torch.utils.data import DataLoader

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
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)

from dpcompile import DPCompileError, PoissonLoader, PrivacyError, PrivacyWarning, dp_compile, make_private  # noqa: E402
from dpcompile.integrations.transformers import DPSeq2SeqTrainer, DPTrainer, PrivacyArguments  # noqa: E402
from dpcompile.integrations.transformers.refusals import REFUSED, refuse_arguments  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT

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
    dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return kind(BertConfig(vocab_size=VOCABULARY, intermediate_size=16, **shape, **(dropout | config)))


def gpt2(**config: Any) -> Any:
    tokens: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, **tokens, **(dropout | config)))


def llama() -> Any:
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, **heads))


def t5() -> Any:
    shape: dict[str, Any] = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    shape |= {"decoder_start_token_id": 0, "pad_token_id": 0}
    config = T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, **shape)
    return T5ForConditionalGeneration(config)


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "classes": (lambda: bert(BertForSequenceClassification, num_labels=3), "classes"),
    "regression": (lambda: bert(BertForSequenceClassification, num_labels=1), "number"),
    "multi-label": (
        lambda: bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"),
        "several",
    ),
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
        chosen = {"noise_multiplier": 1.0, "target_delta": 1e-3, "backend": "eager", "noise_seed": 5} | (privacy or {})
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
        torch.testing.assert_close(
            a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )  # noqa: B023


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


def one_by_one(
    model: nn.Module, rows: Any, loss: Callable[[nn.Module, dict[str, Tensor]], Tensor], rates: list[float]
) -> dict[str, Tensor]:
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


class TinyConfig(PretrainedConfig):
    model_type = "tiny_of_the_tests"


class Tiny(PreTrainedModel):
    """Quick to compile: a mean of embeddings, with dropout, and a linear layer."""

    config_class = TinyConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(getattr(config, "dropout", 0.0))
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        mask = attention_mask.unsqueeze(-1)
        mean = (self.embed(input_ids) * mask).sum(1) / mask.sum(1).clamp_min(1)
        logits = self.head(self.dropout(mean))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def tiny(**config: Any) -> Tiny:
    torch.manual_seed(0)
    return Tiny(TinyConfig(**{"num_labels": 3, **config}))


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_weights_are_those_of_our_own_loop(trainer: Any) -> None:
    """With noise, AdamW, weight decay, a schedule, dropout and virtual batches: to the last bit."""
    model, rows = tiny(dropout=0.2), Rows("classes")
    plain = copy.deepcopy(model)
    options = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 0.01, "max_grad_norm": 0.7}
    run = trainer(model, rows, seed=3, **options)
    run.train()

    inner = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    names = run.get_decay_parameter_names(plain)
    inner.param_groups[0]["params"] = [p for n, p in plain.named_parameters() if n in names]
    inner.param_groups[0]["weight_decay"] = 0.1
    inner.add_param_group({"params": [p for n, p in plain.named_parameters() if n not in names], "weight_decay": 0.0})
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: (6 - step) / 6)
    private, optimizer, loader = make_private(
        plain, inner, DataLoader(rows, batch_size=8), noise_multiplier=1.0, physical_batch_size=4, seed=5,
        max_grad_norm=0.7, backend="eager",
    )  # fmt: skip
    torch.manual_seed(3)
    for _ in range(2):
        for batch in loader.parts():
            last = not optimizer.accumulating
            labels = batch.pop("labels")
            F.cross_entropy(private(**batch)["logits"], labels).backward()
            optimizer.step()
            if last:
                schedule.step()
                optimizer.zero_grad()
    assert optimizer.logical_step == run._private.optimizer.logical_step == run.state.global_step == 6
    assert_same(weights(model), weights(plain))
    assert run.epsilon == optimizer.accountant.epsilon(1e-3)  # type: ignore[union-attr]


def test_a_target_is_met_exactly_and_logged(trainer: Any) -> None:
    run = trainer(
        tiny(), Rows("classes"), privacy={"noise_multiplier": None, "target_epsilon": 2.0}, num_train_epochs=1.5
    )
    out = run.train()
    assert run.state.global_step == run._private.optimizer.logical_step == math.ceil(1.5 * 3)
    logged = [entry["epsilon"] for entry in run.state.log_history]
    assert len(logged) == 6 and logged == sorted(logged) and logged[0] < 1.5
    assert out.metrics["epsilon"] == run.epsilon == pytest.approx(2.0, abs=0.01) and run.epsilon <= 2.0
    assert not any("grad_norm" in entry for entry in run.state.log_history)
    assert run.state.total_flos == 0
    assert "epsilon" in str(run.report())
    with (
        pytest.warns(PrivacyWarning, match="all 5 planned steps are taken"),
        pytest.raises(PrivacyError, match="calibrated"),
    ):
        run.train()


def test_what_is_shown_is_the_mean_loss_of_the_examples_drawn(trainer: Any) -> None:
    model, rows = tiny(), Rows("classes")
    run = trainer(model, rows, learning_rate=0.0, privacy={"noise_multiplier": 0.0})
    run.train()
    shown = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    for value, examples in zip(shown, drawn(rows, 6), strict=True):
        of_each = [model(**{n: x[None] for n, x in e.items()})["loss"].item() for e in examples]
        assert value == pytest.approx(sum(of_each) / len(of_each), abs=1e-5)


class Looks(TrainerCallback):
    """Stops, or looks, after a step."""

    def __init__(self, stop: int | None = None, do: Callable[..., Any] | None = None) -> None:
        self.stop, self.do, self.seen = stop, do, []

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.seen.append(state.global_step)
        if self.do is not None:
            self.do(**given)
        control.should_training_stop = state.global_step == self.stop


@pytest.mark.parametrize("stop", [2, 3, 4])  # within a pass, at its end, within the next
def test_resumed_is_as_uninterrupted(trainer: Any, tmp_path: pathlib.Path, stop: int) -> None:
    rows = Rows("classes")
    options = {"optim": "adamw_torch", "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 1}
    whole = tiny(dropout=0.2)
    run = trainer(whole, rows, folder="whole", **options)
    run.train()
    first = trainer(tiny(dropout=0.2), rows, given={"callbacks": [Looks(stop)]}, folder="cut", **options)
    first.train()
    again = tiny(dropout=0.2)
    second = trainer(
        again, rows, folder="cut", privacy={"noise_seed": None}, **options
    )  # the seed is in the checkpoint
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == second._private.optimizer.logical_step == 6
    assert second.epsilon == run.epsilon
    assert_same(weights(again), weights(whole))
    told = [
        {k: v for k, v in entry.items() if "per_second" not in k and "runtime" not in k}
        for entry in run.state.log_history
    ]
    assert [e for e in second.state.log_history if "loss" in e] == [e for e in told if "loss" in e]


def test_what_is_not_resumed(trainer: Any, tmp_path: pathlib.Path) -> None:
    rows, options = Rows("classes"), {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    run = trainer(tiny(), rows, folder="run", save_only_model=True, **options)
    run.train()
    with pytest.raises(PrivacyError, match=r"has no optimizer.pt: what its steps have cost"):
        trainer(tiny(), rows, folder="run", **options).train(resume_from_checkpoint=True)

    run = trainer(tiny(), rows, folder="other", **options)
    run.train()
    for name in ("optimizer.pt", "scheduler.pt", "private_loader.pt"):
        missing = tmp_path / "other" / "checkpoint-1" / name
        kept = missing.read_bytes()
        missing.unlink()
        with pytest.raises(PrivacyError, match=f"has no {name}"):
            trainer(tiny(), rows, folder="other", **options).train(str(missing.parent))
        missing.write_bytes(kept)
    with pytest.raises(PrivacyError, match="noise"):  # of another sigma
        trainer(tiny(), rows, folder="other", privacy={"noise_multiplier": 2.0}, **options).train(True)
    with pytest.raises(PrivacyError):  # back to a step whose noise and draws were used, in the run itself
        run.train(str(tmp_path / "other" / "checkpoint-1"))

    args = TrainingArguments(str(tmp_path / "public"), use_cpu=True, report_to=[], disable_tqdm=True, **options)
    transformers.Trainer(tiny(), args, train_dataset=rows).train()
    with pytest.raises(PrivacyError, match="has no private_loader.pt"):
        trainer(tiny(), rows, folder="public", **options).train(resume_from_checkpoint=True)


def test_evaluation_is_that_of_the_ordinary_model(trainer: Any, tmp_path: pathlib.Path) -> None:
    rows, held_out = Rows("classes"), Rows("classes", 10, seed=1)
    alone, model = tiny(), tiny()
    trainer(alone, rows).train()
    given = {"eval_dataset": held_out, "compute_metrics": accuracy}
    run = trainer(model, rows, eval_strategy="steps", eval_steps=1, eval_on_start=True, given=given)
    run.train()
    assert_same(weights(model), weights(alone))  # looking changes nothing
    found = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert len(found) == 7 and all("eval_accuracy" in entry for entry in found)

    plain = transformers.Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True),
                                 eval_dataset=held_out, compute_metrics=accuracy)  # fmt: skip
    theirs, ours = plain.evaluate(), run.evaluate()
    assert ours["eval_loss"] == theirs["eval_loss"] == found[-1]["eval_loss"]
    assert ours["eval_accuracy"] == theirs["eval_accuracy"]
    assert (run.predict(held_out).predictions == plain.predict(held_out).predictions).all()
    assert run._private.optimizer.logical_step == 6
    assert "forward" not in model.__dict__


def test_saved_models_are_the_models_own(trainer: Any, tmp_path: pathlib.Path) -> None:
    model, rows = tiny(), Rows("classes")
    run = trainer(model, rows, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True,
                  metric_for_best_model="accuracy", lr_scheduler_type="constant",
                  given={"eval_dataset": Rows("classes", 10, seed=1), "compute_metrics": accuracy,
                         "callbacks": [EarlyStoppingCallback(early_stopping_patience=1)]},
                  num_train_epochs=6)  # fmt: skip
    run.train()
    assert type(run.model) is Tiny and run.model is model
    run.save_model(str(tmp_path / "saved"))
    again = Tiny.from_pretrained(tmp_path / "saved")
    assert_same(weights(again), weights(model))
    best = pathlib.Path(run.state.best_model_checkpoint)
    assert_same(weights(Tiny.from_pretrained(best)), weights(model))
    assert run.state.global_step == run._private.optimizer.logical_step < 18
    secret = str(run._private.optimizer.seed).encode()
    assert secret == b"5"
    saved = torch.load(best / "training_args.bin", weights_only=False)
    assert saved.max_grad_norm == run.args.max_grad_norm == 1.0
    assert saved.gradient_accumulation_steps == run.args.gradient_accumulation_steps == 2
    assert "5" not in repr(run.privacy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 in TrainingArguments: it is C"),
        ({"train_sampling_strategy": "group_by_length"}, "epsilon is not that of another sampling"),
        ({"train_sampling_strategy": "sequential"}, "epsilon is not that of another sampling"),
        ({"auto_find_batch_size": True}, "begins the run again with another batch size"),
        ({"dataloader_drop_last": True}, "no draw is a last part of the data"),
        ({"data_seed": 1}, "draws are a secret"),
        ({"ignore_data_skip": True}, "goes on with the draws that are left"),
        ({"include_num_input_tokens_seen": "all"}, "counts the tokens of the examples"),
        ({"torch_compile": True}, "the private model compiles itself"),
        ({"use_liger_kernel": True}, "fused loss"),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": "all-linear"}, "while the backward runs"),
        ({"optim": "schedule_free_adamw"}, "told apart training from evaluation"),
        ({"push_to_hub": True, "hub_strategy": "checkpoint"}, "hold the seed"),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(options: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    if not options.keys() <= known:
        pytest.skip("not an argument of this version")
    basis = {"use_cpu": True, "report_to": []}
    try:
        args = TrainingArguments(str(tmp_path), **basis, **options)
    except Exception as error:  # what they need is not installed
        pytest.skip(str(error))
    with pytest.raises(PrivacyError, match=re.escape(message)) as refusal:
        refuse_arguments(args)
    assert refusal.value.remedy
    refuse_arguments(TrainingArguments(str(tmp_path), **basis))
    if not args.push_to_hub:
        with pytest.raises(PrivacyError, match=re.escape(message)):
            DPTrainer(tiny(), args, train_dataset=Rows("classes"), privacy=PrivacyArguments(target_delta=1e-3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp16", True),
        ("deepspeed", "ds.json"),
        ("fsdp_config", {"version": 1}),
        ("fsdp_config", {"xla": True}),
        ("fsdp_config", {"cpu_ram_efficient_loading": True}),
        ("parallelism_config", 1),
        ("n_gpu", 2),
    ],
)
def test_devices_that_are_refused(name: str, value: Any) -> None:
    """Settings that ``TrainingArguments`` itself refuses on this machine."""
    args = types.SimpleNamespace(
        **{"max_grad_norm": 1.0, "n_gpu": 1, "push_to_hub": False, "fsdp": name == "fsdp_config", name: value}
    )
    with pytest.raises(PrivacyError, match=f"{name}="):
        refuse_arguments(args)


def test_changed_arguments_are_seen(trainer: Any) -> None:
    run = trainer(tiny(), Rows("classes"))
    run.args.max_grad_norm = 0.0
    with pytest.raises(PrivacyError, match="it is C"):
        run.train()


def test_what_is_no_map_of_examples(trainer: Any) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(PrivacyError, match="without length or index"):
        trainer(tiny(), Stream(), max_steps=2).train()

    class Weighted(DPTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.WeightedRandomSampler([1.0] * 24, 24)

    with pytest.raises(PrivacyError, match="samples with WeightedRandomSampler"):
        trainer(tiny(), Rows("classes"), kind=Weighted).train()


def test_what_a_subclass_may_not_replace(trainer: Any) -> None:
    for name in ("compute_loss", "get_train_dataloader", "get_batch_samples", "training_step", "create_optimizer"):
        kind = type("Mine", (DPTrainer,), {name: lambda self, *args, **options: None})
        with pytest.raises(PrivacyError, match=f"Mine.{name} takes the place"):
            trainer(tiny(), Rows("classes"), kind=kind)


def test_a_run_without_privacy_or_of_a_private_model(tmp_path: pathlib.Path, trainer: Any) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(PrivacyError, match="DPTrainer without privacy="):
        DPTrainer(tiny(), args, train_dataset=Rows("classes"))
    with pytest.raises(PrivacyError, match="without target_delta"):
        PrivacyArguments(target_epsilon=3.0)
    with pytest.raises(PrivacyError, match="max_grad_norm.*|.*sets itself"):
        PrivacyArguments(target_epsilon=3.0, target_delta=1e-3, options={"max_grad_norm": 2.0})
    with pytest.raises(PrivacyError, match="private already"):
        trainer(dp_compile(tiny()), Rows("classes"))
    with pytest.raises(PrivacyError, match="neither of noise_multiplier and target_epsilon"):
        trainer(tiny(), Rows("classes"), privacy={"noise_multiplier": None}).train()
    with pytest.raises(PrivacyError, match="epsilon is that of all runs"):
        trainer(tiny(), Rows("classes")).hyperparameter_search()


def test_arguments_from_a_command_line(tmp_path: pathlib.Path) -> None:
    words = f"--output_dir {tmp_path} --use_cpu --target_epsilon 2.5 --target_delta 1e-5 --physical_batch_size 16"
    parser = transformers.HfArgumentParser((TrainingArguments, PrivacyArguments))  # type: ignore[arg-type]
    _, privacy = parser.parse_args_into_dataclasses(words.split(), look_for_args_file=False)
    assert (privacy.target_epsilon, privacy.physical_batch_size, privacy.noise_seed) == (2.5, 16, None)


def of_each(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    assert num_items_in_batch is None or not torch.is_grad_enabled()
    return F.cross_entropy(outputs["logits"], labels, reduction="none")


@pytest.mark.full
def test_a_loss_of_ones_own(trainer: Any) -> None:
    theirs, ours = tiny(), tiny()
    trainer(theirs, Rows("classes")).train()
    run = trainer(ours, Rows("classes"), given={"compute_loss_func": of_each, "eval_dataset": Rows("classes", 9)})
    run.train()
    assert_same(weights(ours), weights(theirs))
    assert run.evaluate()["eval_loss"] > 0

    class Mine(DPTrainer):
        def per_example_loss(self, outputs: Any, labels: Any) -> Tensor:
            return of_each(outputs, labels["labels"])

    overridden = tiny()
    trainer(overridden, Rows("classes"), kind=Mine).train()
    assert_same(weights(overridden), weights(theirs))


def test_a_loss_of_ones_own_that_mixes(trainer: Any) -> None:
    def mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels)

    def centred(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"]
        return F.cross_entropy(logits - logits.mean(0), labels, reduction="none")

    with pytest.raises(DPCompileError, match=r"compute_loss_func returned a tensor \[\] for a batch of 4"):
        trainer(tiny(), Rows("classes"), given={"compute_loss_func": mean}).train()
    with pytest.raises(DPCompileError, match="compute_loss_func mixes examples"):
        trainer(tiny(), Rows("classes"), given={"compute_loss_func": centred}).train()


class Weighted(Tiny):
    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        outputs = super().forward(**inputs)
        if labels is not None:
            outputs["loss"] = F.cross_entropy(outputs["logits"], labels) + outputs["logits"].square().mean()
        return outputs


def test_a_model_whose_loss_is_another(trainer: Any) -> None:
    with pytest.raises(DPCompileError, match="the loss of Weighted for one example is not the mean over its own"):
        trainer(Weighted(tiny().config), Rows("classes"), remove_unused_columns=False).train()
    with pytest.raises(DPCompileError, match=r"a batch has none of the labels \['targets'\]"):
        trainer(tiny(), Rows("classes"), label_names=["targets"]).train()


def test_label_smoothing(trainer: Any) -> None:
    smoother = transformers.trainer_pt_utils.LabelSmoother(0.2)

    def loss(model: nn.Module, example: dict[str, Tensor]) -> Tensor:
        labels = example.pop("labels")
        return smoother(model(**example), labels)

    model, rows = tiny(), Rows("classes")
    plain = copy.deepcopy(model)
    trainer(model, rows, privacy={"noise_multiplier": 0.0}, max_steps=2, label_smoothing_factor=0.2).train()
    assert_same(weights(model), one_by_one(plain, rows, loss, linear(2)), 1e-5)


@pytest.mark.full
def test_two_runs_of_one_trainer_are_counted_together(trainer: Any) -> None:
    run = trainer(tiny(), Rows("classes"))
    run.train()
    once = run.epsilon
    run.train()
    assert run._private.optimizer.logical_step == 12 and run._private.optimizer.accountant.steps == 12
    assert run.epsilon > once

    def make() -> Tiny:
        return tiny()

    fresh = trainer(None, Rows("classes"), given={"model_init": make})
    fresh.train()
    with pytest.raises(PrivacyError, match="a second run from model_init"):
        fresh.train()


@pytest.mark.full
def test_what_changes_between_two_runs(trainer: Any) -> None:
    def replaced(name: str, value: Any, owner: str | None = None) -> Any:
        run = trainer(tiny(), Rows("classes"), max_steps=1)
        run.train()
        setattr(run if owner is None else getattr(run, owner), name, value)
        return run

    for name, value, owner in (
        ("train_dataset", Rows("classes"), None),
        ("model", tiny(), None),
        ("data_collator", list, None),
        ("compute_loss_func", of_each, None),
        ("max_grad_norm", 2.0, "args"),
        ("per_device_train_batch_size", 2, "args"),
        ("noise_multiplier", 0.5, "privacy"),
    ):
        run = replaced(name, value, owner)
        named = {"per_device_train_batch_size": "train_batch_size"}.get(name, "privacy" if owner == "privacy" else name)
        with pytest.raises(PrivacyError, match=f"^{named} was changed after training began"):
            run.train()
    run = replaced("optimizer", None)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    with pytest.raises(PrivacyError, match="optimizer was replaced by SGD: its steps would have no noise"):
        run.train()


@pytest.mark.full
def test_an_optimizer_of_ones_own(trainer: Any) -> None:
    theirs, ours = tiny(), tiny()
    trainer(theirs, Rows("classes")).train()
    run = trainer(ours, Rows("classes"), given={"optimizers": (torch.optim.SGD(ours.parameters(), lr=0.5), None)})
    run.train()
    assert_same(weights(ours), weights(theirs))


def test_callbacks_that_meddle(trainer: Any) -> None:
    class Clips(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    with pytest.raises(PrivacyError, match="did not come out of the clipped backward alone"):
        trainer(tiny(), Rows("classes"), given={"callbacks": [Clips()]}).train()

    def backward(model: Any, **_: Any) -> None:
        model(**{name: x[None] for name, x in Rows("classes")[0].items()})["loss"].backward()

    with pytest.raises(PrivacyError):  # nothing clips the ordinary model
        trainer(tiny(), Rows("classes"), given={"callbacks": [Looks(do=backward)]}).train()

    def more_steps(optimizer: Any, **_: Any) -> None:
        optimizer.step()

    with pytest.raises(PrivacyError, match="without a clipped backward since the last step"):
        trainer(tiny(), Rows("classes"), given={"callbacks": [Looks(do=more_steps)]}).train()

    def peeks(train_dataloader: Any, **_: Any) -> None:
        next(next(iter(train_dataloader)).parts())

    with pytest.raises(PrivacyError, match="another pass over the same loader has begun"):
        trainer(tiny(), Rows("classes"), given={"callbacks": [Looks(do=peeks)]}).train()


def test_draws_without_examples_are_steps(trainer: Any) -> None:
    run = trainer(tiny(), Rows("classes"), per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=12)
    run.train()
    sizes = [len(examples) for examples in drawn(Rows("classes"), 12, size=1)]
    assert 0 in sizes and run._private.optimizer.logical_step == 12


def test_bfloat16(trainer: Any) -> None:
    kinds = set()

    class Mine(DPTrainer):
        def per_example_loss(self, outputs: Any, labels: Any) -> Tensor:
            kinds.add((outputs["logits"].dtype, next(model.parameters()).dtype))
            return super().per_example_loss(outputs, labels)

    model = tiny()
    run = trainer(model, Rows("classes"), kind=Mine, bf16=True, given={"eval_dataset": Rows("classes", 9)})
    run.train()
    assert kinds == {(torch.bfloat16, torch.float32)}
    assert run.evaluate()["eval_loss"] > 0 and "forward" not in model.__dict__
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.full
@pytest.mark.parametrize("masks", ["eager", "sdpa"])
def test_collators_that_pad_to_the_longest(masks: str, trainer: Any) -> None:
    """Rows that fill up a physical batch have no position to attend to."""

    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        longest = max(int(item["attention_mask"].sum()) for item in items)
        return {name: torch.stack([item[name] for item in items])[:, :longest] for name in items[0]}

    torch.manual_seed(0)
    model, rows = gpt2(attn_implementation=masks), Rows("causal")
    plain = copy.deepcopy(model)
    trainer(model, rows, privacy={"noise_multiplier": 0.0}, max_steps=3, given={"data_collator": collate}).train()
    assert_same(weights(model), one_by_one(plain, rows, lambda m, e: m(**e).loss, linear(3)), 1e-5)


@pytest.mark.full
def test_a_padding_example(trainer: Any) -> None:
    filling = {"input_ids": torch.ones(1).long(), "attention_mask": torch.ones(1).long(), "labels": torch.tensor(0)}
    with_one, without = tiny(), tiny()
    run = trainer(with_one, Rows("classes"), privacy={"padding_example": filling})
    run.train()
    other = trainer(without, Rows("classes"))
    other.train()
    assert_same(weights(with_one), weights(without), 1e-6)
    shown = [[entry["loss"] for entry in r.state.log_history if "loss" in entry] for r in (run, other)]
    assert shown[0] == pytest.approx(shown[1], abs=1e-6)


def test_adapters(trainer: Any, tmp_path: pathlib.Path) -> None:
    peft = pytest.importorskip("peft")
    base, rows = model_and_rows("llama")
    frozen = weights(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    run = trainer(model, rows, max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
                  load_best_model_at_end=True, given={"eval_dataset": Rows("causal", 8)})  # fmt: skip
    run.train()
    again = peft.PeftModel.from_pretrained(model_and_rows("llama")[0], run.state.best_model_checkpoint)
    assert_same(weights(again), weights(model))
    of_base = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in weights(model).items()}
    assert all(torch.equal(p, of_base[name]) for name, p in frozen.items())
    assert any(bool(p.any()) for name, p in weights(model).items() if "lora_B" in name)


@pytest.mark.full
def test_activation_checkpointing(trainer: Any) -> None:
    held, again = model_and_rows("llama")[0], model_and_rows("llama")[0]
    trainer(held, Rows("causal"), max_steps=2).train()
    name = "activation_checkpointing"
    if name not in {field.name for field in dataclasses.fields(TrainingArguments)}:
        name = "gradient_checkpointing"
    trainer(again, Rows("causal"), max_steps=2, **{name: True}).train()
    assert_same(weights(again), weights(held), 1e-6)


@pytest.mark.parametrize("optim", ["adafactor", "adamw_torch_fused", "rmsprop"])
def test_other_optimizers(optim: str, trainer: Any) -> None:
    run = trainer(tiny(), Rows("classes"), optim=optim, learning_rate=0.01, lr_scheduler_type="cosine", warmup_steps=2)
    run.train()
    assert run._private.optimizer.logical_step == 6
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-8)


@pytest.mark.full
def test_a_sequence_to_sequence_trainer(trainer: Any, tmp_path: pathlib.Path) -> None:
    ours, theirs = model_and_rows("t5")[0], model_and_rows("t5")[0]
    trainer(theirs, Rows("translation"), max_steps=1).train()
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1, "optim": "sgd"}
    args = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), learning_rate=0.5, use_cpu=True, report_to=[], predict_with_generate=True, disable_tqdm=True,
        generation_max_length=4, **arguments,
    )  # fmt: skip
    privacy = PrivacyArguments(noise_multiplier=1.0, target_delta=1e-3, backend="eager", noise_seed=5)
    run = DPSeq2SeqTrainer(
        ours, args, train_dataset=Rows("translation"), eval_dataset=Rows("translation", 4), privacy=privacy
    )
    run.train()
    assert_same(weights(ours), weights(theirs))
    assert len(run.predict(Rows("translation", 4)).predictions) == 4


@pytest.mark.full  # a launch of two ranks
@pytest.mark.parametrize(
    "names",
    [
        ("sharded_weights", "refused"),
        pytest.param(("resumed", "adapters", "twice"), marks=pytest.mark.slow),
    ],
)
def test_two_ranks_by_fsdp(names: tuple[str, ...]) -> None:
    """Weights, also resumed, are those of our own loop in one process."""
    assert passed(launch(2, "trainer_worker.py", *names)) == set(names)


@pytest.mark.slow
def test_activation_checkpointing_by_fsdp() -> None:
    assert passed(launch(2, "trainer_worker.py", "activation_checkpointing")) == {"activation_checkpointing"}


@pytest.mark.full  # a launch of two ranks
def test_two_ranks_by_replicas() -> None:
    assert passed(launch(2, "trainer_worker.py", "replica_weights")) == {"replica_weights"}


def test_the_table_of_the_page_names_its_tests() -> None:
    page = (pathlib.Path(__file__).parents[2] / "docs/frameworks.md").read_text()
    section = page.partition("## Transformers\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (works|refused)(.*?) \| `(\w+)` \|$", section, re.MULTILINE)
    assert len(rows) == section.count("\n| ") - 1  # but for the head
    for feature, _, _, test in rows:
        assert test in globals(), f"{feature}: there is no {test}"
    refused = " ".join(feature for feature, outcome, _, _ in rows if outcome == "refused")
    for argument in REFUSED:
        assert argument.name in refused, argument.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classes", "gpt2"])
def test_through_inductor(name: str, trainer: Any) -> None:
    model, rows = model_and_rows(name)
    eager, _ = model_and_rows(name)
    trainer(eager, rows, max_steps=2).train()
    trainer(model, rows, max_steps=2, privacy={"backend": "inductor"}).train()
    assert_same(weights(model), weights(eager), 1e-5)
