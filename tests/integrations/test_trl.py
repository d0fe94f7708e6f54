"""TRL's trainers: weights are those of our own loop and of one backward per example, by TRL's own losses."""

from __future__ import annotations

import copy
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from launching import launch, passed  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.pre_tokenizers import Whitespace  # noqa: E402

from dpcompile import DPCompileError, PoissonLoader, PrivacyError, make_private  # noqa: E402
from dpcompile.integrations.transformers import DPTrainer, DPTrainerMixin  # noqa: E402
from dpcompile.integrations.trl import DPDPOTrainer, DPSFTTrainer, PrivacyArguments  # noqa: E402
from dpcompile.integrations.trl.refusals import REFUSED  # noqa: E402
from dpcompile.losses import per_example_causal_lm  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),  # TRL's own default
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:two DPOptimizers of one seed"),
]

WORDS = ["[PAD]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(17))]
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}w0 {% generation %}{{ m['content'] }} w1 "
    "{% endgeneration %}{% else %}w2 {{ m['content'] }} {% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL counts its trainers, but not in CI."""
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    datasets.disable_progress_bars()


def tokenizer() -> Any:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    special = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, chat_template=CHAT, **special)


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    tokens: dict[str, Any] = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(hidden_size=8, intermediate_size=16, **heads, **tokens)
    )


def adapter(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def texts(kind: str, count: int = 24, seed: int = 0) -> Any:
    """Rows of 2 to 5 words in each part."""
    generator = torch.Generator().manual_seed(seed)

    def text() -> str:
        length = int(torch.randint(2, 6, (), generator=generator))
        return " ".join(f"w{i}" for i in torch.randint(3, 17, (length,), generator=generator).tolist())

    def said(role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text()}]

    makes: dict[str, Callable[[], dict[str, Any]]] = {
        "text": lambda: {"text": text()},
        "completion": lambda: {"prompt": text() + " ", "completion": text()},
        "chat": lambda: {"messages": said("user") + said("assistant") + said("user") + said("assistant")},
        "pairs": lambda: {"prompt": text() + " ", "chosen": text(), "rejected": text()},
    }
    return datasets.Dataset.from_list([makes[kind]() for _ in range(count)])


PRIVACY = {"noise_multiplier": 1.0, "target_delta": 1e-3, "backend": "eager", "noise_seed": 5}


@pytest.fixture
def trainer(tmp_path: pathlib.Path) -> Callable[..., Any]:
    """Plain SGD, 4 examples to a forward and 8 to a draw of 24; sequences are of one length, so one graph is enough."""

    def make(kind: Any, model: Any, rows: Any, *, privacy: Any = None, given: Any = None, **options: Any) -> Any:
        config = trl.DPOConfig if issubclass(kind, trl.DPOTrainer) else trl.SFTConfig
        arguments: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 2,
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "bf16": False,
            "use_cpu": True,
            "report_to": [],
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "pad_to_multiple_of": 16,
        } | options
        kwargs = (
            {} if not issubclass(kind, DPTrainerMixin) else {"privacy": PrivacyArguments(**PRIVACY | (privacy or {}))}
        )
        return kind(model, args=config(**arguments), train_dataset=rows, processing_class=tokenizer(),
                    **kwargs, **(given or {}))  # fmt: skip

    return make


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def drawn(rows: Any, steps: int, seed: int = 5, size: int = 8) -> Iterator[list[Any]]:
    """The examples of each draw, from a loader of its own."""
    loader = PoissonLoader(list(range(len(rows))), expected_batch_size=size, physical_batch_size=4, seed=seed)
    found: list[int] = []
    while steps:
        for batch in loader.batches():
            found += batch.data[batch.mask].tolist()
            if batch.ends_step:
                yield [rows[i] for i in found]
                found, steps = [], steps - 1
                if not steps:
                    return


def one_by_one(model: nn.Module, rows: Any, loss: Callable[[Any], Tensor], steps: int = 2) -> dict[str, Tensor]:
    """Slow and plain: one backward for each example, of a batch that holds it alone; no noise."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for examples in drawn(rows, steps):
        total = [torch.zeros_like(p) for p in parameters]
        for example in examples:
            slopes = torch.autograd.grad(loss(example), parameters)
            norm = torch.stack([g.double().square().sum() for g in slopes]).sum().sqrt()
            for t, g in zip(total, slopes, strict=True):
                t += g * min(1.0, 1.0 / float(norm))
        with torch.no_grad():
            for p, t in zip(parameters, total, strict=True):
                p -= 0.5 * t / 8
    return weights(model)


def by_trl(plain: Any) -> Callable[[Any], Tensor]:
    """The loss that TRL's own trainer computes for a batch of one."""

    def loss(example: Any) -> Tensor:
        return plain.compute_loss(plain.model, plain.data_collator([example]))

    return loss


# --- SFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("completion", {}),
        ("text", {"loss_type": "dft"}),
        pytest.param("chat", {"assistant_only_loss": True, "gradient_checkpointing": False}, marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_sft_is_one_backward_per_example(kind: str, options: dict[str, Any], trainer: Any) -> None:
    rows = texts(kind)
    run = trainer(DPSFTTrainer, llama(), rows, privacy={"noise_multiplier": 0.0}, **options)
    run.train()
    plain = trainer(trl.SFTTrainer, llama(), rows, **options)
    labels = [row["labels"] for row in plain.train_dataset]
    assert any(-100 in row for row in labels) == (kind != "text") and len({len(row) for row in labels}) > 2
    assert_same(weights(run.model), one_by_one(plain.model, plain.train_dataset, by_trl(plain)), 1e-5)
    assert run.state.global_step == run._private.optimizer.logical_step == 2


def test_sft_is_our_own_loop(trainer: Any) -> None:
    """With noise, adapters, AdamW and TRL's own defaults: bfloat16 and checkpoints. To the last bit."""
    peft = pytest.importorskip("peft")
    rows, base = texts("completion"), llama()
    options = {"optim": "adamw_torch", "learning_rate": 0.01, "max_grad_norm": 0.7, "bf16": True}
    run = trainer(DPSFTTrainer, llama(), rows, given={"peft_config": adapter()}, **options)
    plain: Any = peft.get_peft_model(llama(), adapter())
    plain.load_state_dict(run.model.state_dict())
    run.train()

    private, optimizer, loader = make_private(
        plain, torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0),
        DataLoader(run.train_dataset.select_columns(["input_ids", "labels"]), 8, collate_fn=run.data_collator),
        noise_multiplier=1.0, physical_batch_size=4, seed=5, max_grad_norm=0.7, backend="eager",
    )  # fmt: skip
    for batch in loader.parts():
        last, labels = not optimizer.accumulating, batch.pop("labels")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = per_example_causal_lm(private(**batch).logits, labels).mean()
        loss.backward()
        optimizer.step()
        if last:
            optimizer.zero_grad()
            if optimizer.logical_step == 2:
                break
    assert_same(weights(run.model), weights(plain))
    assert run.epsilon == optimizer.accountant.epsilon(1e-3)  # type: ignore[union-attr]
    frozen = weights(run.model.get_base_model())
    assert isinstance(run.model, peft.PeftModel)
    assert all(torch.equal(p, frozen[n]) for n, p in weights(base).items() if n in frozen and "proj" not in n)


@pytest.mark.full
def test_sft_resumed_evaluated_and_saved(trainer: Any, tmp_path: pathlib.Path) -> None:
    rows, held_out = texts("text"), texts("text", 6, seed=1)
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    given = {"eval_dataset": held_out}
    whole = trainer(DPSFTTrainer, llama(), rows, given=given, **options)
    whole.train()
    folder = tmp_path / "run" / "checkpoint-1"
    again = trainer(DPSFTTrainer, llama(), rows, given=given, privacy={"noise_seed": None}, **options)
    again.train(str(folder))
    assert_same(weights(again.model), weights(whole.model))
    assert again.epsilon == whole.epsilon
    shown = [key for entry in whole.state.log_history if "loss" in entry for key in entry]
    assert "epsilon" in shown and not any("entropy" in key or "accuracy" in key or "tokens" in key for key in shown)
    evaluated = [entry for entry in whole.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 3 and evaluated[-1]["eval_mean_token_accuracy"] >= 0
    plain = trainer(trl.SFTTrainer, whole.model, rows, given=given)
    assert plain.evaluate()["eval_loss"] == pytest.approx(evaluated[-1]["eval_loss"], abs=1e-6)
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert_same(weights(saved), weights(whole.model))


@pytest.mark.full
def test_a_model_by_its_name(trainer: Any, tmp_path: pathlib.Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = texts("text")
    run = trainer(DPSFTTrainer, str(tmp_path / "model"), rows, max_steps=1, model_init_kwargs={"dtype": "bfloat16"})
    run.train()
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}
    assert not torch.equal(run.model.lm_head.weight, llama().lm_head.weight.bfloat16())


# --- DPO -------------------------------------------------------------------------------------------------------------


def with_adapter() -> Any:
    """A model whose adapter was trained already: the reference is a frozen copy of it."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), adapter(init_lora_weights=False))
    assert any(bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n)
    return model


DPO: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    "a reference model": (llama, {"beta": 0.5}, {"ref_model": True}),
    "precomputed": (llama, {"precompute_ref_log_probs": True, "loss_type": ["ipo", "sft"], "ld_alpha": 0.5}, {}),
    "adapters switched off": (
        llama,
        {"loss_type": "robust", "label_smoothing": 0.1, "beta": 2.0},
        {"peft_config": True},
    ),
    "an adapter before": (with_adapter, {"loss_type": ["nca_pair", "apo_down"], "use_weighting": True}, {}),
}


@pytest.mark.parametrize(
    "name",
    [name if i < 2 else pytest.param(name, marks=pytest.mark.full) for i, name in enumerate(DPO)],
)
def test_dpo_is_one_backward_per_pair(name: str, trainer: Any) -> None:
    """Of TRL's own loss of the pair, through its own fused head, against its own reference."""
    make, options, parts = DPO[name]

    def given() -> dict[str, Any]:
        own: dict[str, Any] = {"ref_model": llama(3)} if "ref_model" in parts else {}
        return own | ({"peft_config": adapter()} if "peft_config" in parts else {})

    rows = texts("pairs")
    torch.manual_seed(0)
    run = trainer(DPDPOTrainer, make(), rows, privacy={"noise_multiplier": 0.0}, given=given(), **options)
    before = copy.deepcopy(run.model.state_dict())
    run.train()
    plain = trainer(trl.DPOTrainer, make(), rows, given=given(), **options)
    plain.model.load_state_dict(before)
    reference = one_by_one(plain.model, plain.train_dataset, by_trl(plain))
    assert_same(weights(run.model), reference, 1e-5)
    moved = [n for n, p in weights(run.model).items() if not torch.equal(p, before[n])]
    assert moved and (all("lora" in n and ".ref." not in n for n in moved) or not hasattr(run.model, "peft_config"))
    assert run._private.optimizer.logical_step == 2


class Both(nn.Module):
    """Our own: the log-probabilities of both answers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, answer: Tensor) -> Tensor:
        logits = self.model(input_ids=ids.flatten(0, 1), attention_mask=mask.flatten(0, 1)).logits
        chances = logits[:, :-1].log_softmax(-1).gather(-1, ids.flatten(0, 1)[:, 1:, None])
        return (chances.squeeze(-1) * answer.flatten(0, 1)[:, 1:]).sum(1).unflatten(0, (-1, 2))


def test_dpo_is_our_own_loop(trainer: Any) -> None:
    """With noise, checkpoints and AdamW."""
    options = {"optim": "adamw_torch", "learning_rate": 0.01, "max_grad_norm": 0.3, "beta": 0.5}
    reference = llama(3)
    run = trainer(DPDPOTrainer, llama(), texts("pairs"), given={"ref_model": copy.deepcopy(reference)}, **options)
    run.train()

    def collate(items: list[Any]) -> tuple[Tensor, ...]:
        found = []
        for answer in ("chosen_ids", "rejected_ids"):
            ids = [torch.tensor(item["prompt_ids"] + item[answer]) for item in items]
            marks = [torch.arange(len(i)) >= len(item["prompt_ids"]) for i, item in zip(ids, items, strict=True)]
            padded = nn.utils.rnn.pad_sequence([*ids, torch.zeros(16).long()], batch_first=True)[:-1]
            mask = nn.utils.rnn.pad_sequence([*(torch.ones_like(i) for i in ids), torch.zeros(16).long()], True)[:-1]
            asked = nn.utils.rnn.pad_sequence([*(m.long() for m in marks), torch.zeros(16).long()], True)[:-1]
            found.append((padded, mask, asked))
        return tuple(torch.stack(both, 1) for both in zip(*found, strict=True))

    plain = Both(llama())
    private, optimizer, loader = make_private(
        plain, torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0),
        DataLoader(run.train_dataset, batch_size=8, collate_fn=collate), noise_multiplier=1.0, physical_batch_size=4,
        seed=5, max_grad_norm=0.3, backend="eager",
    )  # fmt: skip
    for batch in loader.parts():
        last = not optimizer.accumulating
        with torch.no_grad():
            start = Both(reference)(*batch)
        ratio = private(*batch) - start
        (-nn.functional.logsigmoid(0.5 * (ratio[:, 0] - ratio[:, 1]))).mean().backward()
        optimizer.step()
        if last:
            optimizer.zero_grad()
            if optimizer.logical_step == 2:
                break
    assert_same(weights(run.model), weights(plain.model), 1e-6)
    assert run.epsilon == optimizer.accountant.epsilon(1e-3)  # type: ignore[union-attr]


@pytest.mark.full
def test_dpo_resumed_evaluated_and_saved(trainer: Any, tmp_path: pathlib.Path) -> None:
    """Adapters, whose reference is the model without them, and TRL's own defaults; evaluated between the steps."""
    rows = texts("pairs")
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    options |= {"bf16": True}

    def run() -> Any:
        given = {"eval_dataset": texts("pairs", 6, seed=1), "peft_config": adapter()}
        return trainer(DPDPOTrainer, llama(), rows, given=given, **options)

    whole = run()
    whole.train()
    again = run()
    again.train(str(tmp_path / "run" / "checkpoint-1"))
    assert_same(weights(again.model), weights(whole.model))
    assert again.epsilon == whole.epsilon
    entries = [entry for entry in whole.state.log_history if "loss" in entry]
    assert len(entries) == 3 and all(not any("/" in key or "entropy" in key for key in entry) for entry in entries)
    evaluated = [entry for entry in whole.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 3 and "eval_rewards/margins" in evaluated[0] and not evaluated[0]["eval_num_tokens"]
    assert any(bool(p.any()) for name, p in whole.model.named_parameters() if "lora_B" in name)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DPSFTTrainer, {"packing": True}, "packing=True in SFTConfig: a row would hold several examples"),
        (DPSFTTrainer, {"padding_free": True, "max_length": None}, "all examples would lie in one row"),
        (DPSFTTrainer, {"activation_offloading": True}, "the compiled graph does not call"),
        (DPDPOTrainer, {"loss_type": ["sigmoid", "aot"]}, r"loss_type=['sigmoid', 'aot'] in DPOConfig: it sorts"),
        (DPDPOTrainer, {"sync_ref_model": True}, "would go on with another"),
        (DPSFTTrainer, {"max_grad_norm": 0.0}, "it is C"),
        (DPSFTTrainer, {"use_liger_kernel": True}, "fused loss"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(kind: Any, options: dict[str, Any], message: str, trainer: Any) -> None:
    rows = texts("pairs" if kind is DPDPOTrainer else "text", 4)
    with pytest.raises(PrivacyError, match=re.escape(message)) as refusal:
        trainer(kind, llama(), rows, **options)
    assert refusal.value.remedy
    run = trainer(kind, llama(), rows, given={"ref_model": llama()} if kind is DPDPOTrainer else None)
    (name,) = list(options)[:1]
    setattr(run.args, name, options[name])
    with pytest.raises(PrivacyError, match=re.escape(message)):
        run.train()


def test_datasets_and_functions_that_are_refused(trainer: Any) -> None:
    rows = texts("text", 4)
    packed = datasets.Dataset.from_dict({"input_ids": [[3, 4, 5, 6]] * 4, "seq_lengths": [[2, 2]] * 4})
    with pytest.raises(PrivacyError, match="the dataset was packed"):
        trainer(DPSFTTrainer, llama(), packed, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    with pytest.raises(PrivacyError, match="TRL takes its result"), pytest.warns(FutureWarning):
        trainer(DPSFTTrainer, llama(), rows, given={"compute_loss_func": lambda *_, **__: 0})

    class Mine(DPDPOTrainer):
        def per_example_loss(self, outputs: Any, labels: Any) -> Tensor:
            raise NotImplementedError

    with pytest.raises(PrivacyError, match="it would not be called"):
        trainer(Mine, llama(), texts("pairs", 4), given={"ref_model": llama()}).train()
    shares = llama(3)
    model = llama()
    shares.model.embed_tokens.weight = model.model.embed_tokens.weight
    with pytest.raises(PrivacyError, match=r"parameter 'model.embed_tokens.weight' of ref_model is one of the model"):
        trainer(DPDPOTrainer, model, texts("pairs", 4), given={"ref_model": shares})

    def three(items: Any) -> Any:
        return {"input_ids": torch.zeros(3 * len(items), 4).long()}

    with pytest.raises(PrivacyError, match=r"returns 'input_ids', \[\d+, 4\] for \d pairs"):
        trainer(DPDPOTrainer, llama(), texts("pairs", 8), given={"ref_model": llama(), "data_collator": three}).train()


def test_a_mixture_of_experts_balances_no_batch(trainer: Any) -> None:
    def mixtral() -> Any:
        config = transformers.MixtralConfig(
            vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=2, output_router_logits=True,
        )  # fmt: skip
        return transformers.MixtralForCausalLM(config)

    with pytest.raises(PrivacyError, match="load-balancing loss is on") as refusal:
        trainer(DPSFTTrainer, mixtral(), texts("text", 4))
    assert "router_aux_loss_coef=0.0 in SFTConfig" in (refusal.value.remedy or "")
    assert trainer(DPSFTTrainer, mixtral(), texts("text", 4), router_aux_loss_coef=0.0).aux_loss_enabled is False


@pytest.mark.parametrize("base", ["SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RewardTrainer"])
def test_the_mixin_by_hand_is_refused(base: str, trainer: Any) -> None:
    """What these do with a batch is not the Trainer's."""
    kind = type("Mine", (DPTrainerMixin, getattr(trl, base)), {})
    with pytest.raises(PrivacyError, match=f"Mine is made of trl's {base}") as refusal:
        kind(privacy=PrivacyArguments(**PRIVACY))
    assert "DPSFTTrainer" in (refusal.value.remedy or "")


def test_a_loss_that_is_not_that_of_the_logits(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(DPDPOTrainer, llama(), texts("pairs"), given={"ref_model": llama(3)}, max_steps=1)
    own = run._compute_loss
    monkeypatch.setattr(run, "_compute_loss", lambda model, *rest: own(model, *rest) + (model is run.model))
    with pytest.raises(DPCompileError, match="the loss of one pair is .* by TRL and .* from the logits of Llama"):
        run.train()


# --- datasets in the Trainer -----------------------------------------------------------------------------------------


def test_datasets_in_the_trainer(tmp_path: pathlib.Path) -> None:
    """Mapped and filtered, by functions of this file and lambdas, read by the workers of a loader."""
    words = tokenizer()

    def encode(rows: Any) -> Any:
        found = words(rows["text"], padding="max_length", max_length=8)
        return {**found, "labels": [[i if i else -100 for i in row] for row in found["input_ids"]]}

    rows = texts("text").filter(lambda row: len(row["text"]) > 0).map(encode, batched=True, remove_columns=["text"])

    def run(data: Any, workers: int) -> Any:
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=8, use_cpu=True, report_to=[], disable_tqdm=True,
            save_strategy="no", dataloader_num_workers=workers, dataloader_pin_memory=False,
        )  # fmt: skip
        model = llama()
        DPTrainer(model, args, train_dataset=data, privacy=PrivacyArguments(**PRIVACY)).train()
        return weights(model)

    keep = ("input_ids", "attention_mask", "labels")
    as_list = [{name: torch.tensor(row[name]) for name in keep} for row in rows]
    assert_same(run(rows, 2), run(as_list, 0))


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_names_its_tests() -> None:
    page = (pathlib.Path(__file__).parents[2] / "docs/frameworks.md").read_text()
    section = page.partition("## TRL\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (works|refused)(.*?) \| `(\w+)` \|$", section, re.MULTILINE)
    assert rows and len(rows) == section.count("\n| ") - 1
    for feature, _, _, test in rows:
        assert test in globals(), f"{feature}: there is no {test}"
    refused = " ".join(feature for feature, outcome, _, _ in rows if outcome == "refused")
    for argument in REFUSED:
        assert argument.name in refused, argument.name


@pytest.mark.slow
def test_sft_on_two_ranks() -> None:
    assert passed(launch(2, "trainer_worker.py", "sft")) == {"sft"}
