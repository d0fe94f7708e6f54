"""Image and video models of Hugging Face Transformers: transformers, convolutional nets, two modalities."""

from __future__ import annotations

import functools
from typing import Any

import torch

from models.case import Call, V
from models.pretrained import case

SIZE = 8
BRANCHES = "branches on the values of tensors"
SMALL: dict[str, Any] = {
    "image_size": SIZE, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 12,
}  # fmt: skip


def images(n: int, size: int = SIZE) -> Call:
    return (), {"pixel_values": torch.randn(n, 3, size, size)}


def patches(n: int) -> Call:
    """Images, and the numbers that decide which patches are masked."""
    return (), {"pixel_values": torch.randn(n, 3, SIZE, SIZE), "noise": torch.rand(n, 4)}


def perceived(n: int) -> Call:
    return (), {"inputs": torch.randn(n, 3, SIZE, SIZE)}


def videos(n: int) -> Call:
    return (), {"pixel_values": torch.randn(n, 2, 3, SIZE, SIZE)}


def captions(n: int) -> Call:
    return (), {"input_ids": torch.randint(2, V, (n, 5))}


def pairs(n: int) -> Call:
    return (), images(n)[1] | captions(n)[1]


images16, images32, images64 = (functools.partial(images, size=size) for size in (16, 32, 64))
vision = functools.partial(case, __name__)

# fmt: off
# --- transformers -----------------------------------------------------------------------------------------------------

vision("ViTForImageClassification", images, quick=True, **SMALL)
vision("ViTForImageClassification", images, "ViTEager", attn_implementation="eager", train=False, **SMALL)
vision("DeiTForImageClassification", images, **SMALL)
vision("BeitForImageClassification", images, use_relative_position_bias=True, layer_scale_init_value=0.1, **SMALL)
vision("BeitForImageClassification", images, "BeitSharedBias", use_shared_relative_position_bias=True,
       use_mean_pooling=False, **SMALL)
vision("Dinov2ForImageClassification", images, mlp_ratio=2, **SMALL)
vision("Dinov2WithRegistersForImageClassification", images, mlp_ratio=2, num_register_tokens=2, **SMALL)
vision("ViTMSNForImageClassification", images, **SMALL)
vision("SwinForImageClassification", images, patch_size=2, image_size=SIZE, embed_dim=8, depths=[2, 1],
       num_heads=[2, 2], window_size=2)
vision("Swinv2ForImageClassification", images, patch_size=2, image_size=SIZE, embed_dim=8, depths=[2, 1],
       num_heads=[2, 2], window_size=2)
PYRAMID: dict[str, Any] = {
    "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 8], "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2], "strides": [2, 2], "patch_sizes": [3, 3], "sr_ratios": [2, 1],
}
vision("PvtForImageClassification", images32, image_size=32, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8],
       num_attention_heads=[1, 1, 2, 2], mlp_ratios=[1, 1, 1, 1], sequence_reduction_ratios=[2, 2, 1, 1])
vision("PvtV2ForImageClassification", images16, image_size=16, **PYRAMID)
vision("SegformerForImageClassification", images16, **PYRAMID)
vision("SegformerForSemanticSegmentation", images16, train=False, called=True, decoder_hidden_size=8, **PYRAMID)
vision("VideoMAEForVideoClassification", videos, num_frames=2, tubelet_size=2, **SMALL)
vision("TimesformerForVideoClassification", videos, num_frames=2, refused="it picks out some of the examples",
       reason="takes the class token from the first frames of the batch", **SMALL)
vision("VivitForVideoClassification", videos, num_frames=2, tubelet_size=[2, 4, 4], **SMALL)
vision("HieraForImageClassification", images16, image_size=[16, 16], patch_size=[3, 3], patch_stride=[2, 2],
       patch_padding=[1, 1], embed_dim=8, depths=[1, 1], num_heads=[1, 2], masked_unit_size=[2, 2],
       query_stride=[2, 2], num_query_pool=1)
vision("PerceiverForImageClassificationLearned", perceived, image_size=SIZE, num_latents=3, d_latents=8, num_blocks=1,
       num_self_attends_per_block=2, num_self_attention_heads=2, num_cross_attention_heads=1, refused=BRANCHES,
       reason="computes a shape with NumPy")
vision("YolosForObjectDetection", images, num_detection_tokens=2, **SMALL | {"image_size": [SIZE, SIZE]})
vision("ImageGPTForImageClassification", captions, vocab_size=V, n_embd=8, n_layer=2, n_head=2, n_positions=16)
vision("ViltForQuestionAnswering", pairs, vocab_size=V, max_position_embeddings=16, refused=BRANCHES,
       reason="sizes of images are values of masks", **SMALL)
MAE: dict[str, Any] = SMALL | {
    "mask_ratio": 0.5, "decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 12,
}
vision("ViTMAEModel", patches, **MAE)
vision("ViTMAEForPreTraining", patches, refused="`div` mixes examples",
       reason="its own loss is divided by a count over the batch", **MAE)

# --- convolutions -----------------------------------------------------------------------------------------------------

STAGES: dict[str, Any] = {"depths": [1, 1], "hidden_sizes": [8, 8]}
RESNET = STAGES | {"embedding_size": 8}
vision("ConvNextForImageClassification", images16, quick=True, num_stages=2, patch_size=2, **STAGES)
vision("ConvNextV2ForImageClassification", images16, num_stages=2, patch_size=2, **STAGES)
vision("BitForImageClassification", images16, num_groups=2, **RESNET)
vision("ResNetForImageClassification", images16, train=False, **RESNET)
vision("ResNetForImageClassification", images16, "ResNetTraining", refused="BatchNorm2d in training mode",
       reason="BatchNorm in training", **RESNET)
vision("RegNetForImageClassification", images16, train=False, groups_width=4, **RESNET)
vision("EfficientNetForImageClassification", images16, train=False, width_coefficient=0.25, depth_coefficient=0.1,
       hidden_dim=320, in_channels=[32, 16], out_channels=[16, 24], kernel_sizes=[3, 3], strides=[1, 2],
       num_block_repeats=[1, 1], expand_ratios=[1, 2], depthwise_padding=[])
vision("MobileViTV2ForImageClassification", images64, train=False, image_size=64, width_multiplier=0.125,
       n_attn_blocks=[1, 1, 1], base_attn_unit_dims=[8, 8, 8])
vision("PoolFormerForImageClassification", images16, patch_sizes=[3, 3], strides=[2, 2], padding=[1, 1],
       num_encoder_blocks=2, mlp_ratio=2.0, **STAGES)
vision("FocalNetForImageClassification", images16, image_size=16, patch_size=2, embed_dim=8, focal_levels=[1, 1],
       focal_windows=[3, 3], use_layerscale=True, **STAGES)

# --- detection, two modalities ----------------------------------------------------------------------------------------

vision("ConditionalDetrForObjectDetection", images32, train=False, use_timm_backbone=False, backbone=None,
       use_pretrained_backbone=False, backbone_config={"model_type": "resnet", "out_features": ["stage2"], **RESNET},
       num_queries=3, d_model=8, encoder_layers=1, decoder_layers=1,
       encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12)
TEXT: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}
vision("CLIPTextModelWithProjection", captions, projection_dim=6, **TEXT)
vision("CLIPVisionModelWithProjection", images, projection_dim=6, **SMALL)
vision("CLIPModel", pairs, text_config=TEXT, vision_config=SMALL, projection_dim=6,
       refused="it multiplies every example with every other one", reason="compares every image with every text")
vision("SiglipVisionModel", images, **SMALL)
vision("BlipForImageTextRetrieval", pairs, text_config=TEXT | {"encoder_hidden_size": 8}, vision_config=SMALL,
       projection_dim=6, image_text_hidden_size=6)
