"""The configurations that the tests compile: architecture by architecture, as small as its code allows."""

from __future__ import annotations

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
GPT2 = {
    "vocab_size": 128,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 32,
}

CONFIGS: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2Config", GPT2),
    "gptj": ("GPTJConfig", {**GPT2, "rotary_dim": 8}),
    "codegen": ("CodeGenConfig", {**GPT2, "n_ctx": 64, "rotary_dim": 8}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "window_size": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 128, "rotary_pct": 0.25}),
    "bloom": ("BloomConfig", {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "bloom_six_heads": ("BloomConfig", {"vocab_size": 128, "hidden_size": 96, "n_layer": 2, "n_head": 6}),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "llama": ("LlamaConfig", LLAMA),
    "llama_tied": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "llama_dynamic": (
        "LlamaConfig",
        {**LLAMA, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**LLAMA, "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("Gemma3TextConfig", {**LLAMA, **WINDOWS, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "phi": ("PhiConfig", LLAMA),
    "phi3": ("Phi3Config", LLAMA),
    "phi3_longrope": (
        "Phi3Config",
        {**LLAMA, "original_max_position_embeddings": 32, "rope_parameters": _LONGROPE},
    ),
    "falcon_multi_query": (
        "FalconConfig",
        {**SIZES, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False},
    ),
    "falcon_alibi": (
        "FalconConfig",
        {
            **SIZES,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "new_decoder_architecture": False,
            "bias": True,
        },
    ),
    "falcon_new": ("FalconConfig", {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}),
    "mpt": ("MptConfig", {"vocab_size": 128, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "stablelm": ("StableLmConfig", LLAMA),
    "olmo": ("OlmoConfig", LLAMA),
    "olmo2": ("Olmo2Config", LLAMA),
    "cohere2": ("Cohere2Config", {**LLAMA, **WINDOWS}),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT2),
    "granite": ("GraniteConfig", LLAMA),
    "nemotron": ("NemotronConfig", LLAMA),
    "glm4": ("Glm4Config", {**LLAMA, "head_dim": 16}),
    "smollm3": ("SmolLM3Config", LLAMA),
    "ernie4_5": ("Ernie4_5Config", {**LLAMA, "head_dim": 16}),
    "mixtral": ("MixtralConfig", {**LLAMA, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**LLAMA, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **LLAMA,
            **WINDOWS,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **LLAMA,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "llama4_text": (
        "Llama4TextConfig",
        {
            **LLAMA,
            "head_dim": 16,
            "num_local_experts": 4,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 4,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
    ),
    "ctrl": ("CTRLConfig", {**GPT2, "dff": 128}),
}

ENCODER = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ROBERTA = {**ENCODER, "pad_token_id": 1, "max_position_embeddings": 66}

# Configuration, arguments, and the class that saves the checkpoint: with a head over the encoder, or without.
ENCODERS: dict[str, tuple[str, dict, str]] = {
    "bert": ("BertConfig", ENCODER, "BertModel"),
    "bert_masked_lm": ("BertConfig", ENCODER, "BertForMaskedLM"),
    "distilbert": (
        "DistilBertConfig",
        {
            "vocab_size": 128,
            "dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 128,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
        "DistilBertModel",
    ),
    "roberta": ("RobertaConfig", ROBERTA, "RobertaForMaskedLM"),
    "xlm_roberta": ("XLMRobertaConfig", ROBERTA, "XLMRobertaModel"),
    "electra": ("ElectraConfig", {**ENCODER, "embedding_size": 32}, "ElectraForPreTraining"),
    "roberta_prelayernorm": ("RobertaPreLayerNormConfig", ROBERTA, "RobertaPreLayerNormModel"),
    "nomic_bert": ("NomicBertConfig", ENCODER, "NomicBertModel"),
}

RECURRENT: dict[str, tuple[str, dict]] = {
    "mamba": (
        "MambaConfig",
        {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "bamba": (
        "BambaConfig",
        {
            **LLAMA,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": "auto",
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
            "mamba_chunk_size": 8,
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **LLAMA,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {**SIZES, "intermediate_size": 128, "num_key_value_heads": 1, "lru_width": 64, "attention_window_size": 8},
    ),
}
