"""Mixtures of experts of Hugging Face Transformers: rows sorted by expert, matrices looked up row by row, loops."""

from __future__ import annotations

import functools
from typing import Any

from models.language import BRANCHES, GROUPED, T5, padded, pairs, tokens
from models.pretrained import FIVE, case

__all__ = ["EXPERTS"]

mixture = functools.partial(case, __name__)
rare = functools.partial(mixture, rare=True)

# fmt: off
EXPERTS: dict[str, Any] = GROUPED | {"num_experts_per_tok": 2}
THREE: dict[str, Any] = EXPERTS | {"num_experts": 3}
LOCAL: dict[str, Any] = EXPERTS | {"num_local_experts": 3}
NARROW: dict[str, Any] = EXPERTS | {"moe_intermediate_size": 8}
SHARED: dict[str, Any] = NARROW | {"shared_expert_intermediate_size": 8, "num_experts": 3}
GATED: dict[str, Any] = NARROW | {  # the experts are in groups, of which a token chooses first
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}
LATENT: dict[str, Any] = GATED | {
    "q_lora_rank": 6, "kv_lora_rank": 6, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
    "num_key_value_heads": 2,
}
MIXED: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 4}
LOOPS: dict[str, Any] = {"refused": BRANCHES, "reason": "skips experts that nobody wants"}

if FIVE:
    mixture("MixtralForCausalLM", tokens, quick=True, **LOCAL)
    mixture("MixtralForCausalLM", padded, "MixtralBatched", experts_implementation="batched_mm", **LOCAL)
    mixture("MixtralForCausalLM", tokens, "MixtralLoop", experts_implementation="eager", **LOOPS, **LOCAL)
    mixture("MixtralForCausalLM", tokens, "MixtralLoadBalancing", called=True, output_router_logits=True,
            refused="counts values of all examples", reason="loss of load balancing over the batch", **LOCAL)
    mixture("GptOssForCausalLM", tokens, head_dim=4, sliding_window=3, attn_implementation="eager", **LOCAL)
    mixture("DeepseekV3ForCausalLM", padded, **LATENT)
    rare("DeepseekV3ForCausalLM", tokens, "DeepseekV3Batched", experts_implementation="batched_mm", **LATENT)
    rare("DeepseekV2ForCausalLM", tokens, topk_method="greedy", **LATENT)
    rare("Qwen2MoeForCausalLM", tokens, **SHARED)
    rare("Qwen3MoeForCausalLM", tokens, head_dim=4, num_experts=3, **NARROW)
    rare("Qwen3NextForCausalLM", tokens, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=4,
         linear_value_head_dim=4, **MIXED, **SHARED)
    rare("OlmoeForCausalLM", tokens, **THREE)
    rare("FlexOlmoForCausalLM", tokens, **THREE)
    rare("PhimoeForCausalLM", tokens, **LOCAL)
    rare("GraniteMoeForCausalLM", tokens, **LOCAL)
    rare("GraniteMoeSharedForCausalLM", tokens, shared_intermediate_size=6, **LOCAL)
    rare("JambaForCausalLM", tokens, mamba_d_state=3, mamba_dt_rank=2, attn_layer_period=2, attn_layer_offset=1,
         expert_layer_period=2, expert_layer_offset=0, use_mamba_kernels=False, **THREE)
    rare("Glm4MoeForCausalLM", tokens, head_dim=4, **GATED)
    rare("Dots1ForCausalLM", tokens, head_dim=4, **GATED)
    rare("Ernie4_5_MoeForCausalLM", tokens, moe_num_experts=3, moe_k=2, moe_layer_start_index=0, **NARROW)
    rare("MiniMaxForCausalLM", tokens, **MIXED, **LOCAL)
    rare("HunYuanMoEV1ForCausalLM", tokens, moe_topk=2, head_dim=4, **THREE)
    rare("Lfm2MoeForCausalLM", tokens, num_experts=3, num_dense_layers=0, layer_types=["conv", "full_attention"],
         conv_L_cache=3, **NARROW)
    rare("Llama4ForCausalLM", tokens, head_dim=4, intermediate_size_mlp=12, interleave_moe_layer_step=1,
         attention_chunk_size=4, **LOCAL | {"num_experts_per_tok": 1})
    rare("AriaTextForCausalLM", tokens, moe_num_experts=3, moe_topk=2, moe_num_shared_experts=1, **EXPERTS)
    rare("NemotronHForCausalLM", tokens, **EXPERTS)
    rare("JetMoeForCausalLM", tokens, kv_channels=4, refused="`sort` mixes examples",
         reason="takes sizes from the numbers of rows of each expert",
         **{k: v for k, v in LOCAL.items() if k != "num_attention_heads"})
    rare("DogeForCausalLM", tokens, is_moe=True, num_experts=4, refused="spreads the examples over several dimensions",
         reason="its router mixes the batch with its two halves of keys", **EXPERTS)
    rare("NllbMoeForConditionalGeneration", pairs, num_experts=3, vocab_size=11, d_model=8, encoder_layers=1,
         decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=12,
         decoder_ffn_dim=12, encoder_sparse_step=1, decoder_sparse_step=1, **LOOPS)
else:
    mixture("MixtralForCausalLM", tokens, refused=BRANCHES, reason="skips experts that nobody wants", **LOCAL)
mixture("SwitchTransformersForConditionalGeneration", pairs, num_experts=3,
        **LOOPS | {"refused": "raises TypeError|" + BRANCHES}, **T5)
