"""Models of Transformers as they are trained: with dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import PseudoLoss, train_step

import dpcompile

pytest.importorskip("transformers")
from models.language import DECODER, ENCODER, GPT2, padded
from models.pretrained import build
from models.speech import SMALL as SPEECH
from models.speech import waves
from models.vision import SMALL as VISION
from models.vision import images

dp_compile: Any = dpcompile.dp_compile

MODELS = {
    "GPT2LMHeadModel": (GPT2, padded),
    "GPTNeoXForCausalLM": (DECODER, padded),
    "BertForSequenceClassification": (ENCODER, padded),
    "ViTForImageClassification": (VISION, images),
    "Wav2Vec2ForCTC": (SPEECH, waves),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", MODELS)
def test_dropout_is_no_reason_to_refuse(architecture: str, attention: str) -> None:
    config, inputs = MODELS[architecture]
    model = build(architecture, dropout=0.3, attn_implementation=attention, **config)
    private = dp_compile(model, max_grad_norm=0.5, backend="eager", dynamic=False)
    args, kwargs = inputs(4)
    train_step(private, args, kwargs, PseudoLoss(4))
    assert torch.isfinite(private.grad_norms).all() and (private.grad_norms > 0).all()
    sums = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert 0 < sums <= 4 * 0.5 * 1.001
