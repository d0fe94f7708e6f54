"""Language models of Hugging Face Transformers: decoders, encoders, encoder-decoders, state spaces, experts."""

from __future__ import annotations

import functools
from typing import Any

import torch

from models.case import Call, V
from models.pretrained import case

T = 5
SMALL: dict[str, Any] = {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = SMALL | {"intermediate_size": 12, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
GROUPED = DECODER | {"num_key_value_heads": 1}
ENCODER = SMALL | {"intermediate_size": 12, "max_position_embeddings": 16, "pad_token_id": 0}


def tokens(n: int, length: int = T) -> Call:
    return (), {"input_ids": torch.randint(2, V, (n, length))}


def padded(n: int, length: int = T) -> Call:
    """Examples of different lengths, filled up to one."""
    lengths = torch.randint(2, length + 1, (n, 1))
    mask = (torch.arange(length) < lengths).long()
    return (), {"input_ids": torch.randint(2, V, (n, length)) * mask, "attention_mask": mask}


def pairs(n: int) -> Call:
    """What goes into an encoder and into a decoder."""
    return (), {"input_ids": torch.randint(2, V, (n, T)), "decoder_input_ids": torch.randint(2, V, (n, 3))}


language = functools.partial(case, __name__)

# --- decoders ---------------------------------------------------------------------------------------------------------

GPT2 = {"vocab_size": V, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 1}
language("GPT2LMHeadModel", tokens, **GPT2)
language("GPT2LMHeadModel", padded, "GPT2Padded", use_cache=False, attn_implementation="eager", **GPT2)
language("GPT2ForSequenceClassification", tokens, pad_token_id=0, **GPT2)
language("GPTNeoForCausalLM", tokens, vocab_size=V, hidden_size=8, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=3, max_position_embeddings=16)
language("GPTNeoXForCausalLM", tokens, **DECODER)
language("GPTJForCausalLM", tokens, **GPT2, rotary_dim=4)
language("CodeGenForCausalLM", tokens, **GPT2 | {"n_embd": 16, "n_head": 4}, rotary_dim=4)
language("OPTForCausalLM", tokens, ffn_dim=12, word_embed_proj_dim=8, **DECODER | {"pad_token_id": 0})
language("OPTForCausalLM", padded, "OPTPadded", ffn_dim=12, word_embed_proj_dim=8, **DECODER| {"pad_token_id": 0})
language("BloomForCausalLM", tokens, vocab_size=V, hidden_size=8, n_layer=2, n_head=2, pad_token_id=0, bos_token_id=1, eos_token_id=1)
language("BloomForCausalLM", padded, "BloomPadded", vocab_size=V, hidden_size=8, n_layer=2, n_head=2, pad_token_id=0, bos_token_id=1, eos_token_id=1)
language("FalconForCausalLM", tokens, **DECODER)
language("FalconForCausalLM", padded, "FalconAlibi", alibi=True, **DECODER)
language("MptForCausalLM", tokens, vocab_size=V, d_model=8, n_layers=2, n_heads=2, max_seq_len=16)
language("LlamaForCausalLM", tokens, **GROUPED)
language("LlamaForCausalLM", padded, "LlamaPadded", **GROUPED)
language("LlamaForCausalLM", padded, "LlamaEager", attn_implementation="eager", tie_word_embeddings=True, **GROUPED)
language("MistralForCausalLM", padded, sliding_window=3, **GROUPED)
language("Qwen2ForCausalLM", tokens, **GROUPED)
language("Qwen3ForCausalLM", tokens, head_dim=4, **GROUPED)
language("GemmaForCausalLM", tokens, head_dim=4, **GROUPED | {"pad_token_id": 0})
language("Gemma2ForCausalLM", tokens, head_dim=4, sliding_window=3, attn_implementation="eager", **GROUPED | {"pad_token_id": 0})
language("Gemma3ForCausalLM", tokens, head_dim=4, sliding_window=3, **GROUPED | {"pad_token_id": 0})
language("PhiForCausalLM", tokens, **DECODER)
language("Phi3ForCausalLM", tokens, **DECODER | {"pad_token_id": 0})
language("StableLmForCausalLM", tokens, **GROUPED, use_qkv_bias=True)
language("OlmoForCausalLM", tokens, **GROUPED)
language("Olmo2ForCausalLM", tokens, **GROUPED)
language("CohereForCausalLM", tokens, **GROUPED | {"pad_token_id": 0})
language("GraniteForCausalLM", tokens, **GROUPED)
language("Starcoder2ForCausalLM", tokens, **GROUPED)
language("XGLMForCausalLM", tokens, vocab_size=V, d_model=8, ffn_dim=12, num_layers=2, attention_heads=2, max_position_embeddings=16, pad_token_id=0)
language("BioGptForCausalLM", tokens, **DECODER | {"pad_token_id": 0})
language("CTRLLMHeadModel", tokens, **GPT2, dff=12)
language("OpenAIGPTLMHeadModel", tokens, **GPT2)
language("XLNetLMHeadModel", tokens, vocab_size=V, d_model=8, n_layer=2, n_head=2, d_inner=12)
language("MixtralForCausalLM", tokens, num_local_experts=3, num_experts_per_tok=2, **GROUPED)
language("MixtralForCausalLM", tokens, "MixtralEager", num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager", **GROUPED)
language("Qwen2MoeForCausalLM", tokens, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=6, shared_expert_intermediate_size=6, **GROUPED)
language("GptOssForCausalLM", tokens, num_local_experts=3, num_experts_per_tok=2, head_dim=4, sliding_window=3, **GROUPED)
language("MambaForCausalLM", tokens, vocab_size=V, hidden_size=8, num_hidden_layers=2, state_size=3, time_step_rank=2)
language("Mamba2ForCausalLM", tokens, vocab_size=V, hidden_size=8, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=4, n_groups=1, chunk_size=4)
language("RwkvForCausalLM", tokens, vocab_size=V, hidden_size=8, num_hidden_layers=2, attention_hidden_size=8, intermediate_size=12, context_length=16)
language("RecurrentGemmaForCausalLM", tokens, head_dim=4, lru_width=8, **{**GROUPED, "num_hidden_layers": 3, "pad_token_id": 0})

# --- encoders ---------------------------------------------------------------------------------------------------------

language("BertForSequenceClassification", tokens, **ENCODER)
language("BertForSequenceClassification", padded, "BertPadded", attn_implementation="eager", **ENCODER)
language("BertForMaskedLM", padded, **ENCODER)
language("RobertaForMaskedLM", padded, **ENCODER | {"pad_token_id": 1})
language("XLMRobertaForMaskedLM", tokens, **ENCODER | {"pad_token_id": 1})
language("DistilBertForSequenceClassification", tokens, vocab_size=V, dim=8, n_layers=2, n_heads=2, hidden_dim=12, max_position_embeddings=16)
language("ElectraForPreTraining", tokens, embedding_size=6, **ENCODER)
language("DebertaForSequenceClassification", padded, pos_att_type=["c2p", "p2c"], relative_attention=True, max_relative_positions=8, **ENCODER)
language("DebertaV2ForSequenceClassification", padded, pos_att_type=["c2p", "p2c"], relative_attention=True, max_relative_positions=8, position_buckets=4, norm_rel_ebd="layer_norm", share_att_key=True, conv_kernel_size=3, **ENCODER)
language("AlbertForMaskedLM", tokens, embedding_size=6, **ENCODER)
language("MPNetForMaskedLM", tokens, **ENCODER | {"pad_token_id": 1})
language("MobileBertForMaskedLM", tokens, embedding_size=6, intra_bottleneck_size=8, **ENCODER | {"hidden_size": 16})
language("SqueezeBertForMaskedLM", tokens, embedding_size=8, q_groups=2, k_groups=2, v_groups=2, intermediate_groups=2, **ENCODER)
language("ConvBertForMaskedLM", tokens, embedding_size=8, conv_kernel_size=3, **ENCODER)
language("NystromformerForMaskedLM", tokens, num_landmarks=T, segment_means_seq_len=T, **ENCODER)
language("RoFormerForMaskedLM", tokens, embedding_size=8, **ENCODER)
language("FNetForMaskedLM", tokens, **{k: v for k, v in ENCODER.items() if k != "num_attention_heads"})
language("LongformerForMaskedLM", tokens, attention_window=4, **ENCODER | {"pad_token_id": 1})
language("BigBirdForMaskedLM", tokens, attention_type="original_full", **ENCODER)
language("FunnelForMaskedLM", tokens, vocab_size=V, block_sizes=[1, 1], num_decoder_layers=1, d_model=8, n_head=2, d_head=4, d_inner=12)
language("ModernBertForMaskedLM", padded, attn_implementation="sdpa", reference_compile=False, global_attn_every_n_layers=2, local_attention=4, **ENCODER)
language("EsmForMaskedLM", tokens, mask_token_id=2, **ENCODER | {"pad_token_id": 1})
language("CanineForSequenceClassification", functools.partial(tokens, length=8), num_hash_functions=2, num_hash_buckets=7, downsampling_rate=2, local_transformer_stride=4, **ENCODER)
language("XLMWithLMHeadModel", tokens, vocab_size=V, emb_dim=8, n_layers=2, n_heads=2, max_position_embeddings=16, n_langs=1)

# --- encoder-decoders -------------------------------------------------------------------------------------------------

T5 = {"vocab_size": V, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "relative_attention_num_buckets": 6, "relative_attention_max_distance": 8, "pad_token_id": 0, "decoder_start_token_id": 0}
language("T5ForConditionalGeneration", pairs, **T5)
language("T5ForConditionalGeneration", pairs, "T5Gated", feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5)
BART = {"vocab_size": V, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
language("BartForConditionalGeneration", pairs, **BART)
language("PegasusForConditionalGeneration", pairs, **BART)
language("MBartForConditionalGeneration", pairs, **BART)
language("MarianMTModel", pairs, **BART)
language("SwitchTransformersForConditionalGeneration", pairs, num_experts=3, **T5)
