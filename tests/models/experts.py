"""Mixtures of experts of Hugging Face Transformers: rows sorted by expert, matrices looked up row by row, loops."""

from __future__ import annotations

import functools
from typing import Any

from models.language import BRANCHES, GROUPED, T5, padded, pairs, tokens
from models.pretrained import FIVE, case

mixture = functools.partial(case, __name__)

# fmt: off
EXPERTS: dict[str, Any] = GROUPED | {"num_experts_per_tok": 2}
SMALL_EXPERTS: dict[str, Any] = EXPERTS | {"moe_intermediate_size": 8}
LATENT: dict[str, Any] = SMALL_EXPERTS | {
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "q_lora_rank": 6, "kv_lora_rank": 6, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 4, "num_key_value_heads": 2,
}
mixture("MixtralForCausalLM", tokens, quick=True, num_local_experts=3, **EXPERTS)
mixture("MixtralForCausalLM", padded, "MixtralBatched", num_local_experts=3, experts_implementation="batched_mm", **EXPERTS)
mixture("MixtralForCausalLM", tokens, "MixtralLoop", num_local_experts=3, experts_implementation="eager",
        refused=BRANCHES, reason="skips experts that nobody wants", **EXPERTS)
mixture("MixtralForCausalLM", tokens, "MixtralLoadBalancing", called=True, num_local_experts=3, output_router_logits=True,
        refused="mixes", reason="loss of load balancing over the batch", **EXPERTS)
mixture("Qwen2MoeForCausalLM", tokens, num_experts=3, shared_expert_intermediate_size=8, **SMALL_EXPERTS)
mixture("Qwen3MoeForCausalLM", tokens, num_experts=3, head_dim=4, **SMALL_EXPERTS)
mixture("Qwen3NextForCausalLM", tokens, num_experts=3, head_dim=4, shared_expert_intermediate_size=8, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=4, linear_value_head_dim=4, layer_types=["linear_attention", "full_attention"], **SMALL_EXPERTS)
mixture("GptOssForCausalLM", tokens, num_local_experts=3, head_dim=4, sliding_window=3, quick=True, attn_implementation="eager", **EXPERTS)
mixture("DeepseekV2ForCausalLM", tokens, topk_method="greedy", **LATENT)
mixture("DeepseekV3ForCausalLM", padded, **LATENT)
mixture("DeepseekV3ForCausalLM", tokens, "DeepseekV3Batched", experts_implementation="batched_mm", **LATENT)
mixture("OlmoeForCausalLM", tokens, num_experts=3, **EXPERTS)
mixture("FlexOlmoForCausalLM", tokens, num_experts=3, **EXPERTS)
mixture("PhimoeForCausalLM", tokens, num_local_experts=3, **EXPERTS)
mixture("GraniteMoeForCausalLM", tokens, num_local_experts=3, **EXPERTS)
mixture("GraniteMoeSharedForCausalLM", tokens, num_local_experts=3, shared_intermediate_size=6, **EXPERTS)
mixture("JambaForCausalLM", tokens, num_experts=3, mamba_d_state=3, mamba_dt_rank=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=0, use_mamba_kernels=False, **EXPERTS)
mixture("Glm4MoeForCausalLM", tokens, n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1, head_dim=4, **SMALL_EXPERTS)
mixture("Ernie4_5_MoeForCausalLM", tokens, moe_num_experts=3, moe_k=2, moe_layer_start_index=0, **SMALL_EXPERTS)
mixture("MiniMaxForCausalLM", tokens, num_local_experts=3, head_dim=4, layer_types=["linear_attention", "full_attention"], **EXPERTS)
mixture("HunYuanMoEV1ForCausalLM", tokens, num_experts=3, moe_topk=2, head_dim=4, **EXPERTS)
mixture("Dots1ForCausalLM", tokens, n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1, head_dim=4, **SMALL_EXPERTS)
mixture("Lfm2MoeForCausalLM", tokens, num_experts=3, num_dense_layers=0, layer_types=["conv", "full_attention"], conv_L_cache=3, **SMALL_EXPERTS)
mixture("Llama4ForCausalLM", tokens, num_local_experts=3, head_dim=4, intermediate_size_mlp=12, interleave_moe_layer_step=1, attention_chunk_size=4, **{**EXPERTS, "num_experts_per_tok": 1})
mixture("JetMoeForCausalLM", tokens, num_local_experts=3, kv_channels=4, **{k: v for k, v in EXPERTS.items() if k != "num_attention_heads"})
mixture("AriaTextForCausalLM", tokens, moe_num_experts=3, moe_topk=2, moe_num_shared_experts=1, **EXPERTS)
mixture("DogeForCausalLM", tokens, is_moe=True, num_experts=4, **EXPERTS)
mixture("LongcatFlashForCausalLM", tokens, n_routed_experts=4, zero_expert_num=1, expert_ffn_size=6, ffn_hidden_size=12, moe_topk=2, num_layers=1, head_dim=4, **{k: v for k, v in LATENT.items() if k not in ("n_routed_experts", "num_hidden_layers")})
mixture("NemotronHForCausalLM", tokens, **EXPERTS)
mixture("SwitchTransformersForConditionalGeneration", pairs, num_experts=3, refused="raises TypeError|" + BRANCHES,
        reason="skips experts that nobody wants", **T5)
mixture("NllbMoeForConditionalGeneration", pairs, num_experts=3)
