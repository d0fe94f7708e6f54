"""Image and video models of Hugging Face Transformers: transformers, convolutional nets, towers of two modalities."""

from __future__ import annotations

import functools
from typing import Any

import torch

from models.case import Call, V
from models.pretrained import case

SIZE = 8
SMALL: dict[str, Any] = {
    "image_size": SIZE, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 12,
}  # fmt: skip


def images(n: int, size: int = SIZE) -> Call:
    return (), {"pixel_values": torch.randn(n, 3, size, size)}


def videos(n: int) -> Call:
    return (), {"pixel_values": torch.randn(n, 2, 3, SIZE, SIZE)}


def captions(n: int) -> Call:
    return (), {"input_ids": torch.randint(2, V, (n, 5))}


def pairs(n: int) -> Call:
    return (), images(n)[1] | captions(n)[1]


vision = functools.partial(case, __name__)

# --- transformers -----------------------------------------------------------------------------------------------------

vision("ViTForImageClassification", images, **SMALL)
vision("ViTForImageClassification", images, "ViTEager", attn_implementation="eager", **SMALL)
vision("DeiTForImageClassification", images, **SMALL)
vision("BeitForImageClassification", images, use_relative_position_bias=True, layer_scale_init_value=0.1, **SMALL)
vision("BeitForImageClassification", images, "BeitSharedBias", use_shared_relative_position_bias=True, use_mean_pooling=False, **SMALL)
vision("Data2VecVisionForImageClassification", images, use_relative_position_bias=True, **SMALL)
vision("Dinov2ForImageClassification", images, mlp_ratio=2, **SMALL)
vision("Dinov2WithRegistersForImageClassification", images, mlp_ratio=2, num_register_tokens=2, **SMALL)
vision("ViTMSNForImageClassification", images, **SMALL)
vision("IJepaForImageClassification", images, **SMALL)
vision("SwinForImageClassification", images, image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4)
vision("Swinv2ForImageClassification", images, image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4)
vision("PvtForImageClassification", images, image_size=16, patch_sizes=[2, 2], strides=[2, 2], num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 8], num_attention_heads=[1, 2], sequence_reduction_ratios=[2, 1], mlp_ratios=[2, 2])
vision("PvtV2ForImageClassification", functools.partial(images, size=16), image_size=16, patch_sizes=[3, 3], strides=[2, 2], num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 8], num_attention_heads=[1, 2], sr_ratios=[2, 1], mlp_ratios=[2, 2])
SEGFORMER = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 8], "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8}
vision("SegformerForImageClassification", functools.partial(images, size=16), **SEGFORMER)
vision("SegformerForSemanticSegmentation", functools.partial(images, size=16), train=False, **SEGFORMER)
vision("VideoMAEForVideoClassification", videos, num_frames=2, tubelet_size=2, **SMALL)
vision("TimesformerForVideoClassification", videos, num_frames=2, **SMALL)
vision("VivitForVideoClassification", videos, num_frames=2, tubelet_size=[2, 4, 4], **SMALL)
vision("HieraForImageClassification", functools.partial(images, size=16), image_size=[16, 16], patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1], embed_dim=8, depths=[1, 1], num_heads=[1, 2], masked_unit_size=[2, 2], query_stride=[2, 2], num_query_pool=1)
vision("PerceiverForImageClassificationLearned", functools.partial(lambda f, n: ((), {"inputs": f(n)[1]["pixel_values"]}), images), image_size=SIZE, num_latents=3, d_latents=8, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=2, num_cross_attention_heads=1)
vision("YolosForObjectDetection", images, num_detection_tokens=2, **SMALL | {"image_size": [SIZE, SIZE]})
vision("DPTForDepthEstimation", functools.partial(images, size=16), neck_hidden_sizes=[4, 4, 4, 4], backbone_out_indices=[0, 0, 1, 1], fusion_hidden_size=4, reassemble_factors=[4, 2, 1, 0.5], head_in_index=-1, **SMALL | {"image_size": 16})
vision("GLPNForDepthEstimation", functools.partial(images, size=32), num_encoder_blocks=4, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=4, train=False)
vision("ImageGPTForImageClassification", captions, vocab_size=V, n_embd=8, n_layer=2, n_head=2, n_positions=16)
vision("ViltForQuestionAnswering", pairs, vocab_size=V, max_position_embeddings=16, **SMALL)

# --- convolutions -----------------------------------------------------------------------------------------------------

vision("ConvNextForImageClassification", functools.partial(images, size=16), depths=[1, 1], hidden_sizes=[8, 8], num_stages=2, patch_size=2)
vision("ConvNextV2ForImageClassification", functools.partial(images, size=16), depths=[1, 1], hidden_sizes=[8, 8], num_stages=2, patch_size=2)
vision("BitForImageClassification", functools.partial(images, size=16), embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_groups=2)
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
vision("ResNetForImageClassification", functools.partial(images, size=16), train=False, **RESNET)
vision("ResNetForImageClassification", functools.partial(images, size=16), "ResNetTraining", refused="BatchNorm2d in training mode", reason="BatchNorm", **RESNET)
vision("RegNetForImageClassification", functools.partial(images, size=16), train=False, groups_width=4, **RESNET)
vision("EfficientNetForImageClassification", functools.partial(images, size=16), train=False, width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=16, in_channels=[8, 8], out_channels=[8, 8], kernel_sizes=[3, 3], strides=[1, 2], num_block_repeats=[1, 1], expand_ratios=[1, 2], depthwise_padding=[])
vision("MobileViTForImageClassification", functools.partial(images, size=64), train=False, image_size=64, hidden_sizes=[8, 8, 8], neck_hidden_sizes=[4, 4, 4, 4, 4, 4, 8], num_attention_heads=2, mlp_ratio=1.0)
vision("MobileViTV2ForImageClassification", functools.partial(images, size=64), train=False, image_size=64, width_multiplier=0.125, n_attn_blocks=[1, 1, 1], base_attn_unit_dims=[8, 8, 8])
vision("MobileNetV1ForImageClassification", functools.partial(images, size=32), train=False, depth_multiplier=0.05, min_depth=4)
vision("MobileNetV2ForImageClassification", functools.partial(images, size=32), train=False, depth_multiplier=0.05, min_depth=4, depth_divisible_by=4)
vision("LevitForImageClassification", functools.partial(images, size=64), train=False, image_size=64, hidden_sizes=[8, 8, 8], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[4, 4, 4], down_ops=[["Subsample", 4, 2, 4, 2, 2], ["Subsample", 4, 2, 4, 2, 2]])
vision("CvtForImageClassification", functools.partial(images, size=16), train=False, patch_sizes=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1], embed_dim=[8, 8], num_heads=[1, 2], depth=[1, 1], mlp_ratio=[2.0, 2.0], attention_drop_rate=[0.0, 0.0], drop_rate=[0.0, 0.0], drop_path_rate=[0.0, 0.0], qkv_bias=[True, True], cls_token=[False, True], qkv_projection_method=["dw_bn", "dw_bn"], kernel_qkv=[3, 3], padding_kv=[1, 1], stride_kv=[2, 2], padding_q=[1, 1], stride_q=[1, 1])
vision("PoolFormerForImageClassification", functools.partial(images, size=16), depths=[1, 1], hidden_sizes=[8, 8], patch_sizes=[3, 3], strides=[2, 2], padding=[1, 1], num_encoder_blocks=2, mlp_ratio=2.0)
vision("FocalNetForImageClassification", functools.partial(images, size=16), image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3], hidden_sizes=[8, 8], use_layerscale=True)
vision("SwiftFormerForImageClassification", functools.partial(images, size=32), train=False, image_size=32, depths=[1, 1, 1, 1], embed_dims=[8, 8, 8, 8], mlp_ratio=2)

# --- detection, two modalities ---------------------------------------------------------------------------------------

vision("ConditionalDetrForObjectDetection", functools.partial(images, size=32), train=False, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_queries=3, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12)
TEXT = {"vocab_size": V, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
vision("CLIPTextModelWithProjection", captions, projection_dim=6, **TEXT)
vision("CLIPVisionModelWithProjection", images, projection_dim=6, **SMALL)
vision("CLIPModel", pairs, text_config=TEXT, vision_config=SMALL, projection_dim=6, refused="reaches output", reason="logits compare every image with every text of the batch")
vision("SiglipVisionModel", images, **SMALL)
vision("SiglipForImageClassification", images, vision_config=SMALL)
vision("BlipForImageTextRetrieval", pairs, text_config=TEXT | {"encoder_hidden_size": 8}, vision_config=SMALL, projection_dim=6, image_text_hidden_size=6)
vision("ViTMAEForPreTraining", images, mask_ratio=0.5, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=12, **SMALL)
