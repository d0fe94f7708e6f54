"""Speech and audio models of Hugging Face Transformers."""

from __future__ import annotations

import functools
from typing import Any

import torch

from models.case import Call, V
from models.pretrained import FIVE, case

# Before version 5 most of these drop whole layers by a comparison of random tensors, in training mode.
SMALL: dict[str, Any] = {
    "train": FIVE,
    "vocab_size": V, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
    "conv_dim": (8, 8), "conv_kernel": (4, 3), "conv_stride": (3, 2), "num_feat_extract_layers": 2,
}  # fmt: skip


def waves(n: int, length: int = 40) -> Call:
    return (), {"input_values": torch.randn(n, length)}


def padded(n: int, length: int = 40) -> Call:
    lengths = torch.randint(20, length + 1, (n, 1))
    mask = (torch.arange(length) < lengths).long()
    return (), {"input_values": torch.randn(n, length) * mask, "attention_mask": mask}


def masked(n: int) -> Call:
    return (), {"input_values": torch.randn(n, 40), "mask_time_indices": torch.rand(n, 6) < 0.4}


def spectra(n: int) -> Call:
    return (), {"input_features": torch.randn(n, 8, 10), "decoder_input_ids": torch.randint(2, V, (n, 3))}


def frames(n: int) -> Call:
    return (), {"input_features": torch.randn(n, 12, 8), "decoder_input_ids": torch.randint(2, V, (n, 3))}


def long_waves(n: int) -> Call:
    return (), {"input_values": torch.randn(n, 1000), "decoder_input_ids": torch.randint(2, V, (n, 3))}


def patches(n: int) -> Call:
    return (), {"input_values": torch.randn(n, 12, 8)}


def features(n: int) -> Call:
    return (), {"input_features": torch.randn(n, 6, 8)}


def fused(n: int) -> Call:
    return (), {"input_features": torch.randn(n, 1, 32, 16), "is_longer": torch.zeros(n, 1, dtype=torch.bool)}


speech = functools.partial(case, __name__)

# fmt: off
speech("Wav2Vec2ForCTC", waves, feat_extract_norm="group", **SMALL)
speech("Wav2Vec2ForCTC", padded, "Wav2Vec2Padded", feat_extract_norm="layer", do_stable_layer_norm=True, **SMALL)
speech("Wav2Vec2Model", masked, **SMALL | {"train": False, "apply_spec_augment": True})
speech("Wav2Vec2ForCTC", waves, "Wav2Vec2SpecAugment", mask_time_prob=0.3, mask_time_length=2,
       refused="branches on the values of tensors", reason="draws masks with NumPy",
       **SMALL | {"apply_spec_augment": True, "train": True})
speech("HubertForCTC", waves, feat_extract_norm="group", **SMALL)
speech("HubertForCTC", waves, "HubertBatchNorm", conv_pos_batch_norm=True, **SMALL | {"train": False})
speech("WavLMForCTC", waves, num_buckets=6, max_bucket_distance=8, **SMALL)
speech("SEWForCTC", waves, squeeze_factor=2, **SMALL)
speech("SEWDForCTC", waves, squeeze_factor=2, position_buckets=4, max_position_embeddings=16, **SMALL)
speech("Data2VecAudioForCTC", waves, conv_pos_kernel_size=3, **SMALL)
speech("Wav2Vec2ConformerForCTC", waves, conv_depthwise_kernel_size=3, **SMALL | {"train": False})
speech("Wav2Vec2BertForCTC", features, train=FIVE, vocab_size=V, feature_projection_input_dim=8, hidden_size=8,
       num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, apply_spec_augment=False,
       conv_depthwise_kernel_size=3)
DECODER: dict[str, Any] = {
    "vocab_size": V, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_target_positions": 8,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}
speech("WhisperForConditionalGeneration", spectra, train=FIVE, num_mel_bins=8, max_source_positions=5, **DECODER)
speech("WhisperForConditionalGeneration", spectra, "WhisperEager", attn_implementation="eager", train=False,
       num_mel_bins=8, max_source_positions=5, **DECODER)
speech("Speech2TextForConditionalGeneration", frames, train=FIVE, input_feat_per_channel=8, conv_channels=8,
       conv_kernel_sizes=[3], num_conv_layers=1, max_source_positions=16, **DECODER)
speech("MoonshineForConditionalGeneration", long_waves, vocab_size=V, hidden_size=8, intermediate_size=12,
       encoder_num_hidden_layers=1, decoder_num_hidden_layers=1, encoder_num_attention_heads=2,
       decoder_num_attention_heads=2, max_position_embeddings=16, pad_token_id=0, bos_token_id=0, eos_token_id=1,
       decoder_start_token_id=0)
speech("ASTForAudioClassification", patches, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
       intermediate_size=12, patch_size=4, frequency_stride=4, time_stride=4, max_length=12, num_mel_bins=8)
speech("ClapAudioModelWithProjection", fused, train=False, spec_size=32, num_mel_bins=16, patch_size=4,
       patch_stride=[4, 4], depths=[1, 1], num_attention_heads=[1, 2], patch_embeds_hidden_size=8, hidden_size=16,
       window_size=2, projection_dim=6, enable_fusion=False)
