"""Speech and audio models of Hugging Face Transformers."""

from __future__ import annotations

import functools
from typing import Any

import torch

from models.case import Call, V
from models.pretrained import case

FEATURES = {"conv_dim": (8, 8), "conv_kernel": (4, 3), "conv_stride": (3, 2), "num_feat_extract_layers": 2}
SMALL: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "mask_time_prob": 0.0, **FEATURES
}  # fmt: skip


def waves(n: int, length: int = 40) -> Call:
    return (), {"input_values": torch.randn(n, length)}


def padded(n: int, length: int = 40) -> Call:
    lengths = torch.randint(20, length + 1, (n, 1))
    mask = (torch.arange(length) < lengths).long()
    return (), {"input_values": torch.randn(n, length) * mask, "attention_mask": mask}


def spectrograms(n: int) -> Call:
    return (), {"input_features": torch.randn(n, 8, 10), "decoder_input_ids": torch.randint(2, V, (n, 3))}


speech = functools.partial(case, __name__)

speech("Wav2Vec2ForCTC", waves, feat_extract_norm="group", **SMALL)
speech("Wav2Vec2ForCTC", padded, "Wav2Vec2Padded", feat_extract_norm="layer", do_stable_layer_norm=True, **SMALL)
speech("Wav2Vec2ForSequenceClassification", waves, classifier_proj_size=6, **SMALL)
speech("Wav2Vec2ForCTC", waves, "Wav2Vec2SpecAugment", feat_extract_norm="group", **SMALL | {"apply_spec_augment": True, "mask_time_prob": 0.3, "mask_time_length": 2})
speech("HubertForCTC", waves, feat_extract_norm="group", **SMALL)
speech("HubertForCTC", waves, "HubertBatchNorm", train=False, conv_pos_batch_norm=True, **SMALL)
speech("WavLMForCTC", waves, num_buckets=6, max_bucket_distance=8, **SMALL)
speech("UniSpeechForCTC", waves, **SMALL)
speech("SEWForCTC", waves, squeeze_factor=2, **SMALL)
speech("SEWDForCTC", waves, squeeze_factor=2, position_buckets=4, max_position_embeddings=16, **SMALL)
speech("Data2VecAudioForCTC", waves, conv_pos_kernel_size=3, num_conv_pos_embeddings_=1, **SMALL)
speech("Wav2Vec2ConformerForCTC", waves, train=False, conv_depthwise_kernel_size=3, **SMALL)
WHISPER = {"vocab_size": V, "num_mel_bins": 8, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_source_positions": 5, "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
speech("WhisperForConditionalGeneration", spectrograms, **WHISPER)
speech("WhisperForConditionalGeneration", spectrograms, "WhisperEager", attn_implementation="eager", **WHISPER)
speech("ASTForAudioClassification", lambda n: ((), {"input_values": torch.randn(n, 12, 8)}), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, patch_size=4, frequency_stride=4, time_stride=4, max_length=12, num_mel_bins=8)
speech("Speech2TextForConditionalGeneration", lambda n: ((), {"input_features": torch.randn(n, 12, 8), "decoder_input_ids": torch.randint(2, V, (n, 3))}), input_feat_per_channel=8, conv_channels=8, conv_kernel_sizes=[3], num_conv_layers=1, max_source_positions=16, **{k: v for k, v in WHISPER.items() if k not in ("num_mel_bins", "max_source_positions")})
speech("MoonshineForConditionalGeneration", lambda n: ((), {"input_values": torch.randn(n, 1000), "decoder_input_ids": torch.randint(2, V, (n, 3))}), vocab_size=V, hidden_size=8, intermediate_size=12, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1, encoder_num_attention_heads=2, decoder_num_attention_heads=2, max_position_embeddings=16, pad_token_id=0, bos_token_id=0, eos_token_id=1, decoder_start_token_id=0)
speech("ClapAudioModelWithProjection", lambda n: ((), {"input_features": torch.randn(n, 1, 32, 16), "is_longer": torch.zeros(n, 1, dtype=torch.bool)}), train=False, spec_size=32, num_mel_bins=16, patch_size=4, patch_stride=[4, 4], depths=[1, 1], num_attention_heads=[1, 2], patch_embeds_hidden_size=8, hidden_size=16, window_size=2, projection_dim=6, enable_fusion=False)
speech("Wav2Vec2BertForCTC", lambda n: ((), {"input_features": torch.randn(n, 6, 8)}), vocab_size=V, feature_projection_input_dim=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, apply_spec_augment=False, mask_time_prob=0.0, conv_depthwise_kernel_size=3)
