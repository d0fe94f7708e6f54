"""Language models of Hugging Face Transformers: decoders, encoders, encoder-decoders, state spaces."""

from __future__ import annotations

import functools
from typing import Any

import torch

from models.case import Call, V
from models.pretrained import FIVE, case

T = 5
BRANCHES = "branches on the values of tensors"
# Before version 5 some models drop whole layers by a comparison of random tensors, in training mode.
STILL: dict[str, Any] = {"train": FIVE}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
SMALL: dict[str, Any] = {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = SMALL | SPECIAL | {"intermediate_size": 12, "max_position_embeddings": 16}
GROUPED = DECODER | {"num_key_value_heads": 1}
ENCODER = SMALL | {"intermediate_size": 12, "max_position_embeddings": 16, "pad_token_id": 0}
PADS_WITH_1 = ENCODER | {"pad_token_id": 1}


def tokens(n: int, length: int = T) -> Call:
    return (), {"input_ids": torch.randint(2, V, (n, length))}


def padded(n: int, length: int = T) -> Call:
    """Examples of different lengths, filled up to one."""
    lengths = torch.randint(2, length + 1, (n, 1))
    mask = (torch.arange(length) < lengths).long()
    return (), {"input_ids": torch.randint(2, V, (n, length)) * mask, "attention_mask": mask}


def pairs(n: int) -> Call:
    """What goes into an encoder and into a decoder."""
    return (), {**padded(n)[1], "decoder_input_ids": torch.randint(2, V, (n, 3))}


language = functools.partial(case, __name__)

# fmt: off
# --- decoders ---------------------------------------------------------------------------------------------------------

GPT2: dict[str, Any] = {"vocab_size": V, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, **SPECIAL}
language("GPT2LMHeadModel", tokens, quick=True, **GPT2)
language("GPT2LMHeadModel", padded, "GPT2Padded", use_cache=False, attn_implementation="eager", **GPT2)
language("GPT2ForSequenceClassification", tokens, train=False, **GPT2)
language("GPTNeoForCausalLM", tokens, vocab_size=V, hidden_size=8, num_layers=2, num_heads=2, window_size=3,
         attention_types=[[["global", "local"], 1]], max_position_embeddings=16)
language("GPTNeoXForCausalLM", tokens, **DECODER)
language("GPTJForCausalLM", tokens, rotary_dim=4, **GPT2)
language("OPTForCausalLM", padded, ffn_dim=12, word_embed_proj_dim=6, do_layer_norm_before=False, **STILL,
         **DECODER)
language("BloomForCausalLM", padded, vocab_size=V, hidden_size=8, n_layer=2, n_head=2, **SPECIAL)
language("FalconForCausalLM", tokens, **DECODER)
language("FalconForCausalLM", padded, "FalconAlibi", alibi=True, **DECODER)
language("MptForCausalLM", tokens, vocab_size=V, d_model=8, n_layers=2, n_heads=2, max_seq_len=16)
language("LlamaForCausalLM", tokens, quick=True, **GROUPED)
language("LlamaForCausalLM", padded, "LlamaEager", attn_implementation="eager", tie_word_embeddings=True, **GROUPED)
language("MistralForCausalLM", padded, sliding_window=3, **GROUPED)
language("Qwen2ForCausalLM", tokens, **GROUPED)
language("Qwen3ForCausalLM", tokens, head_dim=4, **GROUPED)
language("GemmaForCausalLM", tokens, head_dim=4, **GROUPED)
language("Gemma2ForCausalLM", padded, head_dim=4, sliding_window=3, attn_implementation="eager", **GROUPED)
language("Gemma3ForCausalLM", tokens, head_dim=4, sliding_window=3, **GROUPED)
language("PhiForCausalLM", tokens, **DECODER)
language("Phi3ForCausalLM", tokens, **DECODER)
language("StableLmForCausalLM", tokens, use_qkv_bias=True, **GROUPED)
language("Olmo2ForCausalLM", tokens, **GROUPED)
language("CohereForCausalLM", tokens, **GROUPED)
language("BioGptForCausalLM", tokens, **STILL, **DECODER)
REFUSED = {"refused": "cannot be captured.*\n.*modeling_ctrl.py", "reason": "puts a tensor on itself in forward"}
language("CTRLLMHeadModel", tokens, dff=12, **REFUSED if FIVE else {}, **GPT2)
language("OpenAIGPTLMHeadModel", tokens, **GPT2)
language("XLNetLMHeadModel", tokens, vocab_size=V, d_model=8, n_layer=2, n_head=2, d_inner=12)
language("MambaForCausalLM", tokens, vocab_size=V, hidden_size=8, num_hidden_layers=2, state_size=3, time_step_rank=2)
language("Mamba2ForCausalLM", tokens, vocab_size=V, hidden_size=8, num_hidden_layers=2, state_size=4, num_heads=4,
         head_dim=4, n_groups=1, chunk_size=4)
language("RwkvForCausalLM", tokens, vocab_size=V, hidden_size=8, num_hidden_layers=2, attention_hidden_size=8,
         intermediate_size=12, context_length=16)
if FIVE:  # before, RecurrentGemma computes something else when it is compiled
    language("RecurrentGemmaForCausalLM", tokens, head_dim=4, lru_width=8, **GROUPED | {"num_hidden_layers": 3})
    language("Lfm2ForCausalLM", tokens, layer_types=["conv", "full_attention"], conv_L_cache=3, **GROUPED)
else:
    language("Lfm2ForCausalLM", tokens, layer_types=["conv", "full_attention"], conv_L_cache=3,
             refused="cannot be compiled: AssertionError.*\n.*modeling_lfm2.py", reason="prepares its cache in forward",
             **GROUPED)

# --- encoders ---------------------------------------------------------------------------------------------------------

language("BertForSequenceClassification", tokens, quick=True, **ENCODER)
language("BertForMaskedLM", padded, attn_implementation="eager", **ENCODER)
language("RobertaForMaskedLM", padded, **PADS_WITH_1)
language("DistilBertForSequenceClassification", padded, vocab_size=V, dim=8, n_layers=2, n_heads=2, hidden_dim=12,
         max_position_embeddings=16)
language("ElectraForPreTraining", tokens, embedding_size=6, **ENCODER)
DEBERTA = ENCODER | {"pos_att_type": ["c2p", "p2c"], "relative_attention": True, "max_relative_positions": 8}
language("DebertaForSequenceClassification", padded, quick=True, **DEBERTA)
language("DebertaV2ForSequenceClassification", padded, position_buckets=4, norm_rel_ebd="layer_norm",
         share_att_key=True, conv_kernel_size=3, **DEBERTA)
language("AlbertForMaskedLM", tokens, embedding_size=6, quick=True, **ENCODER)
language("MPNetForMaskedLM", tokens, **PADS_WITH_1)
language("MobileBertForMaskedLM", tokens, embedding_size=6, intra_bottleneck_size=8, **ENCODER | {"hidden_size": 16})
language("SqueezeBertForMaskedLM", tokens, embedding_size=8, q_groups=2, k_groups=2, v_groups=2, **ENCODER)
language("ConvBertForMaskedLM", tokens, embedding_size=8, conv_kernel_size=3, **ENCODER)
language("NystromformerForMaskedLM", tokens, num_landmarks=T, segment_means_seq_len=T, **ENCODER)
language("RoFormerForMaskedLM", tokens, embedding_size=8, **ENCODER)
language("FNetForMaskedLM", tokens, **{k: v for k, v in ENCODER.items() if k != "num_attention_heads"})
language("LongformerForMaskedLM", tokens, attention_window=4, refused=BRANCHES,
         reason="asks whether any token is global", **PADS_WITH_1)
language("BigBirdForMaskedLM", tokens, attention_type="original_full", **ENCODER)
if FIVE:  # before, Dynamo fails on it
    language("FunnelForMaskedLM", tokens, vocab_size=V, block_sizes=[1, 1], num_decoder_layers=1, d_model=8, n_head=2,
             d_head=4, d_inner=12)
language("ModernBertForMaskedLM", padded, attn_implementation="sdpa", reference_compile=False,
         global_attn_every_n_layers=2, local_attention=4, **ENCODER)
language("EsmForMaskedLM", padded, mask_token_id=2, **PADS_WITH_1)
language("CanineForSequenceClassification", functools.partial(tokens, length=8), num_hash_functions=2,
         num_hash_buckets=16, downsampling_rate=2, local_transformer_stride=4, **ENCODER)
language("XLMWithLMHeadModel", tokens, vocab_size=V, emb_dim=8, n_layers=2, n_heads=2, max_position_embeddings=16)
language("PerceiverForMaskedLM", tokens, vocab_size=V, d_model=8, d_latents=8, num_latents=3, num_blocks=1,
         num_self_attends_per_block=2, num_self_attention_heads=2, num_cross_attention_heads=2,
         max_position_embeddings=T, qk_channels=8, v_channels=8)

# --- encoder-decoders -------------------------------------------------------------------------------------------------

T5: dict[str, Any] = {
    "vocab_size": V, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "pad_token_id": 0,
    "relative_attention_num_buckets": 6, "relative_attention_max_distance": 8, "decoder_start_token_id": 0,
}
BART: dict[str, Any] = SPECIAL | {
    "vocab_size": V, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 16,
    "decoder_start_token_id": 0, "forced_eos_token_id": None,
}
language("T5ForConditionalGeneration", pairs, **T5)
language("T5ForConditionalGeneration", pairs, "T5Gated", feed_forward_proj="gated-gelu", tie_word_embeddings=False,
         **T5 | {"num_layers": 1})
language("BartForConditionalGeneration", pairs, **STILL, **BART)
language("PegasusForConditionalGeneration", pairs, **STILL, **BART)
language("MBartForConditionalGeneration", pairs, **STILL, **BART)
