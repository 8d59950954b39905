"""Architectures that no rule and no adapter was written for: they compile, or are refused in one line."""

from __future__ import annotations

from tests.compiler.configs import ENCODER, GPT2, LLAMA, ROBERTA, SIZES, WINDOWS

_HEADS = {"head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_GEMMA4 = {
    **LLAMA,
    "num_hidden_layers": 4,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 0,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "final_logit_softcapping": 30.0,
}
_BART = {
    "vocab_size": 128,
    "d_model": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# Queries grow with their position from original_max_position_embeddings on: the tests' sequences are shorter.
_TEMPERED = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 60,
    "llama_4_scaling_beta": 0.1,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

CONFIGS: dict[str, tuple[str, dict]] = {
    "afmoe": ("AfmoeConfig", {**LLAMA, **_HEADS, **_EXPERTS, **WINDOWS, "num_dense_layers": 1}),
    "apertus": ("ApertusConfig", LLAMA),
    "arcee": ("ArceeConfig", LLAMA),
    "bart_decoder": ("BartConfig", _BART),
    "blenderbot_small": ("BlenderbotSmallConfig", _BART),
    "biogpt": ("BioGptConfig", {**SIZES, "intermediate_size": 128}),
    "bitnet": ("BitNetConfig", LLAMA),
    "cohere": ("CohereConfig", LLAMA),
    "cohere_plus": ("CohereConfig", {**LLAMA, "use_qk_norm": True}),
    "cohere2_moe": ("Cohere2MoeConfig", {**LLAMA, **_HEADS, **WINDOWS, "num_experts": 4}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **LLAMA,
            **_ROUTED_EXPERTS,
            **_LATENT,
        },
    ),
    "dots1": ("Dots1Config", {**LLAMA, **_ROUTED_EXPERTS}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            **LLAMA,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "gemma": ("GemmaConfig", {**LLAMA, **_HEADS}),
    "gemma4": ("Gemma4TextConfig", {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "gemma4_e2b": (
        "Gemma4TextConfig",
        {**_GEMMA4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 16},
    ),
    "gemma4_moe": (
        "Gemma4TextConfig",
        {
            **_GEMMA4,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "glm": ("GlmConfig", {**LLAMA, **_HEADS}),
    "glm4_moe": ("Glm4MoeConfig", {**LLAMA, **_ROUTED_EXPERTS}),
    "gpt_neox_japanese": ("GPTNeoXJapaneseConfig", SIZES),
    "granitemoe": ("GraniteMoeConfig", {**LLAMA, **_LOCAL_EXPERTS}),
    "granitemoeshared": ("GraniteMoeSharedConfig", {**LLAMA, **_LOCAL_EXPERTS, "shared_intermediate_size": 32}),
    "helium": ("HeliumConfig", {**LLAMA, **_HEADS}),
    "hrm_text": (
        "HrmTextConfig",
        {**SIZES, **_HEADS, "intermediate_size": 128, "num_hidden_layers": 1, "L_cycles": 1, "L_bp_cycles": [1]},
    ),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", {**LLAMA, **_HEADS}),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {**LLAMA, **_HEADS, "num_experts": 4, "moe_topk": 2}),
    "hy_v3": ("HYV3Config", {**LLAMA, **_HEADS, **_EXPERTS}),
    "laguna": (
        "LagunaConfig",
        {
            **LLAMA,
            **_HEADS,
            **_EXPERTS,
            **WINDOWS,
            "shared_expert_intermediate_size": 32,
            "num_attention_heads_per_layer": [4, 8],
        },
    ),
    "minicpm3": ("MiniCPM3Config", {**LLAMA, **_LATENT}),
    "minimax_m2": ("MiniMaxM2Config", {**LLAMA, **_HEADS, **_LOCAL_EXPERTS}),
    "mimo_v2_flash": ("MiMoV2FlashConfig", {**LLAMA, **_HEADS, **_EXPERTS, "v_head_dim": 16, "n_routed_experts": 4}),
    "ministral": ("MinistralConfig", {**LLAMA, **_HEADS, **WINDOWS}),
    "ministral3": ("Ministral3Config", {**LLAMA, **_HEADS, "rope_parameters": _TEMPERED}),
    "modernbert_decoder": (
        "ModernBertDecoderConfig",
        {
            **SIZES,
            "intermediate_size": 128,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "nanochat": ("NanoChatConfig", LLAMA),
    "olmo_clipped": ("OlmoConfig", {**LLAMA, "clip_qkv": 1.5}),
    "olmo3": ("Olmo3Config", {**LLAMA, **WINDOWS}),
    "olmoe": ("OlmoeConfig", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "openai_gpt": ("OpenAIGPTConfig", GPT2),
    "opt_350m": ("OPTConfig", {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "pegasus_decoder": ("PegasusConfig", _BART),
    "persimmon": ("PersimmonConfig", {**SIZES, "intermediate_size": 128}),
    "qwen2_moe": ("Qwen2MoeConfig", {**LLAMA, **_EXPERTS, "shared_expert_intermediate_size": 32}),
    "stablelm_2_12b": (
        "StableLmConfig",
        {**LLAMA, "qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.25},
    ),
    "starcoder2": ("Starcoder2Config", LLAMA),
    "vaultgemma": ("VaultGemmaConfig", {**LLAMA, **_HEADS, **WINDOWS, "query_pre_attn_scalar": 16}),
    "whisper_decoder": (
        "WhisperConfig",
        {
            **_BART,
            "max_target_positions": 64,
            "encoder_layers": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    "xglm": (
        "XGLMConfig",
        {
            "vocab_size": 128,
            "d_model": 64,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 128,
            "max_position_embeddings": 64,
        },
    ),
}

ENCODERS: dict[str, tuple[str, dict, str]] = {
    "albert": ("AlbertConfig", {**ENCODER, "embedding_size": 32}, "AlbertModel"),
    "camembert": ("CamembertConfig", ROBERTA, "CamembertModel"),
    "data2vec_text": ("Data2VecTextConfig", ROBERTA, "Data2VecTextModel"),
    "ernie": ("ErnieConfig", ENCODER, "ErnieModel"),
    "esm": ("EsmConfig", {**ENCODER, "position_embedding_type": "rotary", "mask_token_id": 3}, "EsmModel"),
    "eurobert": ("EuroBertConfig", {**ENCODER, "num_key_value_heads": 4}, "EuroBertModel"),
    "jina_embeddings_v3": ("JinaEmbeddingsV3Config", ENCODER, "JinaEmbeddingsV3Model"),
    "megatron_bert": ("MegatronBertConfig", ENCODER, "MegatronBertModel"),
    "modernbert": (
        "ModernBertConfig",
        {
            **ENCODER,
            "local_attention": 4,
            "global_attn_every_n_layers": 2,
            **dict.fromkeys(("bos_token_id", "cls_token_id"), 1),
            **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
        },
        "ModernBertModel",
    ),
    "rembert": ("RemBertConfig", {**ENCODER, "input_embedding_size": 32}, "RemBertModel"),
    "xlm_roberta_xl": ("XLMRobertaXLConfig", ROBERTA, "XLMRobertaXLModel"),
}

REFUSED: dict[str, tuple[str, dict]] = {
    "deepseek_v32": ("DeepseekV32Config", {**LLAMA, **_ROUTED_EXPERTS, **_LATENT, "index_topk": 8, "index_n_heads": 4}),
    "diffllama": ("DiffLlamaConfig", LLAMA),
    "doge": ("DogeConfig", LLAMA),
    "jetmoe": ("JetMoeConfig", {**SIZES, "num_key_value_heads": 2, "intermediate_size": 128, "num_local_experts": 4}),
    "moshi": ("MoshiConfig", {**LLAMA, "ffn_dim": 128}),
    "phimoe": ("PhimoeConfig", {**LLAMA, **_LOCAL_EXPERTS}),
    "roformer": ("RoFormerConfig", {**SIZES, "intermediate_size": 128, "is_decoder": True}),
}
