"""Parameter-efficient fine-tuning with PEFT on Hugging Face models and on a plain module; nothing without them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.case import D, T, V
from models.parts import layer

AVAILABLE = all(importlib.util.find_spec(name) for name in ("peft", "transformers"))


class Plain(nn.Module):
    """What is adapted where there is no Hugging Face model."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(V, D), nn.Conv1d(D, D, 3, padding=1)
        self.q, self.v, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.table(ids).mT).mT
        return self.head(self.q(x).relu() + self.v(x).tanh())


def hugging_face(kind: str) -> nn.Module:
    import transformers

    small: dict[str, Any] = {"vocab_size": V, "attn_implementation": "eager"}
    if kind == "Llama":
        config = transformers.LlamaConfig(
            hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0, **small
        )
        return transformers.LlamaForCausalLM(config)
    if kind == "GPT2":
        config = transformers.GPT2Config(
            n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0, **small
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.BertConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        **small,
    )
    return transformers.BertForSequenceClassification(config)


def adapted(name: str, base: Callable[[], nn.Module], method: str, prepare: Any = None, **config: Any) -> None:
    """A base model with a PEFT method; LoRA's second factor is drawn, or the first would have no gradient."""
    options = {k: config.pop(k) for k in ("slow", "refused", "reason", "tolerance") if k in config}

    def make() -> nn.Module:
        import peft  # type: ignore[import-not-found]

        model: Any = peft.get_peft_model(base(), getattr(peft, method)(**config))  # type: ignore[arg-type]
        for key, p in model.named_parameters():
            if "lora_B" in key or "lora_embedding_A" in key or "vera_lambda" in key:
                nn.init.normal_(p, std=0.3)
        return model.eval() if prepare is None else prepare(model)

    layer(name, lambda n: ((torch.randint(1, V, (n, T)),), {}), make, **options)


if AVAILABLE:
    QV, LLAMA = ["q", "v"], ["q_proj", "v_proj"]
    adapted("PEFT-LoRA", Plain, "LoraConfig", r=2, target_modules=[*QV, "conv", "table"])
    adapted("PEFT-LoRA-biases", Plain, "LoraConfig", r=2, target_modules=QV, bias="all", modules_to_save=["head"])
    adapted("PEFT-rsLoRA", Plain, "LoraConfig", r=2, target_modules=QV, use_rslora=True, slow=True)
    adapted("PEFT-IA3", Plain, "IA3Config", target_modules=QV, feedforward_modules=["q"])
    adapted("PEFT-AdaLoRA", Plain, "AdaLoraConfig", init_r=3, target_r=2, total_step=10, target_modules=QV)
    adapted("PEFT-LoHa", Plain, "LoHaConfig", r=2, target_modules=[*QV, "conv"], slow=True)
    adapted("PEFT-LoKr", Plain, "LoKrConfig", r=2, target_modules=QV, slow=True)
    adapted("PEFT-OFT", Plain, "OFTConfig", r=0, oft_block_size=2, target_modules=QV, slow=True)
    adapted("PEFT-VeRA", Plain, "VeraConfig", r=2, target_modules=QV, slow=True)
    adapted(
        "PEFT-LNTuning",
        lambda: hugging_face("BERT"),
        "LNTuningConfig",
        target_modules=["LayerNorm"],
        task_type="SEQ_CLS",
        slow=True,
    )
    adapted(
        "PEFT-LoRA-Llama", lambda: hugging_face("Llama"), "LoraConfig", r=2, target_modules=LLAMA, task_type="CAUSAL_LM"
    )
    adapted(
        "PEFT-LoRA-GPT2",
        lambda: hugging_face("GPT2"),
        "LoraConfig",
        r=2,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    adapted(
        "PEFT-LoRA-BERT", lambda: hugging_face("BERT"), "LoraConfig", r=2, target_modules=["query"], task_type="SEQ_CLS"
    )
    adapted(
        "PEFT-IA3-Llama",
        lambda: hugging_face("Llama"),
        "IA3Config",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
        slow=True,
    )
    adapted(
        "PEFT-prompt", lambda: hugging_face("GPT2"), "PromptTuningConfig", num_virtual_tokens=2, task_type="CAUSAL_LM"
    )
    adapted(
        "PEFT-p-tuning",
        lambda: hugging_face("GPT2"),
        "PromptEncoderConfig",
        num_virtual_tokens=2,
        encoder_hidden_size=4,
        task_type="CAUSAL_LM",
    )
    adapted(
        "PEFT-prefix", lambda: hugging_face("GPT2"), "PrefixTuningConfig", num_virtual_tokens=2, task_type="CAUSAL_LM"
    )
    adapted(
        "PEFT-prefix-Llama",
        lambda: hugging_face("Llama"),
        "PrefixTuningConfig",
        num_virtual_tokens=2,
        task_type="CAUSAL_LM",
        slow=True,
    )
